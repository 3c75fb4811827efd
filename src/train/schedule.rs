//! Learning-rate schedules with warm-up.

use std::str::FromStr;

use crate::error::{Error, Result};

/// The course of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Schedule {
    /// No change.
    Constant,
    /// A straight line to zero.
    #[default]
    Linear,
    /// Half a cosine to zero.
    Cosine,
}

impl Schedule {
    /// The factor on the learning rate at `step` (0-based) of `total`, of which `warmup` rise
    /// linearly from zero: the schedules of Hugging Face transformers.
    pub fn factor(self, step: usize, warmup: usize, total: usize) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let left = total.saturating_sub(step) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => left,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * (1.0 - left)).cos()),
        }
    }
}

impl FromStr for Schedule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "constant" => Ok(Self::Constant),
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            other => {
                Err(Error::config("schedule", format!("expected constant, linear or cosine, got {other}")))
            }
        }
    }
}
