//! A quantised weight matrix.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{bail, DType, Device, Module, Result, Tensor};
use rayon::prelude::*;

use super::nf4::Nf4;
use crate::ops::host::Host;

/// The number of weights that are dequantised at one time: 4 MiB on the CPU, which its caches nearly hold;
/// more on a device, where few large launches are fastest.
const BLOCK: usize = 1 << 20;
const DEVICE_BLOCK: usize = 1 << 24;

/// The number of weights that one task dequantises.
const PIECE: usize = 1 << 16;

/// A frozen weight `(out, in)` in blocks with a few bits per number, and the dtype of its dequantised rows.
/// Clones share the blocks.
#[derive(Debug, Clone)]
pub struct QuantizedWeight {
    blocks: Blocks,
    dims: (usize, usize),
    dtype: DType,
    device: Device,
}

#[derive(Debug, Clone)]
enum Blocks {
    /// One of GGUF's kinds.
    Ggml(Arc<QTensor>),
    /// The 4-bit NormalFloat of bitsandbytes.
    Nf4(Arc<Nf4>),
}

impl QuantizedWeight {
    /// Creates a weight from candle's quantised `tensor`, for inputs of `dtype`.
    ///
    /// # Errors
    /// If the tensor is not a matrix, or `dtype` is not a floating-point dtype.
    pub fn new(tensor: Arc<QTensor>, dtype: DType) -> Result<Self> {
        Self::of(tensor.shape().dims2()?, tensor.device(), Blocks::Ggml(tensor), dtype)
    }

    /// Creates a weight in bitsandbytes' 4-bit NormalFloat (NF4).
    ///
    /// # Shapes
    /// - `packed`: `(out, in / 2)` of u8, two codes per byte, the first one in the high four bits
    /// - `scales`: `(out, in / block)` of f32, the largest magnitude of each block of numbers
    /// - `values`: the number that each code stands for, as a fraction of that magnitude
    ///
    /// # Errors
    /// If shapes or dtypes do not fit, or `dtype` is not a floating-point dtype.
    pub fn nf4(packed: Tensor, scales: Tensor, values: [f32; 16], dtype: DType) -> Result<Self> {
        let nf4 = Nf4::new(packed, scales, values)?;
        Self::of(nf4.dims(), nf4.device().clone(), Blocks::Nf4(Arc::new(nf4)), dtype)
    }

    fn of(dims: (usize, usize), device: Device, blocks: Blocks, dtype: DType) -> Result<Self> {
        if !dtype.is_float() {
            bail!("a quantised weight stands for floating point, not for {}", dtype.as_str());
        }
        Ok(Self { blocks, dims, dtype, device })
    }

    /// `(out, in)`.
    pub fn dims(&self) -> (usize, usize) {
        self.dims
    }

    /// The dtype of its dequantised rows.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device of the weight.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The kind of the blocks, such as `q4k`, `q8_0` or `nf4`.
    pub fn kind(&self) -> String {
        match &self.blocks {
            Blocks::Ggml(tensor) => format!("{:?}", tensor.dtype()).to_lowercase(),
            Blocks::Nf4(_) => "nf4".to_string(),
        }
    }

    /// The size in memory, in bytes.
    pub fn bytes(&self) -> usize {
        match &self.blocks {
            Blocks::Ggml(tensor) => tensor.storage_size_in_bytes(),
            Blocks::Nf4(weight) => weight.bytes(),
        }
    }

    /// The dequantised rows at `ids`, `(n)` of u32, as `(n, in)` in single precision.
    ///
    /// # Errors
    /// If an id is not below the number of rows (on the CPU).
    pub fn take(&self, ids: &Tensor) -> Result<Tensor> {
        match &self.blocks {
            Blocks::Ggml(tensor) => tensor.embedding(ids),
            Blocks::Nf4(weight) => weight.take(ids),
        }
    }

    /// The whole weight, `(out, in)` in its dtype.
    ///
    /// # Errors
    /// If candle fails.
    pub fn dequantize(&self) -> Result<Tensor> {
        self.rows(0, self.dims.0)?.to_dtype(self.dtype)
    }

    /// `x W^T` with x `(n, in)` by candle's kernels, which round x as well, to 8 bits in blocks. `None`
    /// for kinds that they do not support, and on CUDA devices: there candle links machine code for the
    /// one architecture that it was built for, and on another one the launch fails silently and leaves
    /// the result unwritten.
    pub(super) fn product_of_few(&self, xs: &Tensor) -> Result<Option<Tensor>> {
        let Blocks::Ggml(tensor) = &self.blocks else { return Ok(None) };
        if self.device.is_cuda() {
            return Ok(None);
        }
        let kernel = QMatMul::QTensor(tensor.clone());
        let y = kernel.forward(&xs.to_dtype(DType::F32)?.contiguous()?)?;
        y.to_dtype(xs.dtype()).map(Some)
    }

    /// Rows `first` to `first + count`, dequantised: `(count, in)` in single precision.
    pub(super) fn rows(&self, first: usize, count: usize) -> Result<Tensor> {
        if !self.device.is_cpu() {
            return self.piece(first, count);
        }
        let mut out = vec![0f32; count * self.dims.1];
        self.fill(first, &mut out)?;
        Tensor::from_vec(out, (count, self.dims.1), &self.device)
    }

    /// Writes the dequantised rows from `first` on into `out`, on the CPU.
    pub(super) fn fill(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let in_dim = self.dims.1;
        if in_dim == 0 {
            return Ok(());
        }
        let rows = (PIECE / in_dim).max(1);
        out.par_chunks_mut(rows * in_dim).enumerate().try_for_each(|(i, out)| {
            out.copy_from_slice(&Host::of(&self.piece(first + i * rows, out.len() / in_dim)?)?);
            Ok(())
        })
    }

    fn piece(&self, first: usize, count: usize) -> Result<Tensor> {
        match &self.blocks {
            Blocks::Ggml(tensor) => {
                tensor.embedding(&Tensor::arange(first as u32, (first + count) as u32, &self.device)?)
            }
            Blocks::Nf4(weight) => weight.rows(first, count),
        }
    }

    /// The blocks of rows that are dequantised one at a time, as (first row, number of rows).
    pub(super) fn blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        let (out_dim, in_dim) = self.dims;
        let numbers = if self.device.is_cpu() { BLOCK } else { DEVICE_BLOCK };
        let rows = (numbers / in_dim.max(1)).max(1);
        (0..out_dim).step_by(rows).map(move |first| (first, rows.min(out_dim - first)))
    }
}
