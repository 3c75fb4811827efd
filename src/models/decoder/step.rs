//! The state that all layers share during one forward pass.

use candle_core::{DType, Device};

use super::config::DecoderConfig;
use super::positions::Positions;
use super::rotary::{Angles, Rotary};
use crate::adapter::Context;
use crate::error::Error;
use crate::models::packed::PackedBatch;
use crate::ops::Mask;

/// The state that all layers share during one forward pass.
#[derive(Clone)]
pub(super) struct Step {
    /// Padding and causal mask; each layer adds its own window.
    pub mask: Mask,
    pub angles: AllAngles,
    /// The layout between attentions.
    pub batch: PackedBatch,
    pub cx: Context,
}

/// The rotary angles of the new tokens, for each kind of positions.
#[derive(Clone)]
pub(super) struct AllAngles {
    global: Angles,
    local: Option<Angles>,
}

/// The tables of a model's rotary angles.
#[derive(Debug)]
pub(super) struct Tables {
    global: Rotary,
    local: Option<Rotary>,
}

impl Tables {
    /// Creates the tables for weights of `dtype` on `device`.
    pub fn new(config: &DecoderConfig, dtype: DType, device: &Device) -> Self {
        let rotary = |config| Rotary::new(config, dtype, device);
        Self { global: rotary(&config.rotary), local: config.local_rotary.as_ref().map(rotary) }
    }

    /// Returns the angles of `count` tokens after `first` others.
    ///
    /// `room` is the number of tokens that the cache, if any, was created for. Under LongRoPE it decides
    /// between the angles of short and long texts, so that everything in one cache has the same kind.
    ///
    /// # Errors
    /// If the tokens exceed `room` and the longer text has other angles.
    pub fn angles(&self, first: usize, count: usize, room: Option<usize>) -> candle_core::Result<AllAngles> {
        let length = first + count;
        let at = |rotary: &Rotary| -> candle_core::Result<Angles> {
            let of_text = room.unwrap_or(length);
            if length > of_text && rotary.is_long(length) != rotary.is_long(of_text) {
                let reason = format!(
                    "{length} tokens need other rotary positions than the {of_text} tokens it was created \
                     for: create a cache with room for the whole text"
                );
                return Err(Error::config("cache", reason).into());
            }
            rotary.angles(first, count, of_text)
        };
        Ok(AllAngles { global: at(&self.global)?, local: self.local.as_ref().map(at).transpose()? })
    }
}

impl Step {
    /// The angles of a layer with these positions; `None` without rotary positions.
    pub fn angles_of(&self, positions: Positions) -> Option<&Angles> {
        match positions {
            Positions::Global => Some(&self.angles.global),
            Positions::Local => self.angles.local.as_ref(),
            Positions::None => None,
        }
    }
}
