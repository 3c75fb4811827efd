//! The authors' released code: a random walk of A before each step, and its regulariser in the loss.

use candle_core::Tensor;

use super::hook::Hook;
use crate::adapter::{AdaptableModel, Context};
use crate::error::Result;
use crate::monteclora::ReleasedWalk;
use crate::ops::joined;
use crate::train::objective::Loss;

/// The walk's state is A itself, so that a checkpoint needs nothing else.
#[derive(Debug)]
pub(super) struct ReleasedHook(pub ReleasedWalk);

impl Hook for ReleasedHook {
    fn loss(
        &self,
        task: Tensor,
        _model: &dyn AdaptableModel,
        cx: &Context,
        _rows: Option<f64>,
    ) -> Result<Loss> {
        let penalty = self.0.penalty(cx)?;
        let total = joined(Some(task.clone()), penalty.total.clone())?;
        Ok(Loss { total, terms: vec![("task", task), ("regularizer", penalty.total)] })
    }

    fn before_step(&self, step: usize, _total: usize) -> Result<()> {
        self.0.before_step(step)
    }
}
