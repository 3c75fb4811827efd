//! Gemma 2 (Riviere et al. 2024): norms before and after each block, soft caps, a window in every
//! other layer.

use serde_json::json;

use super::base::{activation, plain, windows};
use super::fields::Fields;
use crate::error::Result;
use crate::models::decoder::config::DecoderConfig;

pub(super) fn read(fields: Fields) -> Result<DecoderConfig> {
    let fields = fields.with_defaults(json!({
        "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": true,
    }));
    let plain = plain(&fields, "gemma2")?;
    let mut config = DecoderConfig {
        attention_cap: fields.unless_null("attn_logit_softcapping", 50.0)?,
        logit_cap: fields.unless_null("final_logit_softcapping", 30.0)?,
        ..gemma(&fields, plain)?
    };
    let window = fields.unless_null("sliding_window", 4096)?;
    windows(&fields, &mut config.layers, window, |i| i % 2 == 0)?;
    Ok(config)
}

/// Applies the settings that Gemma 2 and 3 share.
pub(super) fn gemma(fields: &Fields, plain: DecoderConfig) -> Result<DecoderConfig> {
    fields
        .refuse("use_bidirectional_attention", "bidirectional attention is not supported: expected false")?;
    let bias = fields.or("attention_bias", false)?;
    let scalar: f64 = fields.or("query_pre_attn_scalar", 256.0)?;
    Ok(DecoderConfig {
        qkv_bias: bias,
        o_bias: bias,
        post_norms: true,
        norm_offset: true,
        activation: activation(fields, "hidden_activation", "gelu_pytorch_tanh")?,
        attention_scale: scalar.sqrt().recip(),
        embedding_scale: Some((plain.hidden_size as f64).sqrt()),
        ..plain
    })
}
