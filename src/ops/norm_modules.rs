//! Norms as candle's `Module`s, for custom models. candle-nn's norms of the same names silently drop
//! gradients where they take their fused paths.

use candle_core::Tensor;
use candle_nn::{Init, Module, VarBuilder};

use super::norm::{add_layer_norm, layer_norm, rms_norm};
use super::path::OpPath;
use crate::error::Result;
use crate::util::dtype::wide;

/// Layer norm over the last dimension (Ba et al. 2016): [`layer_norm`](super::layer_norm) with its weights.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_nn::Module;
/// use monteclora::ops::LayerNorm;
///
/// let (ones, zeros) = (Tensor::ones(3, DType::F32, &Device::Cpu)?, Tensor::zeros(3, DType::F32, &Device::Cpu)?);
/// let xs = Var::new(&[[1f32, 2., 4.]], &Device::Cpu)?;
/// let ours = LayerNorm::new(ones.clone(), zeros.clone(), 1e-5).forward(&xs)?.sqr()?.sum_all()?;
/// assert!(ours.backward()?.get(&xs).is_some());
/// // candle-nn's norm computes the same value, but gives no gradient for `xs`:
/// let theirs = candle_nn::LayerNorm::new(ones, zeros, 1e-5).forward(&xs)?.sqr()?.sum_all()?;
/// assert!((ours.to_scalar::<f32>()? - theirs.to_scalar::<f32>()?).abs() < 1e-5);
/// assert!(theirs.backward()?.get(&xs).is_none());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Creates a norm with this weight and bias, both `(dim)`.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self { weight, bias, eps }
    }

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

    /// Fetches `weight` (dim) of a norm that has no bias.
    ///
    /// # Errors
    /// If the tensor is missing or of another shape.
    pub fn load_without_bias(dim: usize, eps: f64, vb: &VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(dim, "weight", Init::Const(1.0))?;
        // Not from the builder, which could make it trainable.
        let bias = weight.detach().zeros_like()?;
        Ok(Self { weight, bias, eps })
    }

    /// Returns the weight and the bias.
    pub fn parameters(&self) -> Vec<Tensor> {
        vec![self.weight.clone(), self.bias.clone()]
    }

    /// Returns the normalised `xs` (.., dim), computed on `path`.
    ///
    /// # Errors
    /// If the last dimension differs.
    pub fn forward_on(&self, xs: &Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        layer_norm(xs, &self.weight, &self.bias, self.eps, path)
    }

    /// Returns the normalised sum of `xs` and `residual`, both (.., dim), computed on `path`.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn forward_add(&self, xs: &Tensor, residual: &Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        add_layer_norm(xs, residual, &self.weight, &self.bias, self.eps, path)
    }
}

impl Module for LayerNorm {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        self.forward_on(xs, OpPath::Fused)
    }
}

/// RMS norm over the last dimension (Zhang and Sennrich 2019): [`rms_norm`](super::rms_norm) with its weight.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
    /// Whether the norm multiplies by `1 + weight`, for a trainable weight.
    offset: bool,
}

impl RmsNorm {
    /// Creates a norm with this weight, `(dim)`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps, offset: false }
    }

    /// Fetches `weight` (dim).
    ///
    /// # Errors
    /// If the tensor is missing or of another shape.
    pub fn load(dim: usize, eps: f64, vb: &VarBuilder) -> Result<Self> {
        Ok(Self::new(vb.get_with_hints(dim, "weight", Init::Const(1.0))?, eps))
    }

    /// Fetches `weight` (dim) of a norm that multiplies by `1 + weight`, as Gemma's norms do. The sum is
    /// computed in single precision or better.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_offset(dim: usize, eps: f64, vb: &VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(dim, "weight", Init::Const(0.0))?;
        // One is added to a trainable weight in every pass, to a frozen one only here.
        match weight.track_op() {
            true => Ok(Self { weight, eps, offset: true }),
            false => Ok(Self::new(from_one(&weight)?, eps)),
        }
    }

    /// Returns the weight.
    pub fn parameters(&self) -> Vec<Tensor> {
        vec![self.weight.clone()]
    }

    /// Returns the normalised `xs` (.., dim), computed on `path`.
    ///
    /// # Errors
    /// If the last dimension differs.
    pub fn forward_on(&self, xs: &Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        match self.offset {
            true => rms_norm(xs, &from_one(&self.weight)?, self.eps, path),
            false => rms_norm(xs, &self.weight, self.eps, path),
        }
    }
}

/// `1 + weight`.
fn from_one(weight: &Tensor) -> candle_core::Result<Tensor> {
    weight.to_dtype(wide(weight.dtype()))? + 1.0
}

impl Module for RmsNorm {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        self.forward_on(xs, OpPath::Fused)
    }
}
