//! A frozen matrix of a model that may be quantised: the table of its tokens, the head over them.

use candle_core::{DType, Device, Result, Tensor};

use super::linear::quantized_linear;
use super::weight::QuantizedWeight;
use crate::ops::linear::linear;
use crate::ops::linear_loss::linear_cross_entropy;
use crate::ops::loss::cross_entropy;
use crate::ops::{embedding, OpPath};

/// A weight matrix as it lies in memory.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Numbers, which may be trained.
    Dense(Tensor),
    /// Blocks of a few bits, frozen.
    Quantized(QuantizedWeight),
}

impl Weight {
    /// The dense tensor, unless it is quantised.
    pub fn dense(&self) -> Option<&Tensor> {
        match self {
            Self::Dense(tensor) => Some(tensor),
            Self::Quantized(_) => None,
        }
    }

    /// `(rows, columns)`.
    ///
    /// # Errors
    /// If it is no matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(tensor) => tensor.dims2(),
            Self::Quantized(weight) => Ok(weight.dims()),
        }
    }

    /// The dtype of its rows, once they are dequantised.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(tensor) => tensor.dtype(),
            Self::Quantized(weight) => weight.dtype(),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        match self {
            Self::Dense(tensor) => tensor.device(),
            Self::Quantized(weight) => weight.device(),
        }
    }

    /// The whole matrix as numbers.
    ///
    /// # Errors
    /// If candle fails.
    pub fn dequantize(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Quantized(weight) => weight.dequantize(),
        }
    }

    /// Its rows at `ids`; see [`embedding`](fn@embedding).
    ///
    /// # Shapes
    /// - `ids`: `(..)` of u32
    /// - output: `(.., columns)`
    ///
    /// # Errors
    /// If an id is outside the matrix (on the CPU).
    pub fn lookup(&self, ids: &Tensor, path: OpPath) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => embedding(ids, tensor, path),
            Self::Quantized(weight) => {
                let mut shape = ids.dims().to_vec();
                shape.push(weight.dims().1);
                weight.take(&ids.flatten_all()?)?.to_dtype(weight.dtype())?.reshape(shape)
            }
        }
    }

    /// `x W^T + b`: [`linear`](fn@linear) or [`quantized_linear`].
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear(&self, xs: &Tensor, bias: Option<&Tensor>, path: OpPath) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => linear(xs, tensor, bias, path),
            Self::Quantized(weight) => quantized_linear(xs, weight, bias, path),
        }
    }

    /// The cross-entropy of `x W^T`; see [`linear_cross_entropy`].
    ///
    /// # Errors
    /// If the shapes do not fit, and as [`cross_entropy`].
    pub fn cross_entropy(&self, xs: &Tensor, labels: &Tensor, ignore: i64, path: OpPath) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => linear_cross_entropy(xs, tensor, labels, ignore, path),
            Self::Quantized(weight) => {
                cross_entropy(&quantized_linear(xs, weight, None, path)?, labels, ignore, path)
            }
        }
    }
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(tensor)
    }
}

impl From<QuantizedWeight> for Weight {
    fn from(weight: QuantizedWeight) -> Self {
        Self::Quantized(weight)
    }
}
