//! Quantised bases: their results against those of dequantised ones, training on them, what they refuse, and
//! how they are loaded.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{safetensors, DType, Device, Tensor, Var};
use candle_nn::{Module, VarBuilder};
use monteclora::adapter::{AdaptableModel, Role};
use monteclora::adapters::{AdaLoraConfig, BlobConfig, BottleneckConfig, LoraConfig, PromptConfig};
use monteclora::data::batch::Batcher;
use monteclora::inject::merge::{merge, merge_dequantized, unmerge};
use monteclora::inject::Targets;
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::generate::{generate, GenerateConfig};
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::{check_merged, save_merged, MAX_SHARD_BYTES};
use monteclora::models::{Quantization, Weights};
use monteclora::train::{Classification, Classifier, Method, MethodInit, Objective};
use monteclora::{BaseLinear, Context, MonteCLoRAConfig, Noise, Params, Pass};
use serde_json::json;

use crate::support::{assert_close, asset, scatter, Outcome};

type Tensors = HashMap<String, Tensor>;

/// A LLaMA with rows of 64 and, within its feed-forward blocks, of `inner`.
fn config(inner: usize, tied: bool) -> Outcome<DecoderConfig> {
    Ok(DecoderConfig::from_value(json!({
        "model_type": "llama", "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": inner,
        "max_position_embeddings": 40, "rms_norm_eps": 1e-5, "eos_token_id": 2, "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
    }))?)
}

fn weights(config: &DecoderConfig) -> Outcome<Tensors> {
    let params = Params::new(Noise::new(5), &Device::Cpu);
    DecoderForCausalLM::load(params.var_builder(None, Role::Base), config, Noise::new(0))?;
    scatter(&params)?;
    Ok(params.all().into_iter().map(|(name, param)| (name, param.var.as_detached_tensor())).collect())
}

fn builder(tensors: &Tensors) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.clone(), DType::F32, &Device::Cpu)
}

fn quantized(tensors: &Tensors, config: &DecoderConfig, kind: &str) -> Outcome<DecoderForCausalLM> {
    let kind: Quantization = kind.parse()?;
    let weights = Weights::new(builder(tensors), kind.source(&builder(tensors)));
    Ok(DecoderForCausalLM::load(weights, config, Noise::new(0))?)
}

/// The same model with dequantised weights.
fn dequantized(mut model: DecoderForCausalLM, tensors: &Tensors) -> Outcome<DecoderForCausalLM> {
    let (config, mut rounded) = (model.config().clone(), tensors.clone());
    model.visit_linears(&mut |layer| {
        rounded.insert(format!("{}.weight", layer.path()), layer.base().dequantize()?.weight().clone());
        Ok(())
    })?;
    let words = model.embedding_mut().ok_or("no embedding")?.words().dequantize()?;
    rounded.insert("model.embed_tokens.weight".to_string(), words);
    if let Some(head) = tensors.get("lm_head.weight") {
        // The head is quantised too, as q8_0, but `visit_linears` does not reach it.
        let kind: Quantization = "q8_0".parse()?;
        let alone = Weights::new(builder(tensors), kind.source(&builder(tensors)));
        let head = alone.pp("lm_head").table(head.dims2()?, candle_nn::Init::Const(0.0))?.dequantize()?;
        rounded.insert("lm_head.weight".to_string(), head);
    }
    Ok(DecoderForCausalLM::load(builder(&rounded), &config, Noise::new(0))?)
}

fn ids(rows: u32, length: u32) -> Outcome<(Tensor, Tensor)> {
    let ids = Tensor::from_iter((0..rows * length).map(|i| 3 + i * i % 47), &Device::Cpu)?;
    let shape = (rows as usize, length as usize);
    Ok((ids.reshape(shape)?, Tensor::ones(shape, DType::U8, &Device::Cpu)?))
}

fn logits(model: &DecoderForCausalLM, pass: Pass) -> Outcome<Tensor> {
    let (ids, mask) = ids(3, 11)?;
    Ok(model.head(&model.hidden(&ids, &mask, None, &pass.into())?, &pass.into())?)
}

/// The loss of the next tokens, and the gradient of every parameter that gets one.
fn gradients(model: &DecoderForCausalLM, params: &Params) -> Outcome<Vec<(String, Tensor)>> {
    let (ids, mask) = ids(3, 11)?;
    let cx = Pass::Train { draw: 1 }.into();
    let hidden = model.hidden(&ids, &mask, None, &cx)?.narrow(1, 0, 10)?.flatten_to(1)?;
    let targets = ids.narrow(1, 1, 10)?.flatten_all()?.to_dtype(DType::I64)?;
    let loss = model.token_loss(&hidden, &targets, &cx)?;
    let grads = loss.backward()?;
    let of = |(name, param): (String, monteclora::Param)| Some((name, grads.get(&param.var)?.clone()));
    let all = params.all().into_iter().filter_map(of);
    Ok(all.chain([("loss".to_string(), loss.detach())]).collect())
}

fn methods() -> Vec<Method> {
    let lora = LoraConfig { rank: 3, alpha: 5.0, dropout: 0.2, ..LoraConfig::default() };
    vec![
        Method::Lora(lora.clone()),
        Method::LoraFa(lora),
        Method::MonteCLoRA(MonteCLoRAConfig { rank: 3, alpha: 5.0, ..MonteCLoRAConfig::default() }),
        Method::Released(MonteCLoRAConfig { rank: 3, alpha: 5.0, ..MonteCLoRAConfig::default() }),
        Method::Blob(BlobConfig { rank: 3, ..BlobConfig::default() }),
        Method::AdaLora(AdaLoraConfig { init_rank: 4, target_rank: 2, ..AdaLoraConfig::default() }),
        Method::Ia3,
        Method::Bottleneck(BottleneckConfig { width: 3 }),
        Method::Prompt(PromptConfig { virtual_tokens: 2 }),
    ]
}

#[test]
fn every_method_trains_on_blocks_as_on_their_numbers() -> Outcome {
    let config = config(96, false)?;
    let tensors = weights(&config)?;
    for method in methods() {
        let name = method.name();
        let load = |blocks: bool| -> Outcome<(DecoderForCausalLM, Params)> {
            let mut model = quantized(&tensors, &config, "q8_0")?;
            if !blocks {
                model = dequantized(model, &tensors)?;
            }
            let params = Params::new(Noise::new(3), &Device::Cpu);
            MethodInit::Fresh(method.clone(), Targets::default()).inject(&mut model, &params)?;
            scatter(&params)?;
            Ok((model, params))
        };
        let ((blocks, params), (numbers, same)) = (load(true)?, load(false)?);
        assert_close(&logits(&blocks, Pass::Mean)?, &logits(&numbers, Pass::Mean)?, 1e-4)?;
        let (got, want) = (gradients(&blocks, &params)?, gradients(&numbers, &same)?);
        assert!(got.len() == want.len() && got.len() > 1, "{name}");
        for ((name, got), (same, want)) in got.iter().zip(&want) {
            assert_eq!(name, same);
            assert_close(got, want, 1e-4).map_err(|e| format!("{name}: {e}"))?;
        }
    }
    Ok(())
}

#[test]
fn what_needs_the_numbers_themselves_says_so() -> Outcome {
    let config = config(96, true)?;
    let tensors = weights(&config)?;
    let mut model = quantized(&tensors, &config, "q8_0")?;
    let params = Params::new(Noise::new(3), &Device::Cpu);
    let dora = MethodInit::Fresh(Method::Dora(LoraConfig::default()), Targets::default());
    let error = dora.inject(&mut model, &params).expect_err("DoRA").to_string();
    assert!(error.contains("quantize") && error.contains("DoRA") && error.contains("q8_0"), "{error}");
    assert!(params.all().is_empty());

    let lora = Method::Lora(LoraConfig { rank: 2, ..LoraConfig::default() });
    MethodInit::Fresh(lora, Targets::default()).inject(&mut model, &params)?;
    scatter(&params)?;
    let error = merge(&mut model).expect_err("merging").to_string();
    assert!(error.contains("merging") && error.contains("q8_0"), "{error}");
    let apart = logits(&model, Pass::Mean)?;
    assert_eq!(merge_dequantized(&mut model)?, 6);
    assert_close(&logits(&model, Pass::Mean)?, &apart, 1e-4)?;
    unmerge(&mut model)?;
    assert_close(&logits(&model, Pass::Mean)?, &apart, 0.0)?;

    let kind: Quantization = "q8_0".parse()?;
    let error = Weights::new(builder(&tensors), kind.source(&builder(&tensors))).into_dense().err();
    assert!(error.is_some_and(|error| error.to_string().contains("full fine-tuning")));
    Ok(())
}

/// A pass is exact for any number of rows, unless it only predicts: then candle's kernels round the input of
/// few rows.
#[test]
fn few_rows_are_rounded_where_a_pass_only_predicts() -> Outcome {
    let config = config(96, true)?;
    let mut model = quantized(&weights(&config)?, &config, "q8_0")?;
    let params = Params::new(Noise::new(3), &Device::Cpu);
    let lora = Method::Lora(LoraConfig { rank: 2, ..LoraConfig::default() });
    MethodInit::Fresh(lora, Targets::default()).inject(&mut model, &params)?;
    scatter(&params)?;
    let xs = Var::randn(0f32, 1.0, (8, 64), &Device::Cpu)?;
    model.visit_linears(&mut |layer| {
        if layer.dims()?.0 != 64 {
            return Ok(());
        }
        let numbers: BaseLinear = layer.base().dequantize()?.into();
        let cx = Context::from(Pass::Mean);
        let want = match layer.active() {
            Some((_, adapter)) => adapter.forward(xs.as_tensor(), &numbers, &cx)?,
            None => numbers.forward_in(xs.as_tensor(), &cx)?,
        };
        let apart = |cx: &Context| -> monteclora::Result<f32> {
            let error = (layer.forward(xs.as_tensor(), cx)?.detach() - want.detach())?;
            let size = |t: &Tensor| t.sqr()?.mean_all()?.to_scalar::<f32>();
            Ok((size(&error)? / size(&want.detach())?).sqrt())
        };
        let (exact, rounded) = (apart(&cx)?, apart(&cx.clone().only_to_predict())?);
        assert!(exact < 1e-6 && (1e-4..0.012).contains(&rounded), "{exact} and {rounded}");
        Ok(())
    })?;
    // The same for the head: only in prediction does a token's score depend on the number of tokens.
    let (few, cx) = (xs.as_detached_tensor(), Context::from(Pass::Mean));
    let many = model.head(&Tensor::cat(&[&few, &few], 0)?, &cx)?.narrow(0, 0, 8)?;
    assert_close(&model.head(&few, &cx.clone().without_gradient())?, &many, 1e-6)?;
    let rounded = (model.head(&few, &cx.only_to_predict())? - many)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(rounded > 1e-4, "{rounded}");
    Ok(())
}

/// Few rows go through kernels that also round their input: texts nearly always equal those of the
/// dequantised model, and here they do.
#[test]
fn a_text_goes_on_as_from_the_numbers() -> Outcome {
    let config = config(96, true)?;
    let tensors = weights(&config)?;
    let blocks = quantized(&tensors, &config, "q8_0")?;
    let numbers = dequantized(quantized(&tensors, &config, "q8_0")?, &tensors)?;
    let settings = GenerateConfig { max_new_tokens: 12, ..GenerateConfig::default() };
    let prompts = [vec![1, 7, 9], vec![1, 30, 12, 4, 44]];
    let say = |model| generate(model, &prompts, &settings, &mut |_, _| true);
    assert_eq!(say(&blocks)?, say(&numbers)?);
    Ok(())
}

#[test]
fn rows_that_no_block_divides_take_smaller_blocks_or_stay() -> Outcome {
    // 64 = 2 * 32, 84 is no multiple of 32, 256 one of 256.
    for (kind, inner, down, up, words) in [
        ("q4k", 256, "q4k", "q5_0", "q8_0"),
        ("Q4_K", 84, "f32", "q5_0", "q8_0"),
        ("q8_0", 84, "f32", "q8_0", "q8_0"),
        ("q2k", 96, "q4_0", "q4_0", "q8_0"),
    ] {
        let config = config(inner, true)?;
        let mut model = quantized(&weights(&config)?, &config, kind)?;
        model.visit_linears(&mut |layer| {
            let want = if layer.path().ends_with("down_proj") { down } else { up };
            assert_eq!(layer.base().kind(), want, "{kind} {}", layer.path());
            Ok(())
        })?;
        let table = model.embedding_mut().ok_or("no embedding")?.words().clone();
        assert!(matches!(table, monteclora::ops::Weight::Quantized(table) if table.kind() == words));
        assert!(logits(&model, Pass::Mean)?.flatten_all()?.to_vec1::<f32>()?.iter().all(|x| x.is_finite()));
    }
    let error = "q9".parse::<Quantization>().expect_err("q9").to_string();
    assert!(error.contains("q8_0") && error.contains("q9"), "{error}");
    Ok(())
}

/// A checkpoint folder with these tensors.
fn folder(tensors: &Tensors) -> Outcome<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("config.json"), "{}")?;
    safetensors::save(tensors, dir.path().join("model.safetensors"))?;
    Ok(dir)
}

fn files(dir: &Path) -> Outcome<ModelFiles> {
    Ok(ModelFiles::locate(&dir.display().to_string(), None)?)
}

/// Against the numbers that bitsandbytes itself reads (`tests/data/make_nf4_golden.py`).
#[test]
fn nf4_is_what_bitsandbytes_reads() -> Outcome {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/nf4_golden.safetensors");
    let golden = safetensors::load(golden, &Device::Cpu)?;
    let of = |tensors: &Tensors| -> Outcome<_> {
        let dir = folder(tensors)?;
        let weights = files(dir.path())?.open_weights(DType::F32, &Device::Cpu)?;
        Ok((dir, weights))
    };
    let (dir, weights) = of(&golden)?;
    for (name, (out_dim, in_dim)) in [("plain", (8, 128)), ("doubled", (96, 192))] {
        let layer = weights.pp(name).linear(in_dim, out_dim, 1.0, false)?;
        assert_eq!((layer.kind(), layer.bytes()), ("nf4".to_string(), out_dim * in_dim * 9 / 16 + 64));
        let want = &golden[&format!("{name}.dequantized")];
        assert_close(layer.dequantize()?.weight(), want, 0.0)?;
        let xs = want.narrow(0, 0, 3)?;
        assert_close(&layer.forward(&xs)?, &xs.matmul(&want.t()?)?, 1e-4)?;
    }
    let error = weights.pp("plain").linear(64, 16, 1.0, false).expect_err("another shape").to_string();
    assert!(error.contains("plain.weight") && error.contains("[8, 128]"), "{error}");
    let again = files(dir.path())?.quantized(Some("q8_0".parse()?));
    let error = again.open_weights(DType::F32, &Device::Cpu).expect_err("twice").to_string();
    assert!(error.contains("quantize") && error.contains("already"), "{error}");

    // Errors name the damaged tensor.
    let state = "plain.weight.quant_state.bitsandbytes__nf4";
    let text = |text: &str| Tensor::new(text.as_bytes(), &Device::Cpu);
    let zeros = |count: usize, dtype| Tensor::zeros(count, dtype, &Device::Cpu);
    let told = |block: usize, kind: &str| {
        text(&json!({"quant_type": kind, "blocksize": block, "shape": [8, 128]}).to_string())
    };
    for (part, put, says) in [
        ("plain.weight.absmax", None, "absmax"),
        ("plain.weight.absmax", Some(zeros(15, DType::F32)?), "expected 16 of F32"),
        ("plain.weight.absmax", Some((zeros(16, DType::F32)? / 0.0)?), "NaN"),
        ("plain.weight.quant_map", Some(zeros(16, DType::F64)?), "F32"),
        ("plain.weight", Some(zeros(511, DType::U8)?), "expected 512 of U8"),
        ("plain.weight", None, "no tensor"),
        (state, Some(text("{")?), "cannot be read"),
        (state, Some(told(0, "nf4")?), "blocks of 0"),
        (state, Some(told(48, "nf4")?), "blocks of 48"),
        (state, Some(told(usize::MAX, "nf4")?), "blocks of"),
        (state, Some(told(64, "fp4")?), "fp4 is not supported"),
    ] {
        let mut tensors = golden.clone();
        tensors.remove(part);
        tensors.extend(put.map(|put| (part.to_string(), put)));
        let (_dir, weights) = of(&tensors)?;
        let error = weights.pp("plain").linear(128, 8, 1.0, false).expect_err(says).to_string();
        assert!(error.contains("plain.weight") && error.contains(says), "{part}: {error}");
    }
    let mut tensors = golden;
    tensors.insert("other.weight.quant_state.bitsandbytes__fp4".to_string(), text("{}")?);
    let error = of(&tensors).err().ok_or("fp4 was read")?.to_string();
    assert!(error.contains("other.weight") && error.contains("fp4"), "{error}");
    Ok(())
}

/// A whole model whose layers are in NF4, with arbitrary codes and scales.
#[test]
fn a_model_in_nf4_loads_trains_and_is_not_merged_into_its_codes() -> Outcome {
    let config = config(128, true)?;
    let mut tensors = weights(&config)?;
    let names: Vec<String> = tensors.keys().filter(|name| name.contains("_proj.weight")).cloned().collect();
    for (i, name) in names.iter().enumerate() {
        let shape = tensors[name].dims().to_vec();
        let numbers: usize = shape.iter().product();
        let codes: Vec<u8> = (0..numbers / 2).map(|at| (at * 73 + i * 31 + at / 7) as u8).collect();
        let scales: Vec<f32> = (0..numbers / 64).map(|at| 0.02 + 0.01 * (at % 5) as f32).collect();
        let values: Vec<f32> = (0..16).map(|code| (code as f32 - 7.0) / 8.0).collect();
        let state =
            json!({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": shape}).to_string();
        for (part, tensor) in [
            ("", Tensor::from_vec(codes, (numbers / 2, 1), &Device::Cpu)?),
            (".absmax", Tensor::new(scales, &Device::Cpu)?),
            (".quant_map", Tensor::new(values, &Device::Cpu)?),
            (".quant_state.bitsandbytes__nf4", Tensor::new(state.as_bytes(), &Device::Cpu)?),
        ] {
            tensors.insert(format!("{name}{part}"), tensor);
        }
    }
    let dir = folder(&tensors)?;
    let files = files(dir.path())?;
    let load = || -> Outcome<_> {
        Ok(DecoderForCausalLM::load(files.open_weights(DType::F32, &Device::Cpu)?, &config, Noise::new(0))?)
    };
    let (mut blocks, numbers) = (load()?, dequantized(load()?, &tensors)?);
    assert_close(&logits(&blocks, Pass::Mean)?, &logits(&numbers, Pass::Mean)?, 1e-4)?;
    let params = Params::new(Noise::new(3), &Device::Cpu);
    let lora = Method::Lora(LoraConfig { rank: 2, ..LoraConfig::default() });
    MethodInit::Fresh(lora, Targets::default()).inject(&mut blocks, &params)?;
    assert_eq!(gradients(&blocks, &params)?.len(), params.all().len() + 1);
    scatter(&params)?;
    let (out, json) = (dir.path().join("merged"), serde_json::Value::Null);
    let error =
        save_merged(&blocks, &params, &files, Some(&json), &out, MAX_SHARD_BYTES).expect_err("merged");
    assert!(error.to_string().contains("4 bits"), "{error}");
    assert!(!out.exists());
    Ok(())
}

/// A quantised encoder whose head stays dense; its adapter is merged into the checkpoint's weights.
#[test]
fn a_classifier_in_blocks_trains_its_head_and_merges_into_the_checkpoint() -> Outcome {
    let whole = files(&asset("tiny-roberta"))?;
    let lora = Method::Lora(LoraConfig { rank: 2, ..LoraConfig::default() });
    let start = MethodInit::Fresh(lora, Targets::default());
    let load = |files: &ModelFiles, start: &MethodInit| {
        Classifier::load(files, 2, start, Noise::new(1), DType::F32, &Device::Cpu)
    };
    let files = whole.clone().quantized(Some("q8_0".parse()?));
    let (classifier, numbers) = (load(&files, &start)?, load(&whole, &start)?);
    classifier.model.visit_linears(&mut |layer| {
        assert_eq!(layer.base().kind(), "q8_0", "{}", layer.path());
        Ok(())
    })?;
    // A resumed run must have the same base.
    let batcher = Batcher::new(2, false, Noise::new(1))?;
    let settings = Classification::new(&classifier, &[], batcher).settings();
    assert_eq!(settings.get("dtype").map(String::as_str), Some("q8_0/f32"));
    let say = |classifier: &Classifier| -> Outcome<Tensor> {
        // Ids from the whole vocabulary.
        let (ids, mask) = ids(2, 11)?;
        let ids = (ids.to_dtype(DType::F32)? * 61.0)?.to_dtype(DType::U32)?;
        Ok(classifier.model.logits(&ids, &ids.zeros_like()?, &mask, &Pass::Mean.into())?)
    };
    let (got, want) = (say(&classifier)?, say(&numbers)?);
    let largest = want.abs()?.max_all()?.to_scalar::<f32>()?;
    assert_close(&got, &want, 0.02 * f64::from(largest))?;
    assert_ne!(got.to_vec2::<f32>()?, want.to_vec2::<f32>()?, "nothing was rounded");
    scatter(&classifier.params)?;
    scatter(&numbers.params)?;
    let out = tempfile::tempdir()?;
    let out = out.path().join("model");
    check_merged(&*classifier.model, &classifier.params, &files, &out)?;
    save_merged(&*classifier.model, &classifier.params, &files, None, &out, MAX_SHARD_BYTES)?;
    let again = Classifier::open(&out, None, DType::F32, &Device::Cpu)?;
    let plain = out.with_file_name("plain");
    save_merged(&*numbers.model, &numbers.params, &whole, None, &plain, MAX_SHARD_BYTES)?;
    let plain = Classifier::open(&plain, None, DType::F32, &Device::Cpu)?;
    // The adapter was merged into the checkpoint's weights, not into the quantised ones.
    assert_close(&say(&again)?, &say(&plain)?, 0.0)?;

    let full = MethodInit::Fresh(Method::Full, Targets::default());
    let error = load(&files, &full).expect_err("full fine-tuning").to_string();
    assert!(error.contains("quantize") && error.contains("full fine-tuning"), "{error}");
    Ok(())
}
