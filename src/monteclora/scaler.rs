//! The course of the sample scaler eps over training (adaptive scaling is the paper's future work).
//!
//! A schedule multiplies eps in training draws alone: prediction from the posterior keeps eps itself.

use std::collections::BTreeMap;
use std::str::FromStr;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::layer::MonteCLoRA;
use crate::error::{Error, Result};
use crate::slot::Linears;

/// Decay of the running mean of squared gradient norms.
const DECAY: f64 = 0.95;
/// The least factor: a scaler of zero would take the gradient from rho and c for good.
const LEAST: f64 = 1e-3;

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
    /// it ever had. Why this quantity: to second order a perturbation raises the loss by eps^2 / 2 times
    /// the curvature, and squared gradients stand for the curvature (Gauss-Newton); so noise stays
    /// while there is a signal it can be told from, and fades with it.
    Adaptive,
}

impl ScalerSchedule {
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

    /// The factor at a step (1-based) of `total`; None where gradients decide.
    fn factor(&self, step: usize, total: usize) -> Option<f64> {
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

/// What an adaptive schedule has seen of a layer.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    mean: f64,
    weight: f64,
    peak: f64,
}

impl Seen {
    /// Sees one more squared norm.
    fn add(&mut self, square: f64) {
        self.mean = DECAY * self.mean + (1.0 - DECAY) * square;
        self.weight = DECAY * self.weight + (1.0 - DECAY);
        self.peak = self.peak.max(self.corrected());
    }

    /// The mean, corrected for its first steps as Adam corrects its moments.
    fn corrected(&self) -> f64 {
        self.mean / self.weight
    }

    /// The factor after what was seen.
    fn factor(&self) -> f64 {
        // At the start B is zero and no gradient reaches A: nothing fades yet.
        match self.peak > 0.0 {
            true => (self.corrected() / self.peak).sqrt().max(LEAST),
            false => 1.0,
        }
    }
}

/// Sets the factors of a model's MonteCLoRA layers, step by step.
#[derive(Debug, Clone, Default)]
pub struct SampleScaler {
    schedule: ScalerSchedule,
    seen: BTreeMap<String, Seen>,
}

impl SampleScaler {
    /// A scaler on this course.
    pub fn new(schedule: ScalerSchedule) -> Self {
        Self { schedule, seen: BTreeMap::new() }
    }

    /// Before optimiser step `step` (1-based) of `total`.
    ///
    /// # Errors
    /// If the walk fails.
    pub fn before_step(&self, model: &dyn Linears, step: usize, total: usize) -> Result<()> {
        match self.schedule.factor(step, total) {
            Some(factor) => visit(model, &mut |layer| layer.set_training_factor(factor)),
            None => Ok(()),
        }
    }

    /// After an optimiser step whose gradient of the parameter of some name had this squared norm.
    ///
    /// # Errors
    /// If the walk fails, or a norm is missing.
    pub fn after_step(
        &mut self,
        model: &dyn Linears,
        squared_norm: &dyn Fn(&str) -> Result<f64>,
    ) -> Result<()> {
        if self.schedule != ScalerSchedule::Adaptive {
            return Ok(());
        }
        visit(model, &mut |layer| {
            let square = squared_norm(&format!("{}.a", layer.name()))?;
            let seen = self.seen.entry(layer.name().to_string()).or_default();
            seen.add(square);
            layer.set_training_factor(seen.factor())
        })
    }

    /// What an adaptive schedule has seen, by layer: `(3)` in double precision.
    ///
    /// # Errors
    /// If candle fails.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let of = |seen: &Seen| Tensor::new(&[seen.mean, seen.weight, seen.peak], &Device::Cpu);
        self.seen.iter().map(|(name, seen)| Ok((name.clone(), of(seen)?))).collect()
    }

    /// Puts back what [`Self::state`] gave, and with it the factors of a model's layers.
    ///
    /// # Errors
    /// If a layer's part is missing or of another shape.
    pub fn restore(&mut self, model: &dyn Linears, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.seen.clear();
        for (name, seen) in state {
            match seen.to_vec1::<f64>()?[..] {
                [mean, weight, peak] => drop(self.seen.insert(name.clone(), Seen { mean, weight, peak })),
                _ => return Err(Error::tensor(name, format!("expected shape [3], got {:?}", seen.shape()))),
            }
        }
        if self.schedule != ScalerSchedule::Adaptive || self.seen.is_empty() {
            return Ok(());
        }
        visit(model, &mut |layer| {
            let missing = || Error::tensor(layer.name(), "the state of the sample scaler lacks this layer");
            layer.set_training_factor(self.seen.get(layer.name()).ok_or_else(missing)?.factor())
        })
    }
}

/// Calls `f` on every active MonteCLoRA layer.
fn visit(model: &dyn Linears, f: &mut dyn FnMut(&MonteCLoRA) -> Result<()>) -> Result<()> {
    model.visit_linears(&mut |slot| match slot.active() {
        Some((_, adapter)) => adapter.as_any().downcast_ref::<MonteCLoRA>().map_or(Ok(()), &mut *f),
        None => Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn courses_begin_and_end_where_they_say() -> Result<()> {
        let course = |text: &str| -> Result<Vec<f64>> {
            let schedule: ScalerSchedule = text.parse()?;
            Ok((1..=4).filter_map(|step| schedule.factor(step, 4)).collect())
        };
        assert_eq!(course("constant")?, [1.0; 4]);
        assert_eq!(course("linear")?, [1.0, 0.75, 0.5, 0.25]);
        assert_eq!(course("warmup-0.5")?, [0.5, 1.0, 1.0, 1.0]);
        assert_eq!(course("warmup-0")?, [1.0; 4]);
        let cosine = course("cosine")?;
        assert!((cosine[0], cosine[2]) == (1.0, 0.5) && cosine.is_sorted_by(|a, b| a > b), "{cosine:?}");
        assert!(course("adaptive")?.is_empty());
        assert!("warmup-2".parse::<ScalerSchedule>().is_err() && "square".parse::<ScalerSchedule>().is_err());
        Ok(())
    }

    #[test]
    fn the_adaptive_factor_follows_the_gradient_down_from_its_peak() {
        let mut seen = Seen::default();
        let mut factor = |square: f64| {
            seen.add(square);
            seen.factor()
        };
        assert_eq!(factor(0.0), 1.0); // B is zero
        let rising: Vec<f64> = (1..50).map(|t| factor(f64::from(t))).collect();
        assert!(rising.iter().all(|factor| *factor == 1.0), "{rising:?}");
        let falling: Vec<f64> = (0..400).map(|_| factor(0.01)).collect();
        assert!(falling.is_sorted_by(|a, b| a >= b) && falling[399] < 0.03, "{falling:?}");
        assert!((falling[399] - (0.01 / seen.peak).sqrt()).abs() < 1e-3);
    }
}
