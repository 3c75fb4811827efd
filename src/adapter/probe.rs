//! Finds the first layer with a non-finite output, after a loss was not finite.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;

use crate::util::finite::is_finite;

/// Remembers the first layer whose output contains NaN or infinity. Add it to a forward pass with
/// [`Context::with_probe`](super::Context::with_probe) after a loss was not finite.
#[derive(Debug, Clone, Default)]
pub struct Probe {
    first: Arc<Mutex<Option<String>>>,
}

impl Probe {
    /// The path of the first layer with a non-finite output, if any.
    pub fn first_non_finite(&self) -> Option<String> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Checks a layer's output.
    pub(super) fn look(&self, path: &str, output: &Tensor) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() && is_finite(output).is_ok_and(|finite| !finite) {
            *first = Some(path.to_string());
        }
    }
}
