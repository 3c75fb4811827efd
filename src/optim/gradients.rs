//! Gradients by parameter name: accumulation over micro-batches, checks, clipping.

use std::borrow::Cow;
use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};

use crate::adapter::{Param, Params};
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::kernels::multi_tensor;
use crate::ops::{self, Tape};
use crate::util::finite::is_finite;

const NO_GRADIENT: &str = "the loss gives this trainable parameter no gradient: it does not depend on it, or an \
    operation between them has no backward, as candle-nn's LayerNorm, RmsNorm, softmax_last_dim, rope and sdpa have \
    none; take monteclora::ops::{LayerNorm, RmsNorm, rotary}, candle_nn::ops::softmax, rotary_emb::rope_slow";

/// The gradients of the trainable parameters of one optimiser step.
#[derive(Debug, Clone)]
pub struct Gradients {
    by_name: BTreeMap<String, Tensor>,
    /// A pending factor of all gradients. Clipping needs no pass of its own: the optimiser applies the factor
    /// as it reads them.
    factor: f64,
}

impl Default for Gradients {
    fn default() -> Self {
        Self { by_name: BTreeMap::new(), factor: 1.0 }
    }
}

impl Gradients {
    /// Creates an empty set of gradients.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the gradients of one micro-batch, each in its parameter's dtype.
    ///
    /// # Errors
    /// If a trainable parameter has no gradient: the loss does not depend on it, or an operation in between
    /// has no backward pass.
    pub fn accumulate(&mut self, params: &Params, store: &GradStore) -> Result<()> {
        let mut by_name = self.tensors()?.into_owned();
        let (mut with_earlier, mut pairs) = (Vec::new(), Vec::new());
        for (name, param) in params.trainable() {
            let Some(grad) = store.get(&param.var) else { return Err(Error::tensor(name, NO_GRADIENT)) };
            match by_name.remove(&name) {
                Some(earlier) => {
                    pairs.push((earlier, grad.detach()));
                    with_earlier.push(name);
                }
                None => {
                    by_name.insert(name, grad.detach());
                }
            }
        }
        by_name.extend(with_earlier.into_iter().zip(ops::sums(&pairs)?));
        *self = Self { by_name, factor: 1.0 };
        Ok(())
    }

    /// Differentiates the loss of one micro-batch and adds its gradients, as [`Self::accumulate`] with
    /// `loss.backward()`, but with fewer launches on a device, especially if the loss's forward pass had
    /// `tape` in its [`Context`](crate::Context). Returns candle's store.
    ///
    /// # Errors
    /// As [`Self::accumulate`].
    pub fn backward(&mut self, params: &Params, loss: &Tensor, tape: &Tape) -> Result<GradStore> {
        let variables: Vec<Tensor> =
            params.all().into_iter().map(|(_, param)| param.var.into_inner()).collect();
        let store = ops::backward(loss, &variables, Some(tape))?;
        self.accumulate(params, &store)?;
        Ok(store)
    }

    /// Concatenates the gradients of all trainable parameters in the order of their names (zeros for missing
    /// ones) and `numbers` into one vector, for summing over processes. It is f64 if any parameter is, else
    /// f32.
    ///
    /// # Shapes
    /// - output: `(trainable scalars + numbers)`, on the device of `params`
    ///
    /// # Errors
    /// If candle fails.
    pub fn flat(&self, params: &Params, numbers: &[f64]) -> Result<Tensor> {
        let (trainable, device, tensors) = (params.trainable(), params.device(), self.tensors()?);
        let double = trainable.iter().any(|(_, param)| param.var.dtype() == DType::F64);
        let dtype = if double { DType::F64 } else { DType::F32 };
        let part = |(name, param): &(String, Param)| match tensors.get(name) {
            Some(grad) => ops::carry(&grad.flatten_all()?.to_dtype(dtype)?, device),
            None => Tensor::zeros(param.var.elem_count(), dtype, device),
        };
        let numbers = Tensor::new(numbers, device)?.to_dtype(dtype)?;
        let parts = trainable.iter().map(part).chain([Ok(numbers)]);
        Ok(Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }

    /// Splits a vector of [`Self::flat`] into gradients and numbers.
    ///
    /// # Errors
    /// If the vector is shorter than the parameters, or candle fails.
    pub fn of_flat(params: &Params, flat: &Tensor) -> Result<(Self, Vec<f64>)> {
        let (mut by_name, mut at) = (BTreeMap::new(), 0);
        for (name, param) in params.trainable() {
            let count = param.var.elem_count();
            let grad = flat.narrow(0, at, count)?.reshape(param.var.dims())?.to_dtype(param.var.dtype())?;
            by_name.insert(name, ops::carry(&grad, param.var.device())?);
            at += count;
        }
        let numbers = flat.narrow(0, at, flat.dim(0)? - at)?.to_dtype(DType::F64)?.to_vec1()?;
        Ok((Self { by_name, factor: 1.0 }, numbers))
    }

    /// Returns the gradient of a parameter.
    ///
    /// # Errors
    /// If candle fails.
    pub fn get(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(self.by_name.get(name).map(|grad| times(grad, self.factor)).transpose()?)
    }

    /// Returns all gradients by name. A pending factor is applied in one launch on a device.
    ///
    /// # Errors
    /// If candle fails.
    pub fn tensors(&self) -> Result<Cow<'_, BTreeMap<String, Tensor>>> {
        if self.factor == 1.0 {
            return Ok(Cow::Borrowed(&self.by_name));
        }
        #[cfg(feature = "cuda")]
        if let Some(scaled) = multi_tensor::scaled(&self.by_name.values().collect::<Vec<_>>(), self.factor)? {
            return Ok(Cow::Owned(self.by_name.keys().cloned().zip(scaled).collect()));
        }
        let scaled = self.by_name.iter().map(|(name, grad)| Ok((name.clone(), (grad * self.factor)?)));
        Ok(Cow::Owned(scaled.collect::<Result<_>>()?))
    }

    /// Returns the gradient of a parameter before multiplication by [`Self::factor`].
    pub(super) fn unscaled(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name)
    }

    /// Returns the pending factor of all gradients.
    pub(super) fn factor(&self) -> f64 {
        self.factor
    }

    /// Multiplies every gradient by `factor`, lazily: AdamW applies the factor in its own pass.
    pub fn scale(&mut self, factor: f64) {
        self.factor *= factor;
    }

    /// Returns the Euclidean norm of all gradients together, NaN or infinite if one of them is.
    ///
    /// # Errors
    /// If candle fails.
    pub fn norm(&self) -> Result<f64> {
        Ok(self.unscaled_norm()? * self.factor.abs())
    }

    fn unscaled_norm(&self) -> Result<f64> {
        if self.by_name.values().all(|grad| grad.device().is_cpu()) {
            let squares = self.by_name.values().map(ops::sum_of_squares);
            return Ok(squares.sum::<candle_core::Result<f64>>()?.sqrt());
        }
        #[cfg(feature = "cuda")]
        if let Some(sum) = multi_tensor::sum_of_squares(&self.by_name.values().collect::<Vec<_>>())? {
            return Ok(sum.sqrt());
        }
        // On a device, one copy to the host for all of them.
        let squares = self.by_name.values().map(|grad| grad.to_dtype(DType::F64)?.sqr()?.sum_all());
        let squares = squares.collect::<candle_core::Result<Vec<_>>>()?;
        Ok(ops::stacked(&squares)?.sum_all()?.to_scalar::<f64>()?.sqrt())
    }

    /// Returns the name of the first gradient that holds NaN or infinity.
    ///
    /// # Errors
    /// If candle fails.
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
        for name in self.by_name.keys() {
            if let Some(grad) = self.get(name)? {
                if !is_finite(&grad)? {
                    return Ok(Some(name));
                }
            }
        }
        Ok(None)
    }
}

/// Multiplies a gradient by a factor, without an operation if the factor is 1.
pub(super) fn times(grad: &Tensor, factor: f64) -> candle_core::Result<Tensor> {
    if factor == 1.0 {
        return Ok(grad.clone());
    }
    grad * factor
}

/// Scales the gradients so that their global norm is at most `max_norm`, as PyTorch's `clip_grad_norm_` does;
/// returns the norm before scaling.
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
        grads.scale(factor);
    }
    Ok(norm)
}

/// The result of [`check_gradients`]: parameters by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GradientReport {
    /// Trainable parameters without a gradient.
    pub missing: Vec<String>,
    /// Trainable parameters whose gradient holds NaN or infinity.
    pub non_finite: Vec<String>,
    /// Frozen parameters of the store that got a gradient: wasted work.
    pub frozen: Vec<String>,
    /// The number of tensors outside the store that got a gradient: wasted work. Candle's own sums and
    /// products also differentiate their untracked side, so that a residual connection to an input counts
    /// here, as does a frozen weight that is not detached.
    pub unexpected: usize,
}

impl GradientReport {
    /// Whether every trainable parameter has a finite gradient and no frozen one of the store has any.
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.non_finite.is_empty() && self.frozen.is_empty()
    }

    /// [`Self::is_clean`], and nothing outside the store has a gradient. The models of this crate are exact.
    pub fn is_exact(&self) -> bool {
        self.is_clean() && self.unexpected == 0
    }
}

/// Differentiates `loss` and reports the trainable parameters without a finite gradient, and everything else
/// that has one, inside the store and outside. Candle's fused operations without a backward pass cut
/// gradients silently, and its optimiser skips parameters without one: run this check before a long run.
///
/// An existing gradient may still be wrong: around a residual connection, the cut branch is missing from the
/// sum. [`check_gradients_numerically`](super::check_gradients_numerically) detects that.
///
/// # Errors
/// If the backward pass fails.
pub fn check_gradients(params: &Params, loss: &Tensor) -> Result<GradientReport> {
    let store = loss.backward()?;
    let mut report = GradientReport::default();
    let all = params.all();
    let known: Vec<_> = all.iter().map(|(_, param)| param.var.id()).collect();
    for (name, param) in all {
        match store.get(&param.var) {
            None if !param.trainable => {}
            Some(_) if !param.trainable => report.frozen.push(name),
            None => report.missing.push(name),
            Some(grad) => {
                if !is_finite(grad)? {
                    report.non_finite.push(name);
                }
            }
        }
    }
    report.unexpected = store.get_ids().filter(|id| !known.contains(id)).count();
    Ok(report)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::adapter::{Init, Role};
    use crate::noise::Noise;

    fn store() -> Result<(Params, Tensor, Tensor)> {
        let params = Params::with_dtype(Noise::new(1), DType::F64, &Device::Cpu);
        let a = params.create("a", Role::Base, 2, &Init::Constant(1.0))?;
        let b = params.create("b", Role::Base, 2, &Init::Constant(2.0))?;
        Ok((params, a, b))
    }

    /// Gradients `(3, -4)` of a and `(12, 0.5)` of b.
    fn grads(params: &Params, a: &Tensor, b: &Tensor) -> Result<Gradients> {
        let weights = |w: [f64; 2]| Tensor::new(&w, &Device::Cpu);
        let loss = ((a * weights([3.0, -4.0])?)?.sum_all()? + (b * weights([12.0, 0.5])?)?.sum_all()?)?;
        let mut grads = Gradients::new();
        grads.accumulate(params, &loss.backward()?)?;
        Ok(grads)
    }

    #[test]
    fn clipping_is_that_of_torch() -> Result<()> {
        // a.grad = torch.tensor([3., -4.]); b.grad = torch.tensor([12., .5])
        // torch.nn.utils.clip_grad_norm_([a, b], 2.0)
        let (params, a, b) = store()?;
        let mut grads = grads(&params, &a, &b)?;
        assert!((clip_grad_norm(&mut grads, 2.0)? - 13.009611831257688).abs() < 1e-12);
        let got = grads.get("b")?.unwrap().to_vec1::<f64>()?;
        assert!((got[0] - 1.844789719055754).abs() < 1e-12 && (got[1] - 0.07686623829398975).abs() < 1e-12);
        // A norm below the limit changes nothing.
        let norm = grads.norm()?;
        assert!((clip_grad_norm(&mut grads, 5.0)? - norm).abs() < 1e-15 && (norm - 2.0).abs() < 1e-6);
        assert!(clip_grad_norm(&mut grads, 0.0).unwrap_err().to_string().contains("clip"));
        Ok(())
    }

    #[test]
    fn a_parameter_the_loss_does_not_reach_is_named() -> Result<()> {
        let (params, a, _) = store()?;
        let loss = a.sum_all()?;
        let error = Gradients::new().accumulate(&params, &loss.backward()?).unwrap_err().to_string();
        assert!(error.contains("tensor b") && error.contains("candle-nn's LayerNorm"), "{error}");
        assert_eq!(check_gradients(&params, &loss)?.missing, ["b"]);
        Ok(())
    }

    #[test]
    fn the_check_sees_infinite_and_useless_gradients() -> Result<()> {
        let (params, a, b) = store()?;
        let clean = (&a * &b)?.sum_all()?;
        assert!(check_gradients(&params, &clean)?.is_exact());
        let infinite = ((&a - 1.0)?.log()?.sum_all()? + b.sum_all()?)?;
        assert_eq!(check_gradients(&params, &infinite)?.non_finite, ["a"]);
        let stranger = Var::new(&[1.0, 1.0], &Device::Cpu)?;
        let useless = ((&a * &b)? * stranger.as_tensor())?.sum_all()?;
        let report = check_gradients(&params, &useless)?;
        assert!(report.unexpected == 1 && report.is_clean() && !report.is_exact());
        // An ordinary residual connection.
        let input = Tensor::new(&[1.0, 2.0], &Device::Cpu)?;
        let residual = (&input + (&a * &b)?)?.sum_all()?;
        assert!(check_gradients(&params, &residual)?.is_clean());
        let mut grads = Gradients::new();
        grads.accumulate(&params, &infinite.backward()?)?;
        assert_eq!(grads.first_non_finite()?, Some("a"));
        Ok(())
    }

    #[test]
    fn the_check_sees_gradients_of_what_is_frozen_in_the_store() -> Result<()> {
        let (params, a, _) = store()?;
        let c = params.create("c", Role::Head, 2, &Init::Constant(3.0))?;
        params.set_trainable(Role::Base, false);
        let report = check_gradients(&params, &(&a * &c)?.sum_all()?)?;
        assert_eq!(report.frozen, ["a"]);
        assert!(report.missing.is_empty() && report.unexpected == 0 && !report.is_clean());
        Ok(())
    }
}
