//! What one method adds to training: the interface behind [`MethodHooks`](super::MethodHooks).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard};

use candle_core::Tensor;

use crate::adapter::{AdaptableModel, Context, Params};
use crate::error::{Error, Result};
use crate::optim::Gradients;
use crate::train::objective::Loss;

/// One method's part in training. The methods of [`MethodHooks`](super::MethodHooks) have the same names and
/// document them; what a method does not override is that of plain LoRA.
pub(super) trait Hook: fmt::Debug + Send + Sync {
    fn loss(
        &self,
        task: Tensor,
        _model: &dyn AdaptableModel,
        _cx: &Context,
        _rows: Option<f64>,
    ) -> Result<Loss> {
        Ok(Loss { total: task.clone(), terms: vec![("task", task)] })
    }

    fn context(&self, cx: &Context) -> Result<Context> {
        Ok(cx.clone())
    }

    fn before_step(&self, _step: usize, _total: usize) -> Result<()> {
        Ok(())
    }

    fn after_step(&self, _done: &StepDone) -> Result<()> {
        Ok(())
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(BTreeMap::new())
    }

    fn restore(&self, _model: &dyn AdaptableModel, _state: &BTreeMap<String, Tensor>) -> Result<()> {
        Ok(())
    }
}

/// An optimiser step that was taken, for [`MethodHooks::after_step`](super::MethodHooks::after_step).
#[derive(Clone, Copy)]
pub struct StepDone<'a> {
    /// The model with its adapters.
    pub model: &'a dyn AdaptableModel,
    /// The parameters after the step.
    pub params: &'a Params,
    /// The gradients of the step, before or after clipping.
    pub gradients: &'a Gradients,
    /// The number of the step, from 1.
    pub step: usize,
    /// The number of steps of the run.
    pub total: usize,
    /// The number of training rows.
    pub rows: usize,
    /// The number of rows in a batch.
    pub batch_size: usize,
}

impl fmt::Debug for StepDone<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepDone")
            .field("step", &self.step)
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}

/// Locks the state of a hook: objectives are shared, but steps do not overlap.
pub(super) fn locked<T>(state: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    state.lock().map_err(|_| Error::config("method", "an earlier step panicked"))
}
