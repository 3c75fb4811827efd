//! The pieces that models share: fetching by name, norms, dropout.

use std::sync::Arc;

use candle_core::Tensor;
use candle_nn::{Init, Linear, VarBuilder};

use crate::adapter::{AdaptableLinear, Context};
use crate::error::{Error, Result};
use crate::noise::{Noise, Purpose, Stream};
use crate::ops::{self, OpPath};

/// Fetches a linear layer, `weight` (out, in) and `bias` (out), by name. Where the builder starts
/// new parameters, the weight is normal with standard deviation `init_std` and the bias zero.
///
/// # Errors
/// If a tensor is missing or of another shape.
pub fn linear(in_dim: usize, out_dim: usize, init_std: f64, vb: &VarBuilder) -> Result<Linear> {
    let init = Init::Randn { mean: 0.0, stdev: init_std };
    let weight = vb.get_with_hints((out_dim, in_dim), "weight", init)?;
    let bias = vb.get_with_hints(out_dim, "bias", Init::Const(0.0))?;
    Ok(Linear::new(weight, Some(bias)))
}

/// A [`linear`] layer that adapters can be put on. `path` is its Hugging Face name.
///
/// # Errors
/// As [`linear`].
pub fn adaptable_linear(
    path: &str,
    in_dim: usize,
    out_dim: usize,
    init_std: f64,
    vb: &VarBuilder,
) -> Result<AdaptableLinear> {
    Ok(AdaptableLinear::new(path, linear(in_dim, out_dim, init_std, vb)?))
}

/// A [`adaptable_linear`] without a bias, as in LLaMA.
///
/// # Errors
/// As [`linear`].
pub fn adaptable_linear_no_bias(
    path: &str,
    in_dim: usize,
    out_dim: usize,
    init_std: f64,
    vb: &VarBuilder,
) -> Result<AdaptableLinear> {
    let init = Init::Randn { mean: 0.0, stdev: init_std };
    Ok(AdaptableLinear::new(path, Linear::new(vb.get_with_hints((out_dim, in_dim), "weight", init)?, None)))
}

/// Calls `f` on every layer of a stack, to change it in place.
///
/// # Errors
/// The first error of `f`; or if a layer is still part of a graph that waits for its backward
/// (gradient checkpointing), which must be dropped first.
pub fn unshared<L>(layers: &mut [Arc<L>], f: impl FnMut(&mut L) -> Result<()>) -> Result<()> {
    // All of them first: a change is whole or none.
    if let Some(i) = layers.iter_mut().position(|layer| Arc::get_mut(layer).is_none()) {
        let reason = format!("layer {i} waits for the backward pass of a loss: drop the loss first");
        return Err(Error::config("model", reason));
    }
    layers.iter_mut().filter_map(Arc::get_mut).try_for_each(f)
}

/// Layer norm over the last dimension (Ba et al. 2016).
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Fetches `weight` and `bias` (dim), or `gamma` and `beta` as old BERT checkpoints call them.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(dim: usize, eps: f64, vb: &VarBuilder) -> Result<Self> {
        let old = vb.contains_tensor("gamma");
        let (weight, bias) = if old { ("gamma", "beta") } else { ("weight", "bias") };
        Ok(Self {
            weight: vb.get_with_hints(dim, weight, Init::Const(1.0))?,
            bias: vb.get_with_hints(dim, bias, Init::Const(0.0))?,
            eps,
        })
    }

    /// Its weight and bias.
    pub fn parameters(&self) -> Vec<Tensor> {
        vec![self.weight.clone(), self.bias.clone()]
    }

    /// The normalised `xs` (.., dim).
    ///
    /// # Errors
    /// If the last dimension differs.
    pub fn forward(&self, xs: &Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        ops::layer_norm(xs, &self.weight, &self.bias, self.eps, path)
    }

    /// The normalised sum of `xs` and `residual`, both (.., dim).
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        ops::add_layer_norm(xs, residual, &self.weight, &self.bias, self.eps, path)
    }
}

/// RMS norm over the last dimension (Zhang and Sennrich 2019).
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Fetches `weight` (dim).
    ///
    /// # Errors
    /// If the tensor is missing or of another shape.
    pub fn load(dim: usize, eps: f64, vb: &VarBuilder) -> Result<Self> {
        Ok(Self { weight: vb.get_with_hints(dim, "weight", Init::Const(1.0))?, eps })
    }

    /// Its weight.
    pub fn parameters(&self) -> Vec<Tensor> {
        vec![self.weight.clone()]
    }

    /// The normalised `xs` (.., dim).
    ///
    /// # Errors
    /// If the last dimension differs.
    pub fn forward(&self, xs: &Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        ops::rms_norm(xs, &self.weight, self.eps, path)
    }
}

/// Dropout at one place of a model, from noise addressed by the place's path.
#[derive(Debug, Clone)]
pub struct Dropout {
    rate: f64,
    stream: Stream,
}

impl Dropout {
    /// Dropout with probability `rate` at `path`.
    pub fn new(rate: f64, noise: Noise, path: &str) -> Self {
        Self { rate, stream: noise.stream(path, Purpose::Dropout) }
    }

    /// Drops in training, and passes `xs` on in every other pass.
    ///
    /// # Errors
    /// If the rate is not in `[0, 1)`.
    pub fn forward(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        match self.active(cx) {
            Some((rate, stream, draw)) => ops::dropout(xs, rate, &stream, draw, cx.path),
            None => Ok(xs.clone()),
        }
    }

    /// Rate, stream and draw, where this pass drops: for ops that drop inside.
    pub fn active(&self, cx: &Context) -> Option<(f64, Stream, u64)> {
        cx.pass.dropout_draw().filter(|_| self.rate > 0.0).map(|draw| (self.rate, self.stream, draw))
    }
}
