//! Gemma 3 (Kamath et al. 2025), text only: norms on queries and keys, and separate rotary positions for
//! layers with a window.

use serde_json::json;

use super::base::{head_dim, windows, with_rotary};
use super::fields::Fields;
use super::gemma2::gemma;
use super::rope::{rotary_by_type, whole};
use crate::error::{Error, Result};
use crate::models::decoder::config::DecoderConfig;
use crate::models::decoder::positions::Positions;
use crate::util::check::at_least_one;

/// Reads a text-only model.
pub(super) fn read(fields: Fields) -> Result<DecoderConfig> {
    text(fields, "gemma3_text")
}

/// Reads the text part of a multimodal model.
pub(super) fn read_text_config(fields: Fields) -> Result<DecoderConfig> {
    let missing =
        || Error::config("text_config", "it is missing: expected the settings of the language model");
    let mut text_config = fields.object("text_config")?.ok_or_else(missing)?;
    for name in ["bos_token_id", "eos_token_id", "pad_token_id", "id2label", "num_labels"] {
        text_config.inherit(name, &fields);
    }
    text(text_config, "gemma3")
}

fn text(fields: Fields, model_type: &'static str) -> Result<DecoderConfig> {
    // Files of multimodal models omit fields that equal the class defaults.
    let fields = fields.with_defaults(json!({
        "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "tie_word_embeddings": true,
    }));
    // No checkpoint sets it, and transformers would not compute what the field says.
    fields
        .refuse("attn_logit_softcapping", "a cap on attention is not supported in Gemma 3: expected null")?;
    let dim = head_dim(&fields)?;
    let global = whole(rotary_by_type(&fields, "full_attention", "rope_theta", dim)?, dim)?;
    let local = whole(rotary_by_type(&fields, "sliding_attention", "rope_local_base_freq", dim)?, dim)?;
    let mut config = DecoderConfig {
        qk_norm: true,
        local_rotary: Some(local),
        logit_cap: fields.optional("final_logit_softcapping")?,
        ..gemma(&fields, with_rotary(&fields, model_type, global)?)?
    };
    let pattern: usize = fields.or("sliding_window_pattern", 6)?;
    at_least_one("sliding_window_pattern", pattern)?;
    let window = fields.unless_null("sliding_window", 4096)?;
    windows(&fields, &mut config.layers, window, |i| (i + 1) % pattern != 0)?;
    for layer in &mut config.layers {
        layer.positions = if layer.window.is_some() { Positions::Local } else { Positions::Global };
    }
    Ok(config)
}
