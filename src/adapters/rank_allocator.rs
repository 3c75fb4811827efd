//! AdaLoRA's budget: which singular values of which layers are kept (Zhang et al. 2023, algorithm 1).
//!
//! ```text
//! I  = |w grad|,  I' = b1 I' + (1 - b1) I,  U' = b2 U' + (1 - b2) |I - I'|          (eqs. 9, 10)
//! S_i = I' U' of e_i + mean over A's row i + mean over B's column i               (eq. 8)
//! ```
//!
//! Of all triplets of all layers, the best `budget(step)` keep their singular value. The singular values of
//! the others are set to zero; until the budget is final, a later gradient can raise them again.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, D};

use super::adalora::{AdaLora, AdaLoraConfig};
use crate::adapter::{no_active, visit_active, AdaptableModel, Params};
use crate::error::{Error, Result};

/// The smoothed importance of one parameter, and its uncertainty.
#[derive(Debug, Clone)]
struct Importance {
    mean: Tensor,
    uncertainty: Tensor,
}

/// Moves the budget of ranks between layers; it is updated after every optimiser step.
#[derive(Debug)]
pub struct RankAllocator {
    config: AdaLoraConfig,
    /// The layers' parameter names and ranks.
    layers: Vec<(String, usize)>,
    importance: BTreeMap<String, Importance>,
    /// Once the budget is final: a mask of the values that are kept, for each layer.
    kept: Option<Vec<Tensor>>,
}

impl RankAllocator {
    /// Creates an allocator for the active AdaLoRA layers of a model.
    ///
    /// # Errors
    /// If an option is outside its domain, or there is no such layer.
    pub fn new(model: &dyn AdaptableModel, config: &AdaLoraConfig) -> Result<Self> {
        config.validate()?;
        let mut layers = Vec::new();
        visit_active(model, |adapter: &AdaLora| {
            layers.push((adapter.name().to_string(), adapter.values().elem_count()));
            Ok(())
        })?;
        if layers.is_empty() {
            return Err(no_active("AdaLoRA"));
        }
        Ok(Self { config: config.clone(), layers, importance: BTreeMap::new(), kept: None })
    }

    /// Returns the number of singular values that are kept at step `step` (1-based) of `total`, and whether
    /// the step allocates: the cubic schedule of eq. 12.
    pub fn budget(&self, step: usize, total: usize) -> (usize, bool) {
        let all: usize = self.layers.iter().map(|(_, rank)| rank).sum();
        let last = (self.config.target_rank * self.layers.len()).min(all);
        let (first, end) = self.limits(total);
        if step <= first {
            (all, false)
        } else if step > end {
            (last, true)
        } else {
            let left = 1.0 - (step - first) as f64 / (end - first) as f64;
            let budget = ((all - last) as f64 * left.powi(3) + last as f64) as usize;
            (budget, step.is_multiple_of(self.config.interval))
        }
    }

    /// The last step of the warm-up, and the last step at which the budget may fall.
    fn limits(&self, total: usize) -> (usize, usize) {
        let of = |share: f64| (share * total as f64) as usize;
        (of(self.config.warmup_share), total - of(self.config.final_share))
    }

    /// Updates the importance with the gradients of optimiser step `step` (1-based) of `total`, by parameter
    /// name, and sets singular values to zero as the budget requires.
    ///
    /// # Errors
    /// If a parameter or its gradient is missing, or candle fails.
    pub fn after_step(
        &mut self,
        params: &Params,
        gradient: &dyn Fn(&str) -> Option<Tensor>,
        step: usize,
        total: usize,
    ) -> Result<()> {
        let (_, end) = self.limits(total);
        if let Some(kept) = self.kept.as_ref().filter(|_| step > end) {
            return self.mask(params, kept);
        }
        // As in PEFT, the last allocation uses the importance from before it.
        let watches = step < end || self.importance.is_empty();
        for (name, _) in self.layers.iter().filter(|_| watches) {
            for part in ["a", "b", "values"] {
                let name = format!("{name}.{part}");
                let missing = || Error::tensor(&*name, "AdaLoRA needs this parameter and its gradient");
                let param = params.get(&name).ok_or_else(missing)?;
                let gradient = gradient(&name).ok_or_else(missing)?;
                let now = (param.var.as_detached_tensor() * gradient)?.abs()?;
                let seen = update(self.importance.get(&name), &now, &self.config)?;
                self.importance.insert(name, seen);
            }
        }
        let (budget, allocates) = self.budget(step, total);
        if !allocates && step != end {
            return Ok(());
        }
        let kept = self.best(budget)?;
        self.mask(params, &kept)?;
        self.kept = (step >= end).then_some(kept);
        Ok(())
    }

    /// The importance so far, by parameter, and, once the budget is final, the masks of the values that are
    /// kept.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let means = self.importance.iter().map(|(name, seen)| (format!("mean/{name}"), seen.mean.clone()));
        let rest =
            self.importance.iter().map(|(name, seen)| (format!("rest/{name}"), seen.uncertainty.clone()));
        let masks = self.layers.iter().zip(self.kept.iter().flatten());
        let masks = masks.map(|((name, _), mask)| (format!("kept/{name}"), mask.clone()));
        means.chain(rest).chain(masks).collect()
    }

    /// Restores a [`Self::state`].
    ///
    /// # Errors
    /// If it is not a state of these layers.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let missing = |name: &str| Error::tensor(name, "AdaLoRA's state lacks it");
        let mut importance = BTreeMap::new();
        for (name, mean) in state.iter().filter_map(|(name, t)| Some((name.strip_prefix("mean/")?, t))) {
            let uncertainty = state.get(&format!("rest/{name}")).ok_or_else(|| missing(name))?.clone();
            importance.insert(name.to_string(), Importance { mean: mean.clone(), uncertainty });
        }
        let parts = self
            .layers
            .iter()
            .flat_map(|(name, _)| ["a", "b", "values"].map(|part| format!("{name}.{part}")));
        if let Some(name) =
            parts.into_iter().find(|name| !importance.is_empty() && !importance.contains_key(name))
        {
            return Err(missing(&name));
        }
        let mask = |(name, rank): &(String, usize)| {
            let mask = state.get(&format!("kept/{name}")).ok_or_else(|| missing(name))?;
            if mask.elem_count() == *rank {
                Ok(mask.clone())
            } else {
                Err(Error::tensor(name, format!("expected a mask of {rank} values, got {:?}", mask.shape())))
            }
        };
        let is_final = state.keys().any(|name| name.starts_with("kept/"));
        self.kept = is_final.then(|| self.layers.iter().map(mask).collect::<Result<_>>()).transpose()?;
        self.importance = importance;
        Ok(())
    }

    /// Computes the masks that keep the `budget` most important singular values.
    fn best(&self, budget: usize) -> Result<Vec<Tensor>> {
        let mut scores = Vec::new();
        for (name, _) in &self.layers {
            let of = |part: &str| {
                let seen = &self.importance[&format!("{name}.{part}")];
                &seen.mean * &seen.uncertainty
            };
            let score = ((of("values")? + of("a")?.mean(D::Minus1)?)? + of("b")?.mean(0)?)?;
            scores.push(score.to_dtype(DType::F64)?.to_vec1::<f64>()?);
        }
        let mut order: Vec<f64> = scores.iter().flatten().copied().collect();
        order.sort_by(f64::total_cmp);
        // As in PEFT, values that tie with the best removed one are removed too.
        let threshold = order.len().checked_sub(budget + 1).map(|last| order[last]);
        let stays = |score: &f64| threshold.is_none_or(|threshold| *score > threshold);
        let masks = scores.iter().map(|scores| {
            let mask: Vec<f32> = scores.iter().map(|score| f32::from(u8::from(stays(score)))).collect();
            Ok(Tensor::new(mask, &candle_core::Device::Cpu)?)
        });
        masks.collect()
    }

    fn mask(&self, params: &Params, kept: &[Tensor]) -> Result<()> {
        for ((name, _), mask) in self.layers.iter().zip(kept) {
            let name = format!("{name}.values");
            if let Some(param) = params.get(&name) {
                let values = param.var.as_detached_tensor();
                let mask = mask.to_device(values.device())?.to_dtype(values.dtype())?;
                param.var.set(&(values * mask)?)?;
            }
        }
        Ok(())
    }
}

/// Returns the smoothed importance after one more step.
fn update(seen: Option<&Importance>, now: &Tensor, config: &AdaLoraConfig) -> Result<Importance> {
    let blend = |old: Option<&Tensor>, new: &Tensor, decay: f64| -> Result<Tensor> {
        let new = (new * (1.0 - decay))?;
        Ok(match old {
            // When restored from a checkpoint, it may be on another device.
            Some(old) => ((old.to_device(new.device())? * decay)? + new)?,
            None => new,
        })
    };
    let mean = blend(seen.map(|s| &s.mean), now, config.beta1)?;
    let surprise = (now - &mean)?.abs()?;
    let uncertainty = blend(seen.map(|s| &s.uncertainty), &surprise, config.beta2)?;
    Ok(Importance { mean, uncertainty })
}
