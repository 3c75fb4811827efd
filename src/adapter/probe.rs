//! Which layer is the first whose output is not finite: asked after a loss was not.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Tensor};

/// Is told of layers' outputs and remembers the first layer whose output held NaN or infinity: hand it to a
/// forward pass by [`Context::with_probe`](super::Context::with_probe) after a loss was not finite.
#[derive(Debug, Clone, Default)]
pub struct Probe {
    first: Arc<Mutex<Option<String>>>,
}

impl Probe {
    /// The path of the first layer that was found.
    pub fn first_non_finite(&self) -> Option<String> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Is told of a layer's output.
    pub(super) fn look(&self, path: &str, output: &Tensor) {
        let zero = || output.detach().to_dtype(DType::F32)?.affine(0.0, 0.0)?.sum_all()?.to_scalar::<f32>();
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        // NaN and infinity times zero are NaN.
        if first.is_none() && zero().is_ok_and(f32::is_nan) {
            *first = Some(path.to_string());
        }
    }
}
