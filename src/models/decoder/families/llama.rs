//! LLaMA 1, 2 and 3.x (Touvron et al. 2023; Grattafiori et al. 2024), and SmolLM 1 and 2, which have the same
//! `model_type`.

use super::base::plain;
use super::fields::Fields;
use crate::error::Result;
use crate::models::decoder::config::DecoderConfig;

pub(super) fn read(fields: Fields) -> Result<DecoderConfig> {
    let bias = fields.or("attention_bias", false)?;
    Ok(DecoderConfig {
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: fields.or("mlp_bias", false)?,
        ..plain(&fields, "llama")?
    })
}
