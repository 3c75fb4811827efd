//! AdaLoRA: the orthogonality penalty in the loss, and the allocation of ranks after each step.

use std::collections::BTreeMap;
use std::sync::Mutex;

use candle_core::Tensor;

use super::hook::{locked, Hook, StepDone};
use crate::adapter::{no_active, AdaptableModel, Context};
use crate::adapters::adalora::orthogonal_penalty;
use crate::adapters::{AdaLoraConfig, RankAllocator};
use crate::error::Result;
use crate::ops::joined;
use crate::train::objective::Loss;

#[derive(Debug)]
pub(super) struct AdaLoraHook {
    weight: f64,
    allocator: Mutex<RankAllocator>,
}

impl AdaLoraHook {
    pub fn new(model: &dyn AdaptableModel, config: &AdaLoraConfig) -> Result<Self> {
        let allocator = Mutex::new(RankAllocator::new(model, config)?);
        Ok(Self { weight: config.orthogonal_weight, allocator })
    }
}

impl Hook for AdaLoraHook {
    fn loss(
        &self,
        task: Tensor,
        model: &dyn AdaptableModel,
        _cx: &Context,
        _rows: Option<f64>,
    ) -> Result<Loss> {
        let penalty = orthogonal_penalty(model)?.ok_or_else(|| no_active("AdaLoRA"))?;
        let total = joined(Some(task.clone()), (&penalty * self.weight)?)?;
        Ok(Loss { total, terms: vec![("task", task), ("orthogonal", penalty)] })
    }

    fn after_step(&self, done: &StepDone) -> Result<()> {
        let gradients = done.gradients.tensors()?;
        let gradient = |name: &str| gradients.get(name).cloned();
        locked(&self.allocator)?.after_step(done.params, &gradient, done.step, done.total)
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(locked(&self.allocator)?.state())
    }

    fn restore(&self, _model: &dyn AdaptableModel, state: &BTreeMap<String, Tensor>) -> Result<()> {
        locked(&self.allocator)?.restore(state)
    }
}
