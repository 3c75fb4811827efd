//! The course of the sample scaler eps over training (adaptive scaling is the paper's future work).
//!
//! A schedule multiplies eps in training draws alone: prediction from the posterior keeps eps itself. So
//! one that anneals ([`ScalerSchedule::anneals`]) is for predictions by the mean: the end of its training
//! has seen no perturbation as wide as those that a posterior draw then takes.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The least factor: a scaler of zero would take the gradient from rho and c for good.
pub(super) const LEAST: f64 = 1e-3;

/// The course of the factor on eps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScalerSchedule {
    /// One, always.
    #[default]
    Constant,
    /// Rising in a straight line over this share of all steps, then one.
    Warmup(f64),
    /// A straight line from one down to (almost) zero.
    Linear,
    /// Half a cosine from one down to (almost) zero.
    Cosine,
    /// Layer by layer, the root of the gradient's squared norm in A (a running mean) over the highest
    /// it ever had: noise where gradients are large, and less of it as they fade. That is a heuristic of
    /// exploration and approximates no posterior: squared gradients stand for the curvature
    /// (Gauss-Newton), and where that is high a posterior is narrow.
    Adaptive,
}

impl ScalerSchedule {
    /// Whether training may end with a smaller eps than it began with, and than predictions draw with.
    pub fn anneals(&self) -> bool {
        matches!(self, Self::Linear | Self::Cosine | Self::Adaptive)
    }

    /// Checks the share of [`Self::Warmup`].
    ///
    /// # Errors
    /// Unless it lies in [0, 1].
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Warmup(share) if !(0.0..=1.0).contains(share) => {
                Err(Error::config("scaler_schedule", format!("expected a share in [0, 1], got {share}")))
            }
            _ => Ok(()),
        }
    }

    /// The factor at a step (1-based; 0 is as 1) of `total`; None where gradients decide.
    pub(super) fn factor(&self, step: usize, total: usize) -> Option<f64> {
        let step = step.max(1);
        let done = (step - 1) as f64 / total.max(1) as f64;
        let factor = match self {
            Self::Constant => 1.0,
            Self::Warmup(share) => (step as f64 / (share * total as f64).max(1.0)).min(1.0),
            Self::Linear => 1.0 - done,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Self::Adaptive => return None,
        };
        Some(factor.max(LEAST))
    }
}

impl FromStr for ScalerSchedule {
    type Err = Error;

    /// `constant`, `linear`, `cosine`, `adaptive`, or `warmup-SHARE`.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            let expected = "expected constant, linear, cosine, adaptive or warmup-SHARE";
            Error::config("scaler_schedule", format!("{expected}, got {text}"))
        };
        let schedule = match text {
            "constant" => Self::Constant,
            "linear" => Self::Linear,
            "cosine" => Self::Cosine,
            "adaptive" => Self::Adaptive,
            _ => {
                let share = text.strip_prefix("warmup-").and_then(|share| share.parse().ok());
                Self::Warmup(share.ok_or_else(wrong)?)
            }
        };
        schedule.validate().map(|()| schedule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn courses_begin_and_end_where_they_say() -> Result<()> {
        let course = |text: &str| -> Result<Vec<f64>> {
            let schedule: ScalerSchedule = text.parse()?;
            assert_eq!(schedule.factor(0, 4), schedule.factor(1, 4), "{text}: a loop that counts from 0");
            Ok((1..=4).filter_map(|step| schedule.factor(step, 4)).collect())
        };
        assert_eq!(course("constant")?, [1.0; 4]);
        assert_eq!(course("linear")?, [1.0, 0.75, 0.5, 0.25]);
        assert_eq!(course("warmup-0.5")?, [0.5, 1.0, 1.0, 1.0]);
        assert_eq!(course("warmup-0")?, [1.0; 4]);
        let cosine = course("cosine")?;
        assert!((cosine[0], cosine[2]) == (1.0, 0.5) && cosine.is_sorted_by(|a, b| a > b), "{cosine:?}");
        assert!(course("adaptive")?.is_empty());
        for text in ["constant", "linear", "cosine", "warmup-0.5", "warmup-1"] {
            let falls = course(text)?.last() < course(text)?.first();
            assert_eq!(text.parse::<ScalerSchedule>()?.anneals(), falls, "{text}");
        }
        assert!("warmup-2".parse::<ScalerSchedule>().is_err() && "square".parse::<ScalerSchedule>().is_err());
        Ok(())
    }
}
