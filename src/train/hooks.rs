//! What a method asks of training beside the task's loss: a penalty, and work between two steps.

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

/// A method's part of training; the default is that of a method which has none.
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
        // As below.
        scaler: Mutex<SampleScaler>,
    },
    Walk(ReleasedWalk),
    Divergence {
        config: BlobConfig,
        // The steps of a cycle of weights, once it is told.
        cycle: Mutex<Option<usize>>,
    },
    Prior {
        prior: Prior,
        start: Option<PriorStart>,
    },
    Budget {
        weight: f64,
        // A step is told to a shared objective; steps do not overlap.
        allocator: Mutex<RankAllocator>,
    },
}

impl From<Kind> for MethodHooks {
    fn from(kind: Kind) -> Self {
        Self { kind, settings: Settings::new() }
    }
}

impl MethodHooks {
    /// That of MonteCLoRA: its regulariser, and the course of its sample scaler. The present values of
    /// `params` are where training starts.
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn of_posterior(config: &MonteCLoRAConfig, params: &Params) -> Result<Self> {
        let scaler = Mutex::new(SampleScaler::new(config.scaler_schedule));
        Ok(Kind::Posterior { regularizer: Regularizer::new(config).with_start(params)?, scaler }.into())
    }

    /// That of LoRA with a prior. The present values of `params` are where training starts.
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn of_prior(prior: &Prior, params: &Params) -> Result<Self> {
        let start = prior.needs_start().then(|| PriorStart::new(prior, params)).transpose()?;
        Ok(Kind::Prior { prior: *prior, start }.into())
    }

    /// That of the authors' released code, whose adapters are on `model`: a random walk of A, and a regulariser.
    ///
    /// # Errors
    /// As [`ReleasedWalk::new`].
    pub fn of_walk(model: &dyn AdaptableModel, config: &MonteCLoRAConfig, params: &Params) -> Result<Self> {
        Ok(Kind::Walk(ReleasedWalk::new(model, config, params)?).into())
    }

    /// That of BLoB: the descent of its divergence, by turns with the optimiser.
    pub fn of_divergence(config: &BlobConfig) -> Self {
        Kind::Divergence { config: config.clone(), cycle: Mutex::default() }.into()
    }

    /// That of AdaLoRA, whose adapters are on `model`.
    ///
    /// # Errors
    /// As [`RankAllocator::new`].
    pub fn of_budget(model: &dyn AdaptableModel, config: &AdaLoraConfig) -> Result<Self> {
        let allocator = Mutex::new(RankAllocator::new(model, config)?);
        Ok(Kind::Budget { weight: config.orthogonal_weight, allocator }.into())
    }

    /// The same with these settings for [`Self::settings`].
    pub fn with_settings(self, settings: Settings) -> Self {
        Self { settings, ..self }
    }

    /// What a run must find unchanged to go on from a checkpoint: the method and where it is, if that
    /// was told. [`MethodInit::inject`](super::MethodInit::inject) tells it.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether [`Self::loss`] asks for the number of training rows.
    pub fn needs_rows(&self) -> bool {
        match &self.kind {
            Kind::Posterior { regularizer, .. } => regularizer.needs_rows(),
            Kind::Prior { .. } => true,
            Kind::None | Kind::Walk(_) | Kind::Divergence { .. } | Kind::Budget { .. } => false,
        }
    }

    /// The task's loss with the method's penalty. `rows`: how many rows the run trains on (of a language model:
    /// target tokens), which a prior and the evidence bound weigh by.
    ///
    /// # Errors
    /// If candle fails, the model has no layer of the method, or `rows` are asked for and not there.
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

    /// The context of a forward pass with what the method adds: the present factors on eps, in place of
    /// those that it has. An objective of one's own runs its forward passes in it, or a schedule has no
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

    /// Tells how many rows a run trains on, in batches of how many: what BLoB's weights of the divergence ask for.
    ///
    /// # Errors
    /// If an earlier step panicked.
    pub fn tell_rows(&self, rows: impl FnOnce() -> usize, batch_size: usize) -> Result<()> {
        if let Kind::Divergence { config, cycle } = &self.kind {
            *locked(cycle)? = Some(blob::cycle(rows(), batch_size, config.gamma));
        }
        Ok(())
    }

    /// Before optimiser step `step` (1-based) of `total`.
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

    /// After optimiser step `step` (1-based) of `total` with these gradients, before clipping or after.
    ///
    /// # Errors
    /// As [`RankAllocator::after_step`] and [`SampleScaler::after_step`]; of BLoB if [`Self::tell_rows`] was not
    /// called, or its parameters would not be finite.
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
                let reason = "BLoB's weights ask for the number of training rows: tell_rows";
                let m = (*locked(cycle)?).ok_or_else(|| Error::config("rows", reason))?;
                // Linear with a warm-up of 6 %, as in the authors' scripts.
                let warmup = (0.06 * total as f64).ceil() as usize;
                let lr = config.kl_lr * Schedule::Linear.factor(step.saturating_sub(1), warmup, total);
                let rate = lr * blob::kl_share(step, m);
                blob::visit(model, &mut |layer| layer.descend(params, rate))
            }
            Kind::Posterior { scaler, .. } => locked(scaler)?.after_step(model, &|name| {
                // Frozen (post-hoc), A has no gradient, and nothing that could fade.
                gradients.get(name)?.map_or(Ok(0.0), |gradient| Ok(ops::sum_of_squares(&gradient)?))
            }),
            Kind::Budget { allocator, .. } => {
                let gradients = gradients.tensors()?;
                locked(allocator)?.after_step(params, &|name| gradients.get(name).cloned(), step, total)
            }
        }
    }

    /// What the method remembers from step to step, beside its parameters.
    ///
    /// # Errors
    /// If candle fails.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        match &self.kind {
            Kind::None | Kind::Prior { .. } => Ok(BTreeMap::new()),
            // The walk is A itself, the place in a cycle the step's number.
            Kind::Walk(_) | Kind::Divergence { .. } => Ok(BTreeMap::new()),
            Kind::Posterior { scaler, .. } => locked(scaler)?.state(),
            Kind::Budget { allocator, .. } => Ok(locked(allocator)?.state()),
        }
    }

    /// Puts back what [`Self::state`] gave.
    ///
    /// # Errors
    /// If it is not the state of this method on this model.
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
