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

    fn tell_rows(&self, _rows: usize, _batch_size: usize) -> Result<()> {
        Ok(())
    }

    fn before_step(&self, _step: usize, _total: usize) -> Result<()> {
        Ok(())
    }

    fn after_step(&self, _done: &Done) -> Result<()> {
        Ok(())
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(BTreeMap::new())
    }

    fn restore(&self, _model: &dyn AdaptableModel, _state: &BTreeMap<String, Tensor>) -> Result<()> {
        Ok(())
    }
}

/// An optimiser step that was taken.
pub(super) struct Done<'a> {
    pub model: &'a dyn AdaptableModel,
    pub params: &'a Params,
    pub gradients: &'a Gradients,
    /// The number of the step, from 1, and that of all steps.
    pub step: usize,
    pub total: usize,
}

/// Locks the state of a hook: objectives are shared, but steps do not overlap.
pub(super) fn locked<T>(state: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    state.lock().map_err(|_| Error::config("method", "an earlier step panicked"))
}
