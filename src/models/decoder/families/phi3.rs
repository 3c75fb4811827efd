//! Phi 3, 3.5 and 4 (Abdin et al. 2024): fused projections, partial rotary positions, LongRoPE.

use serde_json::json;

use super::base::{head_dim, with_rotary};
use super::fields::Fields;
use super::rope::rotary;
use crate::error::Result;
use crate::models::decoder::config::DecoderConfig;

pub(super) fn read(fields: Fields) -> Result<DecoderConfig> {
    let fields = fields.with_defaults(json!({"original_max_position_embeddings": 4096}));
    for dropout in ["resid_pdrop", "embd_pdrop"] {
        fields.refuse(dropout, "dropout of the residual stream is not supported: expected 0")?;
    }
    let rotary = rotary(&fields, head_dim(&fields)?)?;
    let mut config = DecoderConfig { fused_projections: true, ..with_rotary(&fields, "phi3", rotary)? };
    let window = fields.optional("sliding_window")?;
    config.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(config)
}
