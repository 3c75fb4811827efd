//! A quantised weight matrix.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{bail, DType, Device, Module, Result, Tensor};
use rayon::prelude::*;

use super::nf4::Nf4;
use crate::ops::host::Host;

/// Numbers that are dequantised at one time: 4 MiB of them on the CPU, where its caches nearly hold them; more on a
/// device, where few launches over many are what is fast.
const BLOCK: usize = 1 << 20;
const DEVICE_BLOCK: usize = 1 << 24;

/// Numbers that one task dequantises.
const PIECE: usize = 1 << 16;

/// A frozen weight `(out, in)` in blocks of a few bits, and the dtype that it stands for: that of its rows when they
/// are dequantised. Clones share it.
#[derive(Debug, Clone)]
pub struct QuantizedWeight {
    blocks: Blocks,
    dims: (usize, usize),
    dtype: DType,
    device: Device,
}

#[derive(Debug, Clone)]
enum Blocks {
    /// One of the kinds of GGUF.
    Ggml(Arc<QTensor>),
    /// The 4 bits of bitsandbytes.
    Nf4(Arc<Nf4>),
}

impl QuantizedWeight {
    /// The weight that candle's quantised `tensor` holds, for inputs of `dtype`.
    ///
    /// # Errors
    /// If the tensor is no matrix, or the dtype is none of floating point.
    pub fn new(tensor: Arc<QTensor>, dtype: DType) -> Result<Self> {
        Self::of(tensor.shape().dims2()?, tensor.device(), Blocks::Ggml(tensor), dtype)
    }

    /// A weight in bitsandbytes' 4-bit NormalFloat (NF4).
    ///
    /// # Shapes
    /// - `packed`: `(out, in / 2)` of u8, two codes a byte, the earlier one in the high four bits
    /// - `scales`: `(out, in / block)` of f32, the largest magnitude of each block of numbers
    /// - `values`: what each code stands for, as a share of it
    ///
    /// # Errors
    /// If shapes or dtypes do not fit.
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

    /// Where it lies.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The kind of its blocks, such as `q4k`, `q8_0` or `nf4`.
    pub fn kind(&self) -> String {
        match &self.blocks {
            Blocks::Ggml(tensor) => format!("{:?}", tensor.dtype()).to_lowercase(),
            Blocks::Nf4(_) => "nf4".to_string(),
        }
    }

    /// Its bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.blocks {
            Blocks::Ggml(tensor) => tensor.storage_size_in_bytes(),
            Blocks::Nf4(weight) => weight.bytes(),
        }
    }

    /// The dequantised rows at `ids`, `(n)` of u32, as `(n, in)` in single precision.
    ///
    /// # Errors
    /// If an id is not one of a row (on the CPU).
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

    /// `x W^T` of `(n, in)` by candle's kernels, which round x as well: to 8 bits in blocks. None of a kind that they
    /// do not know, and on CUDA devices: there candle links machine code of the one architecture that it was built for,
    /// and on another the launch fails without a word and leaves the result unwritten.
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

    /// The same into `out`, on the CPU.
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

    /// The blocks of rows that are dequantised one at a time: the first row and how many.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        let (out_dim, in_dim) = self.dims;
        let numbers = if self.device.is_cpu() { BLOCK } else { DEVICE_BLOCK };
        let rows = (numbers / in_dim.max(1)).max(1);
        (0..out_dim).step_by(rows).map(move |first| (first, rows.min(out_dim - first)))
    }
}
