//! The factors on eps that a schedule gives the layers of a model in training; predictions use none.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::layer::MonteCLoRA;
use super::schedule::{ScalerSchedule, MIN_FACTOR};
use crate::adapter::{visit_active, AdaptableModel, ScalerFactors};
use crate::error::{Error, Result};

/// Decay of the running mean of squared gradient norms.
const DECAY: f64 = 0.95;
/// The gradient statistics of one layer, for the adaptive schedule.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    mean: f64,
    weight: f64,
    peak: f64,
}

impl Seen {
    /// Adds one squared gradient norm.
    fn add(&mut self, square: f64) {
        self.mean = DECAY * self.mean + (1.0 - DECAY) * square;
        self.weight = DECAY * self.weight + (1.0 - DECAY);
        self.peak = self.peak.max(self.corrected());
    }

    /// The running mean with Adam's bias correction for the first steps.
    fn corrected(&self) -> f64 {
        self.mean / self.weight
    }

    /// The factor on eps.
    fn factor(&self) -> f64 {
        // At the start B is zero and A gets no gradient: the factor stays one.
        if self.peak > 0.0 {
            (self.corrected() / self.peak).sqrt().max(MIN_FACTOR)
        } else {
            1.0
        }
    }
}

/// The factors on eps of a model's MonteCLoRA layers, step by step.
#[derive(Debug, Clone, Default)]
pub struct SampleScaler {
    schedule: ScalerSchedule,
    seen: BTreeMap<String, Seen>,
    factors: ScalerFactors,
}

impl SampleScaler {
    /// Creates a scaler that follows `schedule`.
    pub fn new(schedule: ScalerSchedule) -> Self {
        Self { schedule, ..Self::default() }
    }

    /// The factors of the current step.
    pub fn factors(&self) -> ScalerFactors {
        self.factors.clone()
    }

    /// Updates the factors before optimiser step `step` (1-based) of `total`.
    ///
    /// # Errors
    /// If the factor is not positive.
    pub fn before_step(&mut self, step: usize, total: usize) -> Result<()> {
        if let Some(factor) = self.schedule.factor(step, total) {
            self.factors = ScalerFactors::new(factor, BTreeMap::new())?;
        }
        Ok(())
    }

    /// Updates an adaptive schedule after an optimiser step. `squared_norm` returns the squared norm of the
    /// gradient of the parameter with a given name.
    ///
    /// # Errors
    /// If visiting the layers fails, or a norm is missing.
    pub fn after_step(
        &mut self,
        model: &dyn AdaptableModel,
        squared_norm: &dyn Fn(&str) -> Result<f64>,
    ) -> Result<()> {
        if self.schedule != ScalerSchedule::Adaptive {
            return Ok(());
        }
        visit_active(model, |layer: &MonteCLoRA| {
            let square = squared_norm(&format!("{}.a", layer.name()))?;
            self.seen.entry(layer.name().to_string()).or_default().add(square);
            Ok(())
        })?;
        self.follow()
    }

    /// The gradient statistics of an adaptive schedule, by layer: `(3)` in double precision.
    ///
    /// # Errors
    /// If candle fails.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let of = |seen: &Seen| Tensor::new(&[seen.mean, seen.weight, seen.peak], &Device::Cpu);
        self.seen.iter().map(|(name, seen)| Ok((name.clone(), of(seen)?))).collect()
    }

    /// Restores a [`Self::state`], and the factors that follow from it.
    ///
    /// # Errors
    /// If a layer is missing, or its tensor has another shape or is not finite. The state is then unchanged.
    pub fn restore(&mut self, model: &dyn AdaptableModel, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut read = BTreeMap::new();
        for (name, seen) in state {
            match seen.to_vec1::<f64>()?[..] {
                [mean, weight, peak] if [mean, weight, peak].iter().all(|value| value.is_finite()) => {
                    read.insert(name.clone(), Seen { mean, weight, peak });
                }
                [_, _, _] => return Err(Error::tensor(name, "the state of the sample scaler is not finite")),
                _ => return Err(Error::tensor(name, format!("expected shape [3], got {:?}", seen.shape()))),
            }
        }
        let follows = self.schedule == ScalerSchedule::Adaptive && !read.is_empty();
        if follows {
            visit_active(model, |layer: &MonteCLoRA| {
                if read.contains_key(layer.name()) {
                    return Ok(());
                }
                Err(Error::tensor(layer.name(), "the state of the sample scaler lacks this layer"))
            })?;
        }
        self.seen = read;
        if follows {
            self.follow()?;
        }
        Ok(())
    }

    /// Computes the factors from the gradient statistics.
    fn follow(&mut self) -> Result<()> {
        let factors = self.seen.iter().map(|(name, seen)| (name.clone(), seen.factor()));
        self.factors = ScalerFactors::new(1.0, factors.collect())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
