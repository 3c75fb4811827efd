//! Qwen 2 and 2.5 (Yang et al. 2024): biases on the query, key and value projections.

use super::base::{plain, windows};
use super::fields::Fields;
use crate::error::Result;
use crate::models::decoder::config::DecoderConfig;

pub(super) fn read(fields: Fields) -> Result<DecoderConfig> {
    let mut config = DecoderConfig { qkv_bias: true, ..plain(&fields, "qwen2")? };
    late_windows(&fields, &mut config)?;
    Ok(config)
}

/// Sets the sliding window of Qwen's later layers, which is off in all published checkpoints.
pub(super) fn late_windows(fields: &Fields, config: &mut DecoderConfig) -> Result<()> {
    let window = match fields.or("use_sliding_window", false)? {
        true => fields.unless_null("sliding_window", 4096)?,
        false => None,
    };
    let first = fields.or("max_window_layers", 28)?;
    windows(fields, &mut config.layers, window, |i| window.is_some() && i >= first)
}
