//! Learning-rate schedules with warm-up.

use std::str::FromStr;

use serde::Serialize;

use crate::error::{Error, Result};

/// The shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Constant.
    Constant,
    /// Linear decay to zero.
    #[default]
    Linear,
    /// Half a cosine to zero.
    Cosine,
}

impl Schedule {
    /// Returns the factor on the learning rate at `step` (0-based) of `total`, the first `warmup` of which
    /// rise linearly from zero. These are the schedules of Hugging Face transformers.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_courses_are_those_of_transformers() {
        // get_linear_schedule_with_warmup(optimizer, 3, 10), then get_cosine_schedule_with_warmup
        let linear = [0.0, 0.333333333, 0.666666667, 1.0, 0.857142857, 0.714285714];
        let cosine = [0.0, 0.333333333, 0.666666667, 1.0, 0.950484434, 0.811744901];
        for (schedule, expected) in [(Schedule::Linear, linear), (Schedule::Cosine, cosine)] {
            for (step, expected) in expected.into_iter().enumerate() {
                let got = schedule.factor(step, 3, 10);
                assert!((got - expected).abs() < 1e-8, "{schedule:?} {step}: {got}");
            }
            assert!(schedule.factor(10, 3, 10).abs() < 1e-12);
        }
        assert_eq!(Schedule::Constant.factor(9, 3, 10), 1.0);
        assert_eq!(Schedule::Linear.factor(0, 0, 10), 1.0);
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        assert_eq!("cosine".parse::<Schedule>().unwrap(), Schedule::Cosine);
        let error = "step".parse::<Schedule>().unwrap_err().to_string();
        assert!(error.contains("constant, linear or cosine"), "{error}");
    }
}
