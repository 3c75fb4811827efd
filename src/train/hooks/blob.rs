//! BLoB: a descent step on its divergence after each step of the optimiser.

use std::sync::Mutex;

use candle_core::Tensor;

use super::hook::{locked, Done, Hook};
use crate::adapter::{visit_active, AdaptableModel, Context};
use crate::adapters::{blob, Blob, BlobConfig};
use crate::error::{Error, Result};
use crate::ops;
use crate::train::objective::Loss;
use crate::train::schedule::Schedule;

#[derive(Debug)]
pub(super) struct BlobHook {
    config: BlobConfig,
    /// The number of steps in a cycle of KL weights, once known. The position in it follows from the step number.
    cycle: Mutex<Option<usize>>,
}

impl BlobHook {
    pub fn new(config: &BlobConfig) -> Self {
        Self { config: config.clone(), cycle: Mutex::default() }
    }
}

impl Hook for BlobHook {
    /// The divergence is reported only: it is descended apart from the loss.
    fn loss(
        &self,
        task: Tensor,
        model: &dyn AdaptableModel,
        _cx: &Context,
        _rows: Option<f64>,
    ) -> Result<Loss> {
        let mut kl = Tensor::zeros((), task.dtype(), task.device())?;
        visit_active(model, |layer: &Blob| {
            kl = (&kl + ops::carry(&layer.kl()?.detach(), task.device())?.to_dtype(task.dtype())?)?;
            Ok(())
        })?;
        Ok(Loss { total: task.clone(), terms: vec![("task", task), ("kl", kl)] })
    }

    fn tell_rows(&self, rows: usize, batch_size: usize) -> Result<()> {
        *locked(&self.cycle)? = Some(blob::cycle(rows, batch_size, self.config.gamma));
        Ok(())
    }

    fn after_step(&self, done: &Done) -> Result<()> {
        let reason = "BLoB's KL term needs the number of training rows: call tell_rows first";
        let m = (*locked(&self.cycle)?).ok_or_else(|| Error::config("rows", reason))?;
        // Linear with 6 % warm-up, as in the authors' scripts.
        let warmup = (0.06 * done.total as f64).ceil() as usize;
        let lr = self.config.kl_lr * Schedule::Linear.factor(done.step.saturating_sub(1), warmup, done.total);
        let rate = lr * blob::kl_share(done.step, m);
        visit_active(done.model, |layer: &Blob| layer.descend(done.params, rate)).map(drop)
    }
}
