//! What every layer of one forward pass shares.

use candle_core::{DType, Device};

use super::config::DecoderConfig;
use super::positions::Positions;
use super::rotary::{Angles, Rotary};
use crate::adapter::Context;
use crate::error::Error;
use crate::ops::Mask;

/// What every layer of one forward pass shares.
#[derive(Clone)]
pub(super) struct Step {
    /// Padding and the causal triangle; windows are the layers' own.
    pub mask: Mask,
    pub angles: AllAngles,
    pub cx: Context,
}

/// The angles of the new tokens, of each kind of positions.
#[derive(Clone)]
pub(super) struct AllAngles {
    global: Angles,
    local: Option<Angles>,
}

/// The tables that a model's angles come from.
#[derive(Debug)]
pub(super) struct Tables {
    global: Rotary,
    local: Option<Rotary>,
}

impl Tables {
    /// For weights of `dtype` on `device`.
    pub fn new(config: &DecoderConfig, dtype: DType, device: &Device) -> Self {
        let rotary = |config| Rotary::new(config, dtype, device);
        Self { global: rotary(&config.rotary), local: config.local_rotary.as_ref().map(rotary) }
    }

    /// The angles of `count` tokens after `first` others. `room` is what the cache that these are in was begun for,
    /// where there is one: all that it ever holds has the angles of one text.
    pub fn angles(&self, first: usize, count: usize, room: Option<usize>) -> candle_core::Result<AllAngles> {
        let length = first + count;
        let at = |rotary: &Rotary| -> candle_core::Result<Angles> {
            let of_text = room.unwrap_or(length);
            if length > of_text && rotary.is_long(length) != rotary.is_long(of_text) {
                let reason = format!(
                    "{length} tokens have other rotary positions than the {of_text} that it was begun for: begin \
                     another with room for the whole text"
                );
                return Err(Error::config("cache", reason).into());
            }
            rotary.angles(first, count, of_text)
        };
        Ok(AllAngles { global: at(&self.global)?, local: self.local.as_ref().map(at).transpose()? })
    }
}

impl Step {
    /// The angles of a layer with these positions, if they turn at all.
    pub fn angles_of(&self, positions: Positions) -> Option<&Angles> {
        match positions {
            Positions::Global => Some(&self.angles.global),
            Positions::Local => self.angles.local.as_ref(),
            Positions::None => None,
        }
    }
}
