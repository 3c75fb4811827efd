//! BLoB: a descent step on its divergence after each step of the optimiser.

use candle_core::Tensor;

use super::hook::{Hook, StepDone};
use crate::adapter::{visit_active, AdaptableModel, Context};
use crate::adapters::{blob, Blob, BlobConfig};
use crate::error::Result;
use crate::ops;
use crate::train::objective::Loss;
use crate::train::schedule::Schedule;

#[derive(Debug)]
pub(super) struct BlobHook(pub BlobConfig);

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

    fn after_step(&self, done: &StepDone) -> Result<()> {
        let BlobConfig { gamma, kl_lr, .. } = self.0;
        let cycle = blob::cycle(done.rows, done.batch_size, gamma);
        // Linear with 6 % warm-up, as in the authors' scripts.
        let warmup = (0.06 * done.total as f64).ceil() as usize;
        let lr = kl_lr * Schedule::Linear.factor(done.step.saturating_sub(1), warmup, done.total);
        let rate = lr * blob::kl_share(done.step, cycle);
        visit_active(done.model, |layer: &Blob| layer.descend(done.params, rate)).map(drop)
    }
}
