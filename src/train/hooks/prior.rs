//! LoRA with a prior: its energy in the loss.

use candle_core::Tensor;

use super::hook::Hook;
use crate::adapter::{no_active, AdaptableModel, Context, Params, Prior, PriorStart};
use crate::adapters::lora::prior_energy_on;
use crate::error::Result;
use crate::monteclora::training_rows;
use crate::ops::joined;
use crate::train::objective::Loss;

#[derive(Debug)]
pub(super) struct PriorHook {
    prior: Prior,
    start: Option<PriorStart>,
}

impl PriorHook {
    pub fn new(prior: &Prior, params: &Params) -> Result<Self> {
        let start = prior.needs_start().then(|| PriorStart::new(prior, params)).transpose()?;
        Ok(Self { prior: *prior, start })
    }
}

impl Hook for PriorHook {
    fn loss(
        &self,
        task: Tensor,
        model: &dyn AdaptableModel,
        cx: &Context,
        rows: Option<f64>,
    ) -> Result<Loss> {
        let energy = prior_energy_on(model, &self.prior, self.start.as_ref(), cx.tape())?
            .ok_or_else(|| no_active("LoRA"))?;
        let weight = self.prior.temperature / training_rows(rows)?;
        let total = joined(Some(task.clone()), (&energy * weight)?)?;
        Ok(Loss { total, terms: vec![("task", task), ("prior", energy)] })
    }
}
