//! Parts that models share: loading layers by name, dropout.

use candle_core::Tensor;
use candle_nn::{Init, Linear, VarBuilder};

use super::weights::Weights;
use crate::adapter::{AdaptableLinear, AdaptableModel, Context};
use crate::error::Result;
use crate::noise::{Noise, Purpose, Stream};
use crate::ops::{self, RmsNorm};

/// Loads a linear layer: `weight` (out, in) and `bias` (out). If the builder creates new parameters, the
/// weight is normal with standard deviation `init_std` and the bias zero.
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
    vb: &Weights,
) -> Result<AdaptableLinear> {
    adaptable_linear_of(path, in_dim, out_dim, init_std, true, vb)
}

/// An [`adaptable_linear`] with or without a bias.
///
/// # Errors
/// As [`linear`].
pub fn adaptable_linear_of(
    path: &str,
    in_dim: usize,
    out_dim: usize,
    init_std: f64,
    has_bias: bool,
    vb: &Weights,
) -> Result<AdaptableLinear> {
    Ok(AdaptableLinear::new(path, vb.linear(in_dim, out_dim, init_std, has_bias)?))
}

/// Loads an RMS norm with `weight` (dim). Normalised rows are multiplied by the weight or, with `offset`, by
/// one plus the weight.
///
/// # Errors
/// As [`linear`].
pub fn rms_norm(dim: usize, eps: f64, offset: bool, vb: &VarBuilder) -> Result<RmsNorm> {
    match offset {
        true => RmsNorm::load_offset(dim, eps, vb),
        false => RmsNorm::load(dim, eps, vb),
    }
}

/// Applies a layer of a task head to `xs` (.., in), which is cast to the head's dtype.
///
/// # Errors
/// If shapes do not fit.
pub fn project(layer: &Linear, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
    let weight = layer.weight();
    ops::linear(&xs.to_dtype(weight.dtype())?, weight, layer.bias(), cx.path)
}

/// The tensors that the linear layers of a model or a block depend on.
///
/// # Errors
/// Those of [`AdaptableModel::visit_linears`]; there are no others.
pub fn parameters(model: &dyn AdaptableModel) -> Result<Vec<Tensor>> {
    let mut all = Vec::new();
    model.visit_linears(&mut |layer| {
        all.extend(layer.parameters());
        Ok(())
    })?;
    Ok(all)
}

/// Dropout at one place of a model, with noise addressed by the path of that place.
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

    /// Applies dropout in training, and returns `xs` unchanged in every other pass.
    ///
    /// # Errors
    /// If the rate is not in `[0, 1)`.
    pub fn forward(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        match self.active(cx) {
            Some((rate, stream, draw)) => ops::dropout(xs, rate, &stream, draw, cx.path),
            None => Ok(xs.clone()),
        }
    }

    /// The rate, noise stream and draw if this pass has dropout, for ops with built-in dropout.
    pub fn active(&self, cx: &Context) -> Option<(f64, Stream, u64)> {
        cx.pass.dropout_draw().filter(|_| self.rate > 0.0).map(|draw| (self.rate, self.stream, draw))
    }
}
