//! What a method asks of training beside the task's loss: a penalty, and work between two steps.

use std::sync::Mutex;

use candle_core::Tensor;

use super::gradients::Gradients;
use super::trainer::Loss;
use crate::adapters::adalora::{orthogonal_penalty, RankAllocator};
use crate::adapters::AdaLoraConfig;
use crate::error::{Error, Result};
use crate::monteclora::Regularizer;
use crate::params::Params;
use crate::slot::{Linears, Pass};

/// A method's part of training; the default is that of a method which has none.
#[derive(Debug, Default)]
pub struct Upkeep(Kind);

#[derive(Debug, Default)]
enum Kind {
    #[default]
    None,
    Posterior(Regularizer),
    Budget {
        weight: f64,
        // A step is told to a shared objective; steps do not overlap.
        allocator: Mutex<RankAllocator>,
    },
}

impl From<Regularizer> for Upkeep {
    fn from(regularizer: Regularizer) -> Self {
        Self(Kind::Posterior(regularizer))
    }
}

impl Upkeep {
    /// That of AdaLoRA, whose adapters are on `model`.
    ///
    /// # Errors
    /// As [`RankAllocator::new`].
    pub fn of_budget(model: &dyn Linears, config: &AdaLoraConfig) -> Result<Self> {
        let allocator = Mutex::new(RankAllocator::new(model, config)?);
        Ok(Self(Kind::Budget { weight: config.orthogonal_weight, allocator }))
    }

    /// The task's loss with the method's penalty.
    ///
    /// # Errors
    /// If candle fails, or the model has no layer of the method.
    pub fn loss(&self, task: Tensor, model: &dyn Linears, pass: &Pass) -> Result<Loss> {
        match &self.0 {
            Kind::None => Ok(Loss { total: task.clone(), terms: vec![("task", task)] }),
            Kind::Posterior(regularizer) => {
                let penalty = regularizer.for_model(model, pass)?;
                let total = (&task + &penalty.total)?;
                let terms = vec![
                    ("task", task),
                    ("kl_gaussian", penalty.kl_gaussian),
                    ("kl_wishart", penalty.kl_wishart),
                    ("kl_dirichlet", penalty.kl_dirichlet),
                    ("cooperative", penalty.cooperative),
                ];
                Ok(Loss { total, terms })
            }
            Kind::Budget { weight, .. } => {
                let penalty = orthogonal_penalty(model)?
                    .ok_or_else(|| Error::config("adapter", "no layer has an active AdaLoRA adapter"))?;
                let total = (&task + (&penalty * *weight)?)?;
                Ok(Loss { total, terms: vec![("task", task), ("orthogonal", penalty)] })
            }
        }
    }

    /// After optimiser step `step` (1-based) of `total` with these gradients.
    ///
    /// # Errors
    /// As [`RankAllocator::after_step`].
    pub fn after_step(
        &self,
        params: &Params,
        gradients: &Gradients,
        step: usize,
        total: usize,
    ) -> Result<()> {
        let Kind::Budget { allocator, .. } = &self.0 else { return Ok(()) };
        let mut allocator = allocator.lock().map_err(|_| Error::config("adapter", "a step panicked"))?;
        allocator.after_step(params, &|name| gradients.get(name).cloned(), step, total)
    }
}
