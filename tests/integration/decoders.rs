//! Tests of the decoder families after LLaMA against Hugging Face transformers (golden values of
//! `tests/data/make_decoders_golden.py`), and of cache, gradients and adapters for consistency.

use std::collections::HashMap;

use crate::gradients::check;
use crate::support::{assert_close, data, scatter, vb, Outcome};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use monteclora::adapter::{AdaptableModel, Context, Params, Pass, Role};
use monteclora::adapters::LoraConfig;
use monteclora::inject::merge::merge;
use monteclora::inject::{self, Select, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{
    Activation, DecoderConfig, DecoderForCausalLM, DecoderForSequenceClassification, Positions, RotaryScaling,
};
use monteclora::noise::Noise;
use monteclora::ops::OpPath;
use monteclora::peft::{AdapterFile, AdapterMetadata, AdapterMethod};
use monteclora::{MonteCLoRAConfig, Regularizer};
use serde_json::{json, Value};

pub const FAMILIES: [&str; 7] = ["qwen2", "qwen3", "mistral", "smollm3", "phi3", "gemma2", "gemma3_text"];

/// The configuration of a toy model of this family.
pub fn toy_json(family: &str) -> Outcome<Value> {
    Ok(serde_json::from_str(&std::fs::read_to_string(data(&format!("decoders/{family}.json")))?)?)
}

pub struct Golden {
    pub tensors: HashMap<String, Tensor>,
    pub config: DecoderConfig,
}

impl Golden {
    pub fn open(family: &str) -> Outcome<Self> {
        let weights = data(&format!("decoders/{family}.safetensors"));
        let tensors = candle_core::safetensors::load(weights, &Device::Cpu)?;
        Ok(Self { tensors, config: DecoderConfig::from_file(&data(&format!("decoders/{family}.json")))? })
    }

    fn model(&self, dtype: DType) -> Outcome<DecoderForCausalLM> {
        Ok(DecoderForCausalLM::load(vb(&self.tensors, dtype), &self.config, Noise::new(0))?)
    }

    /// Ids and attention mask, padded on one side.
    pub fn inputs(&self, side: &str) -> Outcome<(Tensor, Tensor)> {
        let ids = self.tensors[&format!("{side}input_ids")].to_dtype(DType::U32)?;
        Ok((ids, self.tensors[&format!("{side}attention_mask")].to_dtype(DType::U8)?))
    }

    /// The largest difference from the golden logits over real tokens; `logits` begin at column `first`.
    fn difference(&self, logits: &Tensor, side: &str, first: usize) -> Outcome<f64> {
        let count = logits.dim(1)?;
        let part = |t: &Tensor| t.narrow(1, first, count);
        let real = part(&self.inputs(side)?.1)?.unsqueeze(2)?.to_dtype(DType::F64)?;
        let expected = part(&self.tensors[&format!("{side}logits")])?.to_dtype(DType::F64)?;
        let difference = (logits.to_dtype(DType::F64)? - expected)?.broadcast_mul(&real)?;
        Ok(difference.abs()?.max_all()?.to_scalar::<f64>()?)
    }
}

#[test]
fn logits_are_those_of_transformers_with_padding_on_either_side() -> Outcome {
    for family in FAMILIES {
        let golden = Golden::open(family)?;
        // Angles are in single precision for every dtype, so the frequencies differ in the last digit.
        for (dtype, tolerance) in [DType::F32, DType::F64].map(|dtype| (dtype, 5e-5)) {
            let model = golden.model(dtype)?;
            let mut worst = 0f64;
            for (side, path) in
                ["", "left_"].into_iter().flat_map(|side| OpPath::ALL.map(|path| (side, path)))
            {
                let (ids, mask) = golden.inputs(side)?;
                let logits = model.logits(&ids, &mask, &Context::from(Pass::Mean).with_path(path))?;
                worst = worst.max(golden.difference(&logits, side, 0)?);
            }
            println!("{family} {dtype:?}: {worst:.1e}");
            assert!(worst < tolerance, "{family} {dtype:?}: {worst}");
            // A text within the original context, and shorter than some windows.
            let ids = golden.inputs("")?.0.narrow(0, 0, 1)?.narrow(1, 0, 6)?;
            let logits = model.logits(&ids, &ids.ones_like()?.to_dtype(DType::U8)?, &Pass::Mean.into())?;
            assert_close(&logits, &golden.tensors["short_logits"].to_dtype(dtype)?, tolerance)?;
        }
    }
    Ok(())
}

type Switch = fn(&mut DecoderConfig);

#[test]
fn no_switch_can_be_turned_unseen() -> Outcome {
    let wider: Switch =
        |c| c.layers.iter_mut().for_each(|layer| layer.window = layer.window.map(|size| size + 1));
    let unscaled: Switch = |c| c.rotary.scaling = RotaryScaling::None;
    let no_qk_norm: Switch = |c| c.qk_norm = false;
    let no_qkv_bias: Switch = |c| c.qkv_bias = false;
    let everywhere: Switch = |c| c.layers.iter_mut().for_each(|layer| layer.positions = Positions::Global);
    let plain_scale: Switch = |c| c.attention_scale = 8f64.sqrt().recip();
    let faults: [(&str, &[Switch]); 7] = [
        ("qwen2", &[wider, unscaled, no_qkv_bias]),
        ("qwen3", &[no_qk_norm, |c| c.rotary.theta = 1e4]),
        ("mistral", &[wider, unscaled]),
        ("smollm3", &[everywhere, no_qkv_bias, |c| c.o_bias = false, |c| c.mlp_bias = false]),
        ("phi3", &[wider, unscaled]),
        (
            "gemma2",
            &[
                wider,
                plain_scale,
                |c| c.o_bias = false,
                |c| c.attention_cap = None,
                |c| c.logit_cap = None,
                |c| c.norm_offset = false,
                |c| c.embedding_scale = None,
                |c| c.activation = Activation::Silu,
            ],
        ),
        ("gemma3_text", &[wider, plain_scale, everywhere, unscaled, no_qk_norm]),
    ];
    for (family, faults) in faults {
        let golden = Golden::open(family)?;
        let (ids, mask) = golden.inputs("")?;
        for (i, fault) in faults.iter().enumerate() {
            let mut config = golden.config.clone();
            fault(&mut config);
            let model = DecoderForCausalLM::load(vb(&golden.tensors, DType::F32), &config, Noise::new(0))?;
            let moved = golden.difference(&model.logits(&ids, &mask, &Pass::Mean.into())?, "", 0)?;
            assert!(moved > 1e-2, "{family}, fault {i}: {moved}");
        }
    }
    Ok(())
}

#[test]
fn a_cache_changes_no_logit() -> Outcome {
    for family in FAMILIES {
        let golden = Golden::open(family)?;
        let model = golden.model(DType::F32)?;
        let token_by_token: Vec<usize> = vec![1; 24];
        let mut worst = 0f64;
        for (side, pieces) in ["", "left_"].into_iter().flat_map(|side| {
            [vec![24], vec![7, 1, 9, 7], token_by_token.clone()].map(|pieces| (side, pieces))
        }) {
            let (ids, mask) = golden.inputs(side)?;
            let (mut cache, mut first) = (model.cache(24), 0);
            for count in pieces {
                let (new, seen) = (ids.narrow(1, first, count)?, mask.narrow(1, 0, first + count)?);
                let hidden = model.hidden(&new, &seen, Some(&mut cache), &Pass::Mean.into())?;
                let logits = model.head(&hidden, &Pass::Mean.into())?;
                worst = worst.max(golden.difference(&logits, side, first)?);
                first += count;
            }
        }
        println!("{family} with a cache: {worst:.1e}");
        assert!(worst < 5e-5, "{family}: {worst}");
    }
    Ok(())
}

#[test]
fn a_cache_begun_for_a_short_text_does_not_become_one_of_a_long_one() -> Outcome {
    let golden = Golden::open("phi3")?;
    let model = golden.model(DType::F32)?;
    let (ids, mask) = golden.inputs("")?;
    // LongRoPE changes its factors at 16 tokens; up to there the cache may grow.
    let mut cache = model.cache(6);
    let mut push = |first: usize, count: usize| {
        let (new, seen) = (ids.narrow(1, first, count)?, mask.narrow(1, 0, first + count)?);
        model.hidden(&new, &seen, Some(&mut cache), &Pass::Mean.into())
    };
    push(0, 8)?;
    push(8, 8)?;
    let error = push(16, 1).unwrap_err().to_string();
    assert!(error.contains("cache") && error.contains("17 tokens") && error.contains("room"), "{error}");
    Ok(())
}

#[test]
fn loss_and_gradients_are_those_of_transformers() -> Outcome {
    for family in FAMILIES {
        let golden = Golden::open(family)?;
        let params = Params::new(Noise::new(0), &Device::Cpu);
        let vb = params.var_builder(Some(vb(&golden.tensors, DType::F32)), Role::Base);
        let model = DecoderForCausalLM::load(vb, &golden.config, Noise::new(0))?;
        let (ids, mask) = golden.inputs("")?;
        let t = ids.dim(1)?;
        let labels = golden.tensors["labels"].narrow(1, 1, t - 1)?.flatten_all()?;
        for path in OpPath::ALL {
            let cx = Context::from(Pass::Mean).with_path(path);
            let hidden = model.hidden(&ids, &mask, None, &cx)?;
            let hidden = hidden.narrow(1, 0, t - 1)?.contiguous()?.flatten_to(1)?;
            let loss = model.token_loss(&hidden, &labels, &cx)?;
            assert_close(&loss, &golden.tensors["loss"].squeeze(0)?, 2e-5)?;
            let (grads, mut compared) = (loss.backward()?, 0);
            for (name, expected) in &golden.tensors {
                let Some(name) = name.strip_prefix("grad.") else { continue };
                let param = params.get(name).ok_or_else(|| format!("no parameter {name}"))?;
                let grad = grads.get(&param.var).ok_or_else(|| format!("{name} has no gradient"))?;
                let largest = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                assert_close(grad, expected, 5e-5 * f64::from(largest.max(1.0)))?;
                compared += 1;
            }
            assert!(compared >= 3, "{family}: {compared} gradients");
        }
    }
    Ok(())
}

#[test]
fn the_classifier_gives_the_logits_of_transformers() -> Outcome {
    for family in FAMILIES {
        let golden = Golden::open(family)?;
        let (ids, mask) = golden.inputs("")?;
        let (vb, config) = (vb(&golden.tensors, DType::F32), &golden.config);
        let model = DecoderForSequenceClassification::load(vb.clone(), vb, config, Noise::new(0))?;
        assert_eq!(config.num_labels, 3);
        assert_close(&model.forward(&ids, &mask, &Pass::Mean.into())?, &golden.tensors["cls_logits"], 5e-5)?;
    }
    Ok(())
}

#[test]
fn the_text_of_a_model_that_sees_images_is_found_in_it() -> Outcome {
    let golden = Golden::open("gemma3_text")?;
    let expected = golden.model(DType::F32)?;
    let (ids, mask) = golden.inputs("")?;
    let expected = expected.logits(&ids, &mask, &Pass::Mean.into())?;
    let mut text = toy_json("gemma3_text")?;
    // Such files leave out fields with the default value of their class.
    for absent in ["tie_word_embeddings", "id2label", "label2id"] {
        text.as_object_mut().ok_or("an object")?.remove(absent);
    }
    let labels = json!({"0": "a", "1": "b", "2": "c", "3": "d"});
    let whole = json!({"model_type": "gemma3", "text_config": text, "vision_config": {}, "id2label": labels});
    let config = DecoderConfig::from_value(whole)?;
    assert_eq!((config.num_labels, config.class_name("ForCausalLM").as_str()), (4, "Gemma3ForCausalLM"));
    let (mut models, mut logits) = (Vec::new(), Vec::new());
    for prefix in ["model.language_model", "language_model.model"] {
        let renamed = golden.tensors.iter().filter_map(|(name, tensor)| {
            Some((format!("{prefix}.{}", name.strip_prefix("model.")?), tensor.clone()))
        });
        let vb = VarBuilder::from_tensors(renamed.collect(), DType::F32, &Device::Cpu);
        let model = DecoderForCausalLM::load(vb, &config, Noise::new(0))?;
        assert_close(&model.logits(&ids, &mask, &Pass::Mean.into())?, &expected, 0.0)?;
        let mut paths = Vec::new();
        model.visit_linears(&mut |layer| {
            paths.push(layer.path().to_string());
            Ok(())
        })?;
        assert_eq!(paths[0], format!("{prefix}.layers.0.self_attn.q_proj"));
        models.push(model);
    }
    // An adapter of either model can be applied to the other.
    let (lora, mut files) = (LoraConfig { rank: 2, ..LoraConfig::default() }, Vec::new());
    let select = Select::Regex(r".*layers\.0\.self_attn\.[qv]_proj".to_string());
    let targets = Targets { select, ..Targets::default() };
    let method = AdapterMethod::Lora(lora.clone());
    for model in &mut models {
        let params = Params::new(Noise::new(3), &Device::Cpu);
        inject::lora(model, &targets, &lora, &params)?;
        scatter(&params)?;
        files.push(AdapterFile::from_model(model, "default", &params, &method, &AdapterMetadata::default())?);
        logits.push(model.logits(&ids, &mask, &Pass::Mean.into())?);
        inject::activate::remove(model, "default", &params)?;
    }
    for (model, (file, expected)) in models.iter_mut().rev().zip(files.iter().zip(&logits)) {
        let params = Params::new(Noise::new(3), &Device::Cpu);
        file.apply(model, "default", &params)?;
        assert_close(&model.logits(&ids, &mask, &Pass::Mean.into())?, expected, 1e-6)?;
    }
    Ok(())
}

/// A model with random weights in general position, all of them trainable with `Role::Base`, else none.
fn random(json: Value, role: Role, dtype: DType) -> Outcome<(DecoderForCausalLM, Params)> {
    let config = DecoderConfig::from_value(json)?;
    let all = Params::with_dtype(Noise::new(5), dtype, &Device::Cpu);
    let model = DecoderForCausalLM::load(all.var_builder(None, Role::Base), &config, Noise::new(0))?;
    scatter(&all)?;
    if role == Role::Base {
        return Ok((model, all));
    }
    let weights = all.all().into_iter().map(|(name, param)| (name, param.var.as_detached_tensor())).collect();
    let vb = VarBuilder::from_tensors(weights, dtype, &Device::Cpu);
    let params = Params::with_dtype(Noise::new(6), dtype, &Device::Cpu);
    Ok((DecoderForCausalLM::load(vb, &config, Noise::new(0))?, params))
}

/// Ids, mask and labels of two rows, the second padded on the left; they are longer than the windows and than
/// LongRoPE's original context.
fn rows() -> Outcome<(Tensor, Tensor, Tensor)> {
    let ids = Tensor::from_iter((0..36u32).map(|i| 3 + (i * 7) % 31), &Device::Cpu)?.reshape((2, 18))?;
    let mask = Tensor::from_iter((0..36).map(|i| u8::from(!(18..23).contains(&i))), &Device::Cpu)?
        .reshape((2, 18))?;
    let next =
        Tensor::from_iter((0..36i64).map(|i| if i % 5 == 0 { -100 } else { (i * 11) % 40 }), &Device::Cpu)?;
    Ok((ids, mask, next))
}

fn loss(model: &DecoderForCausalLM, pass: Pass) -> Outcome<Tensor> {
    let (ids, mask, next) = rows()?;
    let hidden = model.hidden(&ids, &mask, None, &pass.into())?.flatten_to(1)?;
    Ok(model.token_loss(&hidden, &next, &pass.into())?)
}

#[test]
fn every_weight_of_every_family_is_differentiated() -> Outcome {
    for family in FAMILIES {
        let mut json = toy_json(family)?;
        json["attention_dropout"] = 0.1.into();
        let (model, params) = random(json, Role::Base, DType::F64)?;
        check(&params, || loss(&model, Pass::Train { draw: 4 }))?;
    }
    Ok(())
}

#[test]
fn adapters_train_on_a_frozen_base_and_merge() -> Outcome {
    for (family, layers, default) in [("qwen3", 7, 3), ("phi3", 4, 1), ("gemma2", 7, 3), ("smollm3", 7, 3)] {
        let (mut model, params) = random(toy_json(family)?, Role::Head, DType::F64)?;
        let config = MonteCLoRAConfig { rank: 3, alpha: 7.0, num_components: 3, ..Default::default() };
        inject::monteclora(&mut model, &Targets::parse("all-linear")?, &config, &params)?;
        scatter(&params)?;
        let mut adapted = 0;
        model.visit_linears(&mut |layer| {
            adapted += usize::from(layer.active().is_some());
            Ok(())
        })?;
        assert_eq!(adapted, 3 * layers, "{family}");
        let regularizer = Regularizer::new(&config);
        let pass = Pass::Train { draw: 2 };
        check(&params, || {
            let penalty = regularizer.for_model(&model, pass)?.total;
            Ok((loss(&model, pass)? + penalty)?)
        })?;
        // With gradient checkpointing the gradients are the same.
        let name = params.trainable()[0].0.clone();
        let gradient = |model: &DecoderForCausalLM| -> Outcome<Tensor> {
            let grads = loss(model, pass)?.backward()?;
            Ok(grads.get(&params.get(&name).ok_or("a parameter")?.var).ok_or("a gradient")?.clone())
        };
        let whole = gradient(&model)?;
        model.set_checkpoint_layers(true);
        assert_close(&gradient(&model)?, &whole, 1e-12)?;
        let apart = loss(&model, Pass::Mean)?.detach();
        merge(&mut model)?;
        assert_close(&loss(&model, Pass::Mean)?, &apart, 1e-9)?;

        let (mut model, params) = random(toy_json(family)?, Role::Head, DType::F32)?;
        inject::lora(&mut model, &Targets::default(), &LoraConfig::default(), &params)?;
        assert_eq!(params.trainable().len(), 3 * 2 * default, "{family}: the default targets");
    }
    Ok(())
}
