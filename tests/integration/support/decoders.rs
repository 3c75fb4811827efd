//! Toy decoders in general position: LLaMA, without and with what LLaMA 3 changed.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use monteclora::adapter::{AdaptableModel, Params, Role};
use monteclora::adapters::{prompt_tuning, PromptConfig};
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::{self, Placement};
use monteclora::noise::Noise;

use super::{scatter, Outcome};

/// Grouped queries and different widths everywhere; with LLaMA 3's positions and a tied head, or without.
pub fn toy_json(llama3: bool) -> serde_json::Value {
    let scaling = serde_json::json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16});
    serde_json::json!({
        "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 40, "rms_norm_eps": 1e-5, "eos_token_id": 2,
        "rope_theta": if llama3 { 500.0 } else { 10000.0 },
        "rope_scaling": llama3.then_some(scaling), "tie_word_embeddings": llama3,
        "attention_dropout": 0.1,
    })
}

/// The configuration of [`toy_json`].
pub fn toy_config(llama3: bool) -> Outcome<DecoderConfig> {
    Ok(DecoderConfig::from_value(toy_json(llama3))?)
}

/// A model in general position, all of it trainable.
pub fn toy(config: &DecoderConfig, dtype: DType) -> Outcome<(DecoderForCausalLM, Params)> {
    let params = Params::with_dtype(Noise::new(5), dtype, &Device::Cpu);
    let vb = params.var_builder(None, Role::Base);
    let model = DecoderForCausalLM::load(vb, config, Noise::new(0))?;
    scatter(&params)?;
    Ok((model, params))
}

/// The same model with frozen weights of this dtype, and an empty store for adapters.
pub fn frozen(config: &DecoderConfig, dtype: DType) -> Outcome<(DecoderForCausalLM, Params)> {
    frozen_on(&Device::Cpu, config, dtype)
}

/// [`frozen`] on a device.
pub fn frozen_on(
    device: &Device,
    config: &DecoderConfig,
    dtype: DType,
) -> Outcome<(DecoderForCausalLM, Params)> {
    frozen_at(&Placement::new(&[(device.clone(), config.layers.len())])?, config, dtype)
}

/// [`frozen`] with its layers in these places.
pub fn frozen_at(
    placement: &Placement,
    config: &DecoderConfig,
    dtype: DType,
) -> Outcome<(DecoderForCausalLM, Params)> {
    let store = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let (_, all) = toy(config, store)?;
    let vb = VarBuilder::from_tensors(weights(&all), dtype, placement.first());
    let params = Params::with_dtype(Noise::new(6), store, placement.first());
    let placed = models::Weights::from(vb).placed(placement);
    Ok((DecoderForCausalLM::load(placed, config, Noise::new(0))?, params))
}

/// Adds `tokens` virtual tokens in general position to a model, if not 0.
pub fn prompted(model: &mut dyn AdaptableModel, tokens: usize, dtype: DType) -> Outcome<Params> {
    let params = Params::with_dtype(Noise::new(7), dtype, &Device::Cpu);
    if tokens > 0 {
        let embedding = model.embedding_mut().ok_or("no place for a prompt")?;
        prompt_tuning(embedding, "default", &PromptConfig { virtual_tokens: tokens }, &params)?;
        scatter(&params)?;
    }
    Ok(params)
}

/// The parameters of a store, detached.
pub fn weights(params: &Params) -> HashMap<String, Tensor> {
    params.all().into_iter().map(|(name, param)| (name, param.var.as_detached_tensor())).collect()
}

/// Texts of different lengths.
pub const ROWS: [&[u32]; 3] = [&[1, 17, 4, 33, 8, 21, 9], &[1, 40, 5, 2], &[1, 7, 7, 30, 12]];

/// [`ROWS`] with padding on one side: ids and mask.
pub fn padded(left: bool) -> Outcome<(Tensor, Tensor)> {
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for row in ROWS {
        let (pad, one) = (vec![0u32; 7 - row.len()], vec![1u8; row.len()]);
        let hidden = vec![0u8; pad.len()];
        if left {
            (ids.extend([pad, row.to_vec()].concat()), mask.extend([hidden, one].concat()))
        } else {
            (ids.extend([row.to_vec(), pad].concat()), mask.extend([one, hidden].concat()))
        };
    }
    let device = &Device::Cpu;
    Ok((Tensor::from_vec(ids, (3, 7), device)?, Tensor::from_vec(mask, (3, 7), device)?))
}

/// One text without padding: ids and mask.
pub fn one_row(tokens: &[u32]) -> Outcome<(Tensor, Tensor)> {
    let ids = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
    Ok((ids, Tensor::ones((1, tokens.len()), DType::U8, &Device::Cpu)?))
}
