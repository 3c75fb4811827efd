//! Mistral and Nemo (Jiang et al. 2023): a sliding window in all layers or none, independent head width.

use super::base::plain;
use super::fields::Fields;
use crate::error::Result;
use crate::models::decoder::config::DecoderConfig;

pub(super) fn read(fields: Fields) -> Result<DecoderConfig> {
    let mut config = plain(&fields, "mistral")?;
    let window = fields.unless_null("sliding_window", 4096)?;
    config.layers.iter_mut().for_each(|layer| layer.window = window);
    Ok(config)
}
