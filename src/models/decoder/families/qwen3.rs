//! Qwen 3 (Yang et al. 2025): norms on queries and keys, and an independent head width.

use serde_json::json;

use super::base::plain;
use super::fields::Fields;
use super::qwen2::late_windows;
use crate::error::Result;
use crate::models::decoder::config::DecoderConfig;

pub(super) fn read(fields: Fields) -> Result<DecoderConfig> {
    let fields = fields.with_defaults(json!({"head_dim": 128}));
    let bias = fields.or("attention_bias", false)?;
    let mut config =
        DecoderConfig { qkv_bias: bias, o_bias: bias, qk_norm: true, ..plain(&fields, "qwen3")? };
    late_windows(&fields, &mut config)?;
    Ok(config)
}
