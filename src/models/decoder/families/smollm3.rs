//! SmolLM 3 (Bakouch et al. 2025): every fourth layer has no rotary positions.

use serde_json::json;

use super::base::{plain, windows};
use super::fields::Fields;
use crate::error::{Error, Result};
use crate::models::decoder::config::DecoderConfig;
use crate::models::decoder::positions::Positions;
use crate::util::check::at_least_one;

pub(super) fn read(fields: Fields) -> Result<DecoderConfig> {
    let fields = fields.with_defaults(json!({"rope_theta": 2e6, "tie_word_embeddings": true}));
    let bias = fields.or("attention_bias", false)?;
    let mut config = DecoderConfig {
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: fields.or("mlp_bias", false)?,
        ..plain(&fields, "smollm3")?
    };
    let interval: usize = fields.or("no_rope_layer_interval", 4)?;
    // Despite the field's name, 1 marks a layer with rotary positions.
    let listed = fields.optional::<Vec<u8>>("no_rope_layers")?;
    if let Some(listed) = listed.as_ref().filter(|listed| listed.len() < config.layers.len()) {
        let reason = format!("{} entries for {} layers", listed.len(), config.layers.len());
        return Err(Error::config("no_rope_layers", reason));
    }
    at_least_one("no_rope_layer_interval", interval)?;
    for (i, layer) in config.layers.iter_mut().enumerate() {
        let turns = listed.as_ref().map_or((i + 1) % interval != 0, |listed| listed[i] != 0);
        layer.positions = if turns { Positions::Global } else { Positions::None };
    }
    let window = match fields.or("use_sliding_window", false)? {
        true => fields.optional("sliding_window")?,
        false => None,
    };
    let still: Vec<bool> = config.layers.iter().map(|layer| layer.positions == Positions::None).collect();
    windows(&fields, &mut config.layers, window, |i| window.is_some() && still[i])?;
    Ok(config)
}
