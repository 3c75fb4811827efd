//! Which layer is the first whose output is not finite: asked after a loss was not.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;

use crate::util::finite::is_finite;

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
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() && is_finite(output).is_ok_and(|finite| !finite) {
            *first = Some(path.to_string());
        }
    }
}
