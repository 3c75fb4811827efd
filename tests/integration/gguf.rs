//! Models are written to GGUF and read again.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{AdaptableModel, Role};
use monteclora::adapters::LoraConfig;
use monteclora::data::tokenizer;
use monteclora::inject::{self, Targets, DEFAULT_ADAPTER};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::gguf::{write_adapter, GgufKind};
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::{check_merged_gguf, save_gguf, save_merged_gguf};
use monteclora::peft::{AdapterFile, AdapterMetadata, AdapterMethod};
use monteclora::{Context, MonteCLoRAConfig, Noise, Params, Pass};
use serde_json::{json, Value};

use crate::support::{assert_close, asset, scatter, Outcome};

pub const TEXT: &str =
    "Once upon a time, there was a little girl named Lily.\nShe had 27 caf\u{e9}s \u{1f600}!";
/// The token that begins a text, and some words.
pub const IDS: [u32; 12] = [1, 403, 407, 261, 378, 432, 317, 286, 261, 376, 268, 414];

pub fn locate(path: &Path) -> Outcome<ModelFiles> {
    Ok(ModelFiles::locate(path.to_str().ok_or("a path of Unicode")?, None)?)
}

pub fn load(files: &ModelFiles) -> Outcome<DecoderForCausalLM> {
    let weights = files.open_weights(DType::F32, &Device::Cpu)?;
    Ok(DecoderForCausalLM::load(weights, &DecoderConfig::from_files(files)?, Noise::new(0))?)
}

/// The logits at all positions of [`IDS`], `(t, vocab)`.
pub fn logits(model: &DecoderForCausalLM) -> Outcome<Tensor> {
    logits_of(model, &IDS, &Pass::Mean.into())
}

/// The logits at all positions of `ids`, `(t, vocab)`.
pub fn logits_of(model: &DecoderForCausalLM, ids: &[u32], cx: &Context) -> Outcome<Tensor> {
    let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
    Ok(model.logits(&ids, &ids.ones_like()?.to_dtype(DType::U8)?, cx)?.squeeze(0)?)
}

/// Adds adapters in general position to the default targets; returns their parameters and their file.
pub fn adapted(
    model: &mut DecoderForCausalLM,
    monteclora: bool,
    rslora: bool,
) -> Outcome<(Params, AdapterFile)> {
    let params = Params::new(Noise::new(7), &Device::Cpu);
    let targets = Targets::default();
    let method = if monteclora {
        let config = MonteCLoRAConfig { rank: 4, alpha: 6.0, ..MonteCLoRAConfig::default() };
        inject::monteclora(model, &targets, &config, &params)?;
        AdapterMethod::MonteCLoRA(config)
    } else {
        let config = LoraConfig { rank: 4, alpha: 6.0, use_rslora: rslora, ..LoraConfig::default() };
        inject::lora(model, &targets, &config, &params)?;
        AdapterMethod::Lora(config)
    };
    scatter(&params)?;
    let file =
        AdapterFile::from_model(model, DEFAULT_ADAPTER, &params, &method, &AdapterMetadata::default())?;
    Ok((params, file))
}

#[test]
fn a_model_in_single_precision_comes_back_to_the_bit() -> Outcome {
    let dir = asset("stories260k");
    let folder = tempfile::tempdir()?;
    let (source, path) = (locate(&dir)?, folder.path().join("model.gguf"));
    save_gguf(&source, &path, GgufKind::F32)?;
    let back = locate(&path)?;
    let (ours, theirs) =
        (logits(&load(&source)?)?.to_vec2::<f32>()?, logits(&load(&back)?)?.to_vec2::<f32>()?);
    assert!(ours == theirs, "q and k among them");

    let (config, again) = (source.config()?, back.config()?);
    for key in
        ["vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_theta", "eos_token_id"]
    {
        assert_eq!(config[key], again[key], "{key}");
    }
    let (ours, theirs) = (tokenizer::of_model(&source)?, tokenizer::of_model(&back)?);
    for text in [TEXT, "", " two  spaces ", "</s> <s>x"] {
        let ids = |of: &tokenizers::Tokenizer| {
            Ok::<_, tokenizers::Error>(of.encode(text, true)?.get_ids().to_vec())
        };
        let (ours, theirs) =
            (ids(&ours).map_err(|e| e.to_string())?, ids(&theirs).map_err(|e| e.to_string())?);
        assert_eq!(ours, theirs, "{text:?}");
    }
    let error = save_gguf(&source, &path, GgufKind::F32).unwrap_err().to_string();
    assert!(error.contains("model.gguf: it exists"), "{error}");
    Ok(())
}

/// A toy configuration of each family that can be written to GGUF; windows, caps and factors have an effect.
pub fn families() -> Vec<Value> {
    let toy = |model_type: &str, more: Value| {
        let mut config = json!({
            "model_type": model_type, "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128, "rope_theta": 100.0, "tie_word_embeddings": false, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0,
        });
        let (fields, more) = (config.as_object_mut(), more.as_object().cloned());
        fields.into_iter().for_each(|fields| fields.extend(more.clone().unwrap_or_default()));
        config
    };
    let gemma = json!({
        "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": true,
    });
    let with = |mut base: Value, key: &str, value: Value| {
        base[key] = value;
        base
    };
    let factors = json!([1.0, 1.5]);
    vec![
        toy(
            "llama",
            json!({"tie_word_embeddings": true, "attention_bias": true, "rope_scaling": {"rope_type": "llama3",
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
        ),
        toy("mistral", json!({"head_dim": 16, "sliding_window": null})),
        toy(
            "smollm3",
            json!({"num_hidden_layers": 5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ),
        toy(
            "qwen2",
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
            "attention_factor": 1.138_629_4, "original_max_position_embeddings": 32}}),
        ),
        toy("qwen3", json!({"head_dim": 16})),
        toy(
            "phi3",
            json!({"partial_rotary_factor": 0.5, "original_max_position_embeddings": 4096,
            "max_position_embeddings": 8192, "sliding_window": null,
            "rope_scaling": {"type": "longrope", "short_factor": factors, "long_factor": [2.0, 3.0]}}),
        ),
        toy(
            "gemma2",
            with(
                with(gemma.clone(), "attn_logit_softcapping", json!(3.0)),
                "final_logit_softcapping",
                json!(2.0),
            ),
        ),
        toy(
            "gemma3_text",
            with(
                with(with(gemma, "num_hidden_layers", json!(7)), "rope_local_base_freq", json!(30.0)),
                "rope_scaling",
                json!({"rope_type": "linear", "factor": 8.0}),
            ),
        ),
    ]
}

/// A folder with a model of this configuration in general position, and the tokenizer of stories260K.
pub fn toy_folder(config: &Value, assets: &Path) -> Outcome<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let params = Params::new(Noise::new(5), &Device::Cpu);
    let vb = params.var_builder(None, Role::Base);
    DecoderForCausalLM::load(vb, &DecoderConfig::from_value(config.clone())?, Noise::new(0))?;
    scatter(&params)?;
    let all = params.all().into_iter();
    let tensors = all.map(|(name, param)| (name, param.var.as_detached_tensor()));
    let tensors: HashMap<String, Tensor> = tensors.collect();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    std::fs::write(folder.path().join("config.json"), config.to_string())?;
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(assets.join(name), folder.path().join(name))?;
    }
    Ok(folder)
}

#[test]
fn a_file_of_llama_cpps_converter_is_read_as_transformers_reads_it() -> Outcome {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let golden = candle_core::safetensors::load(data.join("gguf_golden.safetensors"), &Device::Cpu)?;
    let files = locate(&data.join("gguf_golden.gguf"))?;
    let config = files.config()?;
    assert_eq!(config["rope_scaling"]["rope_type"], "llama3");
    assert_eq!(config["rope_scaling"]["factor"], 32.0);
    assert_eq!(golden["input_ids"].to_vec1::<i64>()?, IDS.map(i64::from));
    let vb = files.var_builder(DType::F32, &Device::Cpu)?;
    let dense = DecoderForCausalLM::load(vb, &DecoderConfig::from_files(&files)?, Noise::new(0))?;
    assert_close(&logits(&dense)?, &golden["logits"], 2e-5)?;
    // Outside of text generation products dequantise the weight block by block and do not round their input.
    assert_close(&logits(&load(&files)?)?, &golden["logits"], 2e-5)?;
    assert_eq!(tokenizer::of_model(&files)?.encode("", true).map_err(|e| e.to_string())?.get_ids()[0], 1);
    Ok(())
}

#[test]
fn every_family_comes_back() -> Outcome {
    let assets = asset("stories260k");
    for config in families() {
        let folder = toy_folder(&config, &assets)?;
        let (source, path) = (locate(folder.path())?, folder.path().join("model.gguf"));
        save_gguf(&source, &path, GgufKind::F32)?;
        let (ours, theirs) = (logits(&load(&source)?)?, logits(&load(&locate(&path)?)?)?);
        let worst = (&ours - &theirs)?.abs()?.max_all()?.to_scalar::<f32>()?;
        let scale = ours.abs()?.max_all()?.to_scalar::<f32>()?;
        println!("{}: {worst:.1e} of {scale:.1}", config["model_type"]);
        // llama.cpp's converter adds one to all of Gemma's norms.
        let (_, tensors) = raw(&path)?;
        let weights = candle_core::safetensors::load(folder.path().join("model.safetensors"), &Device::Cpu)?;
        let gemma = config["model_type"].as_str().is_some_and(|family| family.starts_with("gemma"));
        for (ours, theirs) in
            [("model.norm", "output_norm"), ("model.layers.1.input_layernorm", "blk.1.attn_norm")]
        {
            let expected = (&weights[&format!("{ours}.weight")] + f64::from(u8::from(gemma)))?;
            assert_close(&tensors[&format!("{theirs}.weight")], &expected, 0.0)?;
        }
        assert!(worst <= 2e-5 * scale, "{config}: {worst} of {scale}");
    }
    Ok(())
}

/// The contents of a GGUF file by candle's own reader, and its dequantised tensors by their GGUF names.
pub fn raw(path: &Path) -> Outcome<(Content, HashMap<String, Tensor>)> {
    let mut file = std::fs::File::open(path)?;
    let content = Content::read(&mut file)?;
    let mut tensors = HashMap::new();
    for name in content.tensor_infos.keys() {
        let tensor = content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        tensors.insert(name.clone(), tensor);
    }
    Ok((content, tensors))
}

#[test]
fn base_and_adapter_in_a_file_each_are_the_merged_file() -> Outcome {
    let assets = asset("stories260k");
    for (config, rslora) in families().into_iter().zip([true, false].into_iter().cycle()) {
        let folder = toy_folder(&config, &assets)?;
        let at = |name: &str| folder.path().join(name);
        let source = locate(folder.path())?;
        let mut model = load(&source)?;
        save_gguf(&source, &at("base.gguf"), GgufKind::F32)?;
        let (params, mut file) = adapted(&mut model, false, rslora)?;
        save_merged_gguf(&model, &params, &source, &at("merged.gguf"), GgufKind::F32)?;
        // Another alpha for one layer, which llama.cpp's format cannot store.
        let paths: Vec<String> = file.layers.keys().cloned().collect();
        let first = paths.first().ok_or("a layer")?;
        file.config.alpha_pattern = vec![(first.clone(), 2.0 * file.config.lora_alpha)];
        if let Some(layer) = file.layers.get_mut(first) {
            layer.b = (&layer.b * 0.5)?;
        }
        write_adapter(&file, &source.config()?, &at("adapter.gguf"))?;
        let (base, merged) = (raw(&at("base.gguf"))?.1, raw(&at("merged.gguf"))?.1);
        let (content, adapter) = raw(&at("adapter.gguf"))?;
        let alpha = content.metadata["adapter.lora.alpha"].to_f32()?;
        let mut changed = 0;
        for (name, merged) in &merged {
            let mut expected = base[name].clone();
            if let (Some(a), Some(b)) =
                (adapter.get(&format!("{name}.lora_a")), adapter.get(&format!("{name}.lora_b")))
            {
                expected = (expected + (b.matmul(a)? * (f64::from(alpha) / a.dim(0)? as f64))?)?;
                changed += 1;
            }
            assert_close(merged, &expected, 1e-5)?;
        }
        assert_eq!((changed, 2 * changed), (paths.len(), adapter.len()), "{config}");
    }
    Ok(())
}

#[test]
fn an_adapter_is_merged_into_a_base_in_gguf() -> Outcome {
    let assets = asset("stories260k");
    for config in families() {
        let folder = toy_folder(&config, &assets)?;
        let at = |name: &str| folder.path().join(name);
        save_gguf(&locate(folder.path())?, &at("base.gguf"), GgufKind::F16)?;
        std::fs::remove_file(at("tokenizer.json"))?;
        let source = locate(&at("base.gguf"))?;
        let mut model = load(&source)?;
        let error = save_merged_gguf(
            &model,
            &Params::new(Noise::new(1), &Device::Cpu),
            &source,
            &at("x.gguf"),
            GgufKind::F32,
        );
        assert!(error.unwrap_err().to_string().contains("no layer has an active adapter"));
        let (params, _) = adapted(&mut model, true, false)?;
        check_merged_gguf(&model, &params, &source, &at("merged.gguf"))?;
        save_merged_gguf(&model, &params, &source, &at("merged.gguf"), GgufKind::F32)?;
        let merged = locate(&at("merged.gguf"))?;
        assert_close(&logits(&load(&merged)?)?, &logits(&model)?, 2e-5)?;
        let pieces = |files: &ModelFiles| -> Outcome<Vec<u32>> {
            let tokenizer = tokenizer::of_model(files)?;
            Ok(tokenizer.encode(TEXT, true).map_err(|e| e.to_string())?.get_ids().to_vec())
        };
        assert_eq!(pieces(&merged)?, pieces(&source)?);
    }
    Ok(())
}

#[test]
fn what_llama_cpp_would_compute_otherwise_is_refused() -> Outcome {
    let assets = asset("stories260k");
    let mut families = families();
    let gemma3 = families.pop().ok_or("gemma 3")?;
    let gemma2 = families.pop().ok_or("gemma 2")?;
    for (mut config, key, value) in [
        (gemma2.clone(), "query_pre_attn_scalar", json!(5)),
        (gemma2.clone(), "attn_logit_softcapping", Value::Null),
        (gemma2, "layer_types", json!(["full_attention", "sliding_attention"])),
        (gemma3, "sliding_window_pattern", json!(2)),
        (families[2].clone(), "no_rope_layers", json!([1, 1, 0, 1, 1])),
        (families[2].clone(), "no_rope_layer_interval", json!(3)),
        (
            families[4].clone(),
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}),
        ),
        (
            families[3].clone(),
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0,
            "original_max_position_embeddings": 32}),
        ),
        (
            families[3].clone(),
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 3.0,
            "original_max_position_embeddings": 32}),
        ),
    ] {
        config[key] = value;
        let folder = toy_folder(&config, &assets)?;
        let path = folder.path().join("model.gguf");
        let error = save_gguf(&locate(folder.path())?, &path, GgufKind::F32).unwrap_err().to_string();
        assert!(error.starts_with(&format!("invalid {key}: ")) && !path.exists(), "{key}: {error}");
    }
    Ok(())
}

#[test]
fn what_a_config_leaves_out_is_written_as_the_model_has_it() -> Outcome {
    let assets = asset("stories260k");
    let families = families();
    let of = |model_type: &str| {
        let family = families.iter().find(|config| config["model_type"] == model_type);
        family.cloned().ok_or_else(|| format!("no {model_type}"))
    };
    let without = |mut config: Value, names: &[&str]| {
        for name in names {
            config.as_object_mut().and_then(|fields| fields.remove(*name));
        }
        config
    };
    let mut open = of("gemma2")?;
    open["sliding_window"] = Value::Null;
    open["layer_types"] = json!(["full_attention", "full_attention"]);
    for config in [
        without(of("smollm3")?, &["rope_theta", "tie_word_embeddings"]),
        without(of("gemma3_text")?, &["sliding_window", "rope_theta"]),
        without(of("gemma2")?, &["tie_word_embeddings", "final_logit_softcapping"]),
    ] {
        let folder = toy_folder(&config, &assets)?;
        let path = folder.path().join("model.gguf");
        save_gguf(&locate(folder.path())?, &path, GgufKind::F32)?;
        let (ours, theirs) = (
            DecoderConfig::from_files(&locate(folder.path())?)?,
            DecoderConfig::from_files(&locate(&path)?)?,
        );
        assert_eq!((&ours.rotary, &ours.local_rotary), (&theirs.rotary, &theirs.local_rotary));
        assert_eq!((&ours.layers, ours.logit_cap), (&theirs.layers, theirs.logit_cap));
        assert_eq!(ours.tie_word_embeddings, theirs.tie_word_embeddings);
    }
    let folder = toy_folder(&open, &assets)?;
    let path = folder.path().join("model.gguf");
    save_gguf(&locate(folder.path())?, &path, GgufKind::F32)?;
    assert_eq!(locate(&path)?.config()?["sliding_window"], 128, "as long as the longest text");
    Ok(())
}

#[test]
fn quantised_matrices_stay_so_and_compute_what_their_numbers_do() -> Outcome {
    let dir = asset("stories260k");
    let folder = tempfile::tempdir()?;
    for (kind, kinds) in [(GgufKind::Q8_0, vec!["f32", "q8_0"]), (GgufKind::Q4K, vec!["f32", "q5_0"])] {
        let path = folder.path().join(format!("{kind:?}.gguf"));
        save_gguf(&locate(&dir)?, &path, kind)?;
        let files = locate(&path)?;
        let model = load(&files)?;
        let mut found = std::collections::BTreeSet::new();
        model.visit_linears(&mut |layer| {
            found.insert(layer.base().kind());
            Ok(())
        })?;
        // The width of `down_proj`, 172, is not a multiple of any block size.
        assert_eq!(found.iter().collect::<Vec<_>>(), kinds.iter().collect::<Vec<_>>());
        let vb = files.var_builder(DType::F32, &Device::Cpu)?;
        let dense = DecoderForCausalLM::load(vb, &DecoderConfig::from_files(&files)?, Noise::new(0))?;
        // A wide tolerance: only in text generation do few rows go through candle's kernels, which also
        // quantise their input.
        let scale = logits(&dense)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert_close(&logits(&model)?, &logits(&dense)?, 0.02 * f64::from(scale))?;
    }
    Ok(())
}

#[test]
fn what_llama_cpp_cannot_load_is_refused_by_name() -> Outcome {
    let dir = asset("stories260k");
    let folder = tempfile::tempdir()?;
    let source = locate(&dir)?;
    let (_, mut file) = adapted(&mut load(&source)?, false, false)?;
    let config = source.config()?;
    let path = folder.path().join("adapter.gguf");
    let write =
        |file: &AdapterFile, config: &Value| write_adapter(file, config, &path).unwrap_err().to_string();
    let other = json!({"model_type": "roberta"});
    assert!(write(&file, &other).contains("expected mistral or one of llama"), "{}", write(&file, &other));
    let images = json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}});
    assert!(
        write(&file, &images).contains("text-only checkpoints (gemma3_text)"),
        "{}",
        write(&file, &images)
    );
    let layer = file.layers.values().next().cloned().ok_or("a layer")?;
    file.layers.insert("lm_head".into(), layer);
    file.config.target_modules = None;
    let names = file.layers.keys().cloned().collect();
    file.config.target_modules = Some(monteclora::peft::TargetModules::Names(names));
    let mut unsaid = config.clone();
    unsaid["model_type"] = json!("smollm3");
    unsaid.as_object_mut().and_then(|fields| fields.remove("tie_word_embeddings"));
    for config in [config, unsaid] {
        let error = write(&file, &config);
        assert!(error.contains("leave lm_head out of the targets"), "{error}");
    }
    assert!(!path.exists());
    Ok(())
}
