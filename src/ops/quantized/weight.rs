//! A quantised weight matrix.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{bail, DType, Device, Result, Tensor};

/// Numbers of a block of dequantised rows: 4 MiB of them, which the caches of one core nearly hold.
const BLOCK: usize = 1 << 20;

/// A frozen weight `(out, in)` in blocks of a few bits, and the dtype that it stands for: what its rows are when they
/// are dequantised. Clones share it.
#[derive(Debug, Clone)]
pub struct QuantizedWeight {
    tensor: Arc<QTensor>,
    dims: (usize, usize),
    dtype: DType,
    device: Device,
}

impl QuantizedWeight {
    /// The weight that candle's quantised `tensor` holds, for inputs of `dtype`.
    ///
    /// # Errors
    /// If the tensor is no matrix, or the dtype is none of floating point.
    pub fn new(tensor: Arc<QTensor>, dtype: DType) -> Result<Self> {
        if !dtype.is_float() {
            bail!("a quantised weight stands for floating point, not for {}", dtype.as_str());
        }
        Ok(Self { dims: tensor.shape().dims2()?, device: tensor.device(), tensor, dtype })
    }

    /// `(out, in)`.
    pub fn dims(&self) -> (usize, usize) {
        self.dims
    }

    /// The dtype of its dequantised rows.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The kind of its blocks, such as `q4k`.
    pub fn kind(&self) -> String {
        format!("{:?}", self.tensor.dtype()).to_lowercase()
    }

    /// Its bytes in memory.
    pub fn bytes(&self) -> usize {
        self.tensor.storage_size_in_bytes()
    }

    /// The dequantised rows at `ids`, `(n)` of u32, as `(n, in)` in single precision.
    ///
    /// # Errors
    /// If an id is not one of a row.
    pub fn take(&self, ids: &Tensor) -> Result<Tensor> {
        self.tensor.embedding(ids)
    }

    /// The whole weight, `(out, in)` in its dtype.
    ///
    /// # Errors
    /// If candle fails.
    pub fn dequantize(&self) -> Result<Tensor> {
        self.tensor.dequantize(&self.device)?.to_dtype(self.dtype)
    }

    /// Rows `first` to `first + count`, dequantised: `(count, in)` in single precision.
    pub(super) fn rows(&self, first: usize, count: usize) -> Result<Tensor> {
        self.take(&Tensor::arange(first as u32, (first + count) as u32, &self.device)?)
    }

    /// The blocks of rows that are dequantised one at a time: the first row and how many.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        let (out_dim, in_dim) = self.dims;
        let rows = (BLOCK / in_dim.max(1)).max(1);
        (0..out_dim).step_by(rows).map(move |first| (first, rows.min(out_dim - first)))
    }
}
