//! What a method adds to training besides the task's loss: a penalty, and work between steps.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use candle_core::Tensor;

use super::objective::Loss;
use super::schedule::Schedule;
use super::settings::Settings;
use crate::adapter::{AdaptableModel, Context, Params, Prior, PriorStart};
use crate::adapters::adalora::orthogonal_penalty;
use crate::adapters::lora::prior_energy_on;
use crate::adapters::{blob, AdaLoraConfig, BlobConfig, RankAllocator};
use crate::error::{Error, Result};
use crate::monteclora::{training_rows, MonteCLoRAConfig, Regularizer, ReleasedWalk, SampleScaler};
use crate::ops::{self, joined};
use crate::optim::Gradients;

/// A method's part in training; by default nothing.
#[derive(Debug, Default)]
pub struct MethodHooks {
    kind: Kind,
    settings: Settings,
}

#[derive(Debug, Default)]
enum Kind {
    #[default]
    None,
    Posterior {
        regularizer: Regularizer,
        // Locked: objectives are shared; steps do not overlap.
        scaler: Mutex<SampleScaler>,
    },
    Walk(ReleasedWalk),
    Divergence {
        config: BlobConfig,
        // The number of steps in a cycle of KL weights, once known.
        cycle: Mutex<Option<usize>>,
    },
    Prior {
        prior: Prior,
        start: Option<PriorStart>,
    },
    Budget {
        weight: f64,
        // Locked: objectives are shared; steps do not overlap.
        allocator: Mutex<RankAllocator>,
    },
}

impl From<Kind> for MethodHooks {
    fn from(kind: Kind) -> Self {
        Self { kind, settings: Settings::new() }
    }
}

impl MethodHooks {
    /// The hooks of MonteCLoRA: its regulariser and the schedule of its sample scaler. Training starts at the
    /// present values of `params`.
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn of_posterior(config: &MonteCLoRAConfig, params: &Params) -> Result<Self> {
        let scaler = Mutex::new(SampleScaler::new(config.scaler_schedule));
        Ok(Kind::Posterior { regularizer: Regularizer::new(config).with_start(params)?, scaler }.into())
    }

    /// The hooks of LoRA with a prior. Training starts at the present values of `params`.
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn of_prior(prior: &Prior, params: &Params) -> Result<Self> {
        let start = prior.needs_start().then(|| PriorStart::new(prior, params)).transpose()?;
        Ok(Kind::Prior { prior: *prior, start }.into())
    }

    /// The hooks of the authors' released code, whose adapters are on `model`: a random walk of A and a
    /// regulariser.
    ///
    /// # Errors
    /// As [`ReleasedWalk::new`].
    pub fn of_walk(model: &dyn AdaptableModel, config: &MonteCLoRAConfig, params: &Params) -> Result<Self> {
        Ok(Kind::Walk(ReleasedWalk::new(model, config, params)?).into())
    }

    /// The hooks of BLoB: descent steps on its divergence, in turns with the optimiser.
    pub fn of_divergence(config: &BlobConfig) -> Self {
        Kind::Divergence { config: config.clone(), cycle: Mutex::default() }.into()
    }

    /// The hooks of AdaLoRA, whose adapters are on `model`.
    ///
    /// # Errors
    /// As [`RankAllocator::new`].
    pub fn of_budget(model: &dyn AdaptableModel, config: &AdaLoraConfig) -> Result<Self> {
        let allocator = Mutex::new(RankAllocator::new(model, config)?);
        Ok(Kind::Budget { weight: config.orthogonal_weight, allocator }.into())
    }

    /// Sets the settings returned by [`Self::settings`].
    pub fn with_settings(self, settings: Settings) -> Self {
        Self { settings, ..self }
    }

    /// Returns the settings that must agree to resume from a checkpoint: the method and its targets, as set
    /// by [`MethodInit::inject`](super::MethodInit::inject), else none.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether [`Self::loss`] needs the number of training rows.
    pub fn needs_rows(&self) -> bool {
        match &self.kind {
            Kind::Posterior { regularizer, .. } => regularizer.needs_rows(),
            Kind::Prior { .. } => true,
            Kind::None | Kind::Walk(_) | Kind::Divergence { .. } | Kind::Budget { .. } => false,
        }
    }

    /// Returns the task's loss with the method's penalty. `rows` is the number of training rows (of target
    /// tokens for a language model), by which a prior and the evidence bound are weighed.
    ///
    /// # Errors
    /// If candle fails, the model has no layer of the method, or `rows` are needed but missing.
    pub fn loss(
        &self,
        task: Tensor,
        model: &dyn AdaptableModel,
        cx: &Context,
        rows: Option<usize>,
    ) -> Result<Loss> {
        let rows = rows.map(|rows| rows as f64);
        match &self.kind {
            Kind::None => Ok(Loss { total: task.clone(), terms: vec![("task", task)] }),
            Kind::Posterior { regularizer, .. } => {
                let penalty = regularizer.for_model_on(model, cx, rows)?;
                let total = joined(Some(task.clone()), penalty.total)?;
                let mut terms = vec![
                    ("task", task),
                    ("kl_gaussian", penalty.kl_gaussian),
                    ("kl_wishart", penalty.kl_wishart),
                    ("kl_dirichlet", penalty.kl_dirichlet),
                    ("cooperative", penalty.cooperative),
                ];
                terms.extend(penalty.prior.map(|prior| ("prior", prior)));
                terms.extend(penalty.kl_mean.map(|kl| ("kl_mean", kl)));
                Ok(Loss { total, terms })
            }
            Kind::Walk(walk) => {
                let penalty = walk.penalty(cx)?;
                let total = joined(Some(task.clone()), penalty.total.clone())?;
                Ok(Loss { total, terms: vec![("task", task), ("regularizer", penalty.total)] })
            }
            Kind::Divergence { .. } => {
                let mut kl = Tensor::zeros((), task.dtype(), task.device())?;
                blob::visit(model, &mut |layer| {
                    kl = (&kl + ops::carry(&layer.kl()?.detach(), task.device())?.to_dtype(task.dtype())?)?;
                    Ok(())
                })?;
                Ok(Loss { total: task.clone(), terms: vec![("task", task), ("kl", kl)] })
            }
            Kind::Prior { prior, start } => {
                let energy = prior_energy_on(model, prior, start.as_ref(), cx.tape())?
                    .ok_or_else(|| Error::config("adapter", "no layer has an active LoRA adapter"))?;
                let weight = prior.temperature / training_rows(rows)?;
                let total = joined(Some(task.clone()), (&energy * weight)?)?;
                Ok(Loss { total, terms: vec![("task", task), ("prior", energy)] })
            }
            Kind::Budget { weight, .. } => {
                let penalty = orthogonal_penalty(model)?
                    .ok_or_else(|| Error::config("adapter", "no layer has an active AdaLoRA adapter"))?;
                let total = joined(Some(task.clone()), (&penalty * *weight)?)?;
                Ok(Loss { total, terms: vec![("task", task), ("orthogonal", penalty)] })
            }
        }
    }

    /// Adds to the context of a forward pass what the method needs: the present factors of eps, which replace
    /// the context's. A custom objective must run its forward passes in this context for a schedule to take
    /// effect.
    ///
    /// # Errors
    /// If an earlier step panicked.
    pub fn context(&self, cx: &Context) -> Result<Context> {
        match &self.kind {
            Kind::Posterior { scaler, .. } => Ok(cx.clone().with_scaler_factors(locked(scaler)?.factors())),
            Kind::None | Kind::Prior { .. } | Kind::Walk(_) => Ok(cx.clone()),
            Kind::Divergence { .. } | Kind::Budget { .. } => Ok(cx.clone()),
        }
    }

    /// Sets the number of training rows and the batch size, which BLoB's weights of the divergence depend on.
    ///
    /// # Errors
    /// If an earlier step panicked.
    pub fn tell_rows(&self, rows: impl FnOnce() -> usize, batch_size: usize) -> Result<()> {
        if let Kind::Divergence { config, cycle } = &self.kind {
            *locked(cycle)? = Some(blob::cycle(rows(), batch_size, config.gamma));
        }
        Ok(())
    }

    /// Called before optimiser step `step` (1-based) of `total`.
    ///
    /// # Errors
    /// As [`SampleScaler::before_step`] and [`ReleasedWalk::before_step`].
    pub fn before_step(&self, step: usize, total: usize) -> Result<()> {
        match &self.kind {
            Kind::Posterior { scaler, .. } => locked(scaler)?.before_step(step, total),
            Kind::Walk(walk) => walk.before_step(step),
            Kind::None | Kind::Prior { .. } | Kind::Divergence { .. } | Kind::Budget { .. } => Ok(()),
        }
    }

    /// Called after optimiser step `step` (1-based) of `total` with its gradients, before or after clipping.
    ///
    /// # Errors
    /// As [`RankAllocator::after_step`] and [`SampleScaler::after_step`]. For BLoB, if [`Self::tell_rows`]
    /// was not called, or its parameters would not be finite.
    pub fn after_step(
        &self,
        model: &dyn AdaptableModel,
        params: &Params,
        gradients: &Gradients,
        step: usize,
        total: usize,
    ) -> Result<()> {
        match &self.kind {
            Kind::None | Kind::Prior { .. } | Kind::Walk(_) => Ok(()),
            Kind::Divergence { config, cycle } => {
                let reason = "BLoB's KL term needs the number of training rows: call tell_rows first";
                let m = (*locked(cycle)?).ok_or_else(|| Error::config("rows", reason))?;
                // Linear with 6 % warm-up, as in the authors' scripts.
                let warmup = (0.06 * total as f64).ceil() as usize;
                let lr = config.kl_lr * Schedule::Linear.factor(step.saturating_sub(1), warmup, total);
                let rate = lr * blob::kl_share(step, m);
                blob::visit(model, &mut |layer| layer.descend(params, rate))
            }
            Kind::Posterior { scaler, .. } => locked(scaler)?.after_step(model, &|name| {
                // A frozen A (post hoc) has no gradient, and thus no signal that could fade.
                gradients.get(name)?.map_or(Ok(0.0), |gradient| Ok(ops::sum_of_squares(&gradient)?))
            }),
            Kind::Budget { allocator, .. } => {
                let gradients = gradients.tensors()?;
                locked(allocator)?.after_step(params, &|name| gradients.get(name).cloned(), step, total)
            }
        }
    }

    /// Returns the method's state between steps besides its parameters.
    ///
    /// # Errors
    /// If candle fails.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        match &self.kind {
            Kind::None | Kind::Prior { .. } => Ok(BTreeMap::new()),
            // The walk's state is A itself; the position in a cycle follows from the step number.
            Kind::Walk(_) | Kind::Divergence { .. } => Ok(BTreeMap::new()),
            Kind::Posterior { scaler, .. } => locked(scaler)?.state(),
            Kind::Budget { allocator, .. } => Ok(locked(allocator)?.state()),
        }
    }

    /// Restores a state from [`Self::state`].
    ///
    /// # Errors
    /// If it is not a state of this method on this model.
    pub fn restore(&self, model: &dyn AdaptableModel, state: &BTreeMap<String, Tensor>) -> Result<()> {
        match &self.kind {
            Kind::None | Kind::Prior { .. } | Kind::Walk(_) | Kind::Divergence { .. } => Ok(()),
            Kind::Posterior { scaler, .. } => locked(scaler)?.restore(model, state),
            Kind::Budget { allocator, .. } => locked(allocator)?.restore(state),
        }
    }
}

fn locked<T>(state: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    state.lock().map_err(|_| Error::config("method", "an earlier step panicked"))
}

#[cfg(test)]
mod tests;
