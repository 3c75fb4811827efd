//! Gradients by parameter name: accumulated over micro-batches, checked, clipped.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::params::Params;

/// The gradients of the trainable parameters of one optimiser step.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    by_name: BTreeMap<String, Tensor>,
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the gradients of one micro-batch, each in its parameter's dtype.
    ///
    /// # Errors
    /// If a trainable parameter has no gradient: the loss does not depend on it, or an operation
    /// on the way cuts gradients.
    pub fn accumulate(&mut self, params: &Params, store: &GradStore) -> Result<()> {
        for (name, param) in params.trainable() {
            let Some(grad) = store.get(&param.var) else {
                return Err(Error::tensor(name, "the loss gives this trainable parameter no gradient"));
            };
            let sum = match self.by_name.get(&name) {
                Some(earlier) => (earlier + grad)?.detach(),
                None => grad.detach(),
            };
            self.by_name.insert(name, sum);
        }
        Ok(())
    }

    /// The gradient of a parameter.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name)
    }

    /// All gradients, in the order of the parameters' names.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.by_name.iter()
    }

    /// Multiplies every gradient by `factor`.
    ///
    /// # Errors
    /// If candle fails.
    pub fn scale(&mut self, factor: f64) -> Result<()> {
        for grad in self.by_name.values_mut() {
            *grad = (&*grad * factor)?;
        }
        Ok(())
    }

    /// The Euclidean norm over all gradients together. It is NaN or infinite when one of them is.
    ///
    /// # Errors
    /// If candle fails.
    pub fn norm(&self) -> Result<f64> {
        let squares = self.by_name.values().map(|grad| grad.to_dtype(DType::F64)?.sqr()?.sum_all());
        let squares = squares.collect::<candle_core::Result<Vec<_>>>()?;
        match squares.is_empty() {
            true => Ok(0.0),
            false => Ok(Tensor::stack(&squares, 0)?.sum_all()?.to_scalar::<f64>()?.sqrt()),
        }
    }

    /// The name of the first gradient that holds NaN or infinity.
    ///
    /// # Errors
    /// If candle fails.
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
        for (name, grad) in &self.by_name {
            let sum = grad.to_dtype(DType::F64)?.abs()?.sum_all()?.to_scalar::<f64>()?;
            if !sum.is_finite() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

/// Scales the gradients so that their global norm is at most `max_norm`, as PyTorch's
/// `clip_grad_norm_` does; returns the norm before.
///
/// # Errors
/// If `max_norm` is not positive, or candle fails.
pub fn clip_grad_norm(grads: &mut Gradients, max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(Error::config("clip", format!("expected a positive norm, got {max_norm}")));
    }
    let norm = grads.norm()?;
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        grads.scale(factor)?;
    }
    Ok(norm)
}
