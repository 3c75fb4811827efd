//! A model's weight matrix, dense or quantised (and then frozen): that of a linear layer, the table of token
//! embeddings, or the output head.

use candle_core::{DType, Device, Result, Tensor};

use super::linear as quantized;
use super::quantized_weight::QuantizedWeight;
use crate::ops::host::{dense, Host};
use crate::ops::path::{Implementation, OpPath};
use crate::ops::{embedding, linear};

/// A weight matrix, dense or quantised.
#[derive(Debug, Clone)]
pub enum Weight {
    /// A dense tensor, which may be trainable.
    Dense(Tensor),
    /// A quantised weight, which is frozen.
    Quantized(QuantizedWeight),
}

impl Weight {
    /// The dense tensor; `None` if the weight is quantised.
    pub fn dense(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(tensor) => Some(tensor),
            Self::Quantized(_) => None,
        }
    }

    /// `(rows, columns)`.
    ///
    /// # Errors
    /// If the dense tensor is not a matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(tensor) => tensor.dims2(),
            Self::Quantized(weight) => Ok(weight.dims()),
        }
    }

    /// The dtype of the rows, after dequantisation.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(tensor) => tensor.dtype(),
            Self::Quantized(weight) => weight.dtype(),
        }
    }

    /// The storage format: the dtype, such as `bf16`, or the kind of the blocks, such as `q4k`.
    pub fn kind(&self) -> String {
        match self {
            Self::Dense(tensor) => tensor.dtype().as_str().to_string(),
            Self::Quantized(weight) => weight.kind(),
        }
    }

    /// The size in memory, in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Quantized(weight) => weight.bytes(),
        }
    }

    /// The device of the weight.
    pub fn device(&self) -> &Device {
        match self {
            Self::Dense(tensor) => tensor.device(),
            Self::Quantized(weight) => weight.device(),
        }
    }

    /// The whole matrix as a dense tensor.
    ///
    /// # Errors
    /// If candle fails.
    pub fn dequantize(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Quantized(weight) => weight.dequantize(),
        }
    }

    /// The weight without a gradient.
    pub(crate) fn detach(&self) -> Self {
        match self {
            Self::Dense(tensor) => Self::Dense(tensor.detach()),
            Self::Quantized(weight) => Self::Quantized(weight.clone()),
        }
    }

    /// The rows at `ids`; see [`embedding`](fn@crate::ops::embedding).
    ///
    /// # Shapes
    /// - `ids`: `(..)` of u32
    /// - output: `(.., columns)`
    ///
    /// # Errors
    /// If an id is outside the matrix (on the CPU).
    pub fn lookup(&self, ids: &Tensor, path: OpPath) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => embedding::embedding(ids, tensor, path),
            Self::Quantized(weight) => {
                let mut shape = ids.dims().to_vec();
                shape.push(weight.dims().1);
                weight.take(&ids.flatten_all()?)?.to_dtype(weight.dtype())?.reshape(shape)
            }
        }
    }

    /// `x W^T + b`: [`linear`](fn@crate::ops::linear) or [`quantized_linear`](super::quantized_linear).
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear(&self, xs: &Tensor, bias: Option<&Tensor>, path: OpPath) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => linear::linear(xs, tensor, bias, path),
            Self::Quantized(weight) => quantized::quantized_linear(xs, weight, bias, path),
        }
    }

    /// [`Self::linear`] that does not round `xs`, even if it has few rows.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub(crate) fn linear_by_blocks(
        &self,
        xs: &Tensor,
        bias: Option<&Tensor>,
        path: OpPath,
    ) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => linear::linear(xs, tensor, bias, path),
            Self::Quantized(weight) => quantized::quantized_linear_by_blocks(xs, weight, bias, path),
        }
    }

    /// The implementation of an operation on `xs` and this weight.
    pub(in crate::ops) fn implementation(&self, path: OpPath, xs: &Tensor) -> Implementation {
        match self {
            Self::Dense(tensor) => path.on(&[xs, tensor]),
            Self::Quantized(_) => path.on(&[xs]),
        }
    }

    /// Checks that the shape of `xs` fits this weight.
    pub(in crate::ops) fn check(&self, xs: &Tensor) -> Result<()> {
        match self {
            Self::Dense(tensor) => linear::check(xs, tensor, None),
            Self::Quantized(weight) => quantized::check(xs, weight, None),
        }
    }

    /// Whether candle tracks the weight.
    pub(in crate::ops) fn track_op(&self) -> bool {
        self.dense().is_some_and(Tensor::track_op)
    }

    /// `x W^T` of a detached x.
    pub(in crate::ops) fn forward(&self, how: Implementation, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => linear::forward(how, xs, tensor, None),
            Self::Quantized(weight) => quantized::forward(how, xs, weight, None),
        }
    }

    /// `x W^T` of a detached x of `n` rows on the CPU.
    pub(in crate::ops) fn product(&self, xs: &Tensor, n: usize) -> Result<Vec<f32>> {
        let xs = dense(xs)?;
        match self {
            Self::Dense(tensor) => Ok(linear::product(&Host::of(&xs)?, &Host::of(&dense(tensor)?)?, None, n)),
            Self::Quantized(weight) => quantized::product(&Host::of(&xs)?, weight, None),
        }
    }

    /// `dX = dY W`.
    pub(in crate::ops) fn input_gradient(&self, how: Implementation, grad: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => linear::input_gradient(how, grad, tensor),
            Self::Quantized(weight) => quantized::input_gradient(how, grad, weight),
        }
    }
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(tensor)
    }
}

impl From<&Tensor> for Weight {
    fn from(tensor: &Tensor) -> Self {
        Self::Dense(tensor.clone())
    }
}

impl From<&Weight> for Weight {
    fn from(weight: &Weight) -> Self {
        weight.clone()
    }
}

impl From<QuantizedWeight> for Weight {
    fn from(weight: QuantizedWeight) -> Self {
        Self::Quantized(weight)
    }
}
