//! Schedules of the sample scaler eps over training (the paper names adaptive scaling as future work).
//!
//! A schedule multiplies eps in training draws only; prediction from the posterior uses eps itself. A
//! schedule that anneals ([`ScalerSchedule::anneals`]) is therefore meant for predictions at the mean:
//! towards its end, training has not seen perturbations as wide as those of a posterior draw.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The smallest factor: at zero, rho and c would never get a gradient again.
pub(super) const MIN_FACTOR: f64 = 1e-3;

/// How the factor on eps changes over training.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScalerSchedule {
    /// Always one.
    #[default]
    Constant,
    /// Rises linearly over this share of all steps, then stays at one.
    Warmup(f64),
    /// Falls linearly from one to (almost) zero.
    Linear,
    /// Falls from one to (almost) zero as half a cosine.
    Cosine,
    /// For each layer, the square root of the running mean of the squared norm of A's gradient, relative to
    /// its highest value so far: noise while gradients are large, less as they fade. A heuristic for
    /// exploration, not an approximation of a posterior: squared gradients stand for the curvature
    /// (Gauss-Newton), and where the curvature is high a posterior is narrow.
    Adaptive,
}

impl ScalerSchedule {
    /// Whether training may end with a smaller eps than it began with, and than predictions use.
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

    /// The factor at step `step` (1-based; 0 counts as 1) of `total`; `None` if it depends on gradients.
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
        Some(factor.max(MIN_FACTOR))
    }
}

impl FromStr for ScalerSchedule {
    type Err = Error;

    /// Parses `constant`, `linear`, `cosine`, `adaptive` or `warmup-SHARE`.
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
