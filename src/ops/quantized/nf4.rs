//! The 4-bit NormalFloat of bitsandbytes (Dettmers et al. 2023, "QLoRA: efficient finetuning
//! of quantized LLMs").
//!
//! ```text
//! w = scale(block of w) * value(code of w)
//! ```
//!
//! with sixteen values, the quantiles of a normal distribution in [-1, 1], and a scale for
//! each block of numbers.

use candle_core::{bail, DType, Device, Result, Tensor};

/// A weight `(out, in)` of codes and scales.
#[derive(Debug)]
pub(super) struct Nf4 {
    packed: Tensor, // (out, in / 2) of u8
    scales: Tensor, // (out, in / block)
    values: [f32; 16],
    dims: (usize, usize),
}

impl Nf4 {
    /// See [`super::QuantizedWeight::nf4`].
    pub fn new(packed: Tensor, scales: Tensor, values: [f32; 16]) -> Result<Self> {
        let ((out_dim, bytes), (rows, blocks)) = (packed.dims2()?, scales.dims2()?);
        let in_dim = 2 * bytes;
        // A byte must not span two blocks.
        let fits = rows == out_dim && blocks > 0 && bytes > 0 && bytes.is_multiple_of(blocks);
        if !fits || packed.dtype() != DType::U8 || scales.dtype() != DType::F32 {
            bail!(
                "nf4: codes {:?} of {} and scales {:?} of {} do not fit",
                packed.dims(),
                packed.dtype().as_str(),
                scales.dims(),
                scales.dtype().as_str()
            );
        }
        Ok(Self { packed, scales, values, dims: (out_dim, in_dim) })
    }

    pub fn dims(&self) -> (usize, usize) {
        self.dims
    }

    pub fn device(&self) -> &Device {
        self.packed.device()
    }

    pub fn bytes(&self) -> usize {
        self.packed.elem_count() + 4 * (self.scales.elem_count() + self.values.len())
    }

    /// The dequantised rows at `ids`, `(n, in)`.
    pub fn take(&self, ids: &Tensor) -> Result<Tensor> {
        self.decode(&self.packed.index_select(ids, 0)?, &self.scales.index_select(ids, 0)?)
    }

    /// Rows `first` to `first + count`, dequantised.
    pub fn rows(&self, first: usize, count: usize) -> Result<Tensor> {
        self.decode(&self.packed.narrow(0, first, count)?, &self.scales.narrow(0, first, count)?)
    }

    fn decode(&self, packed: &Tensor, scales: &Tensor) -> Result<Tensor> {
        let (rows, blocks) = scales.dims2()?;
        let in_dim = self.dims.1;
        if packed.device().is_cpu() {
            let codes = packed.flatten_all()?.to_vec1::<u8>()?;
            let scales = scales.flatten_all()?.to_vec1::<f32>()?;
            let width = in_dim / blocks;
            let mut out = Vec::with_capacity(rows * in_dim);
            for (codes, scale) in codes.chunks_exact(width / 2).zip(scales) {
                let number = |code: u8| self.values[usize::from(code)] * scale;
                out.extend(codes.iter().flat_map(|pair| [number(pair >> 4), number(pair & 15)]));
            }
            return Tensor::from_vec(out, (rows, in_dim), &Device::Cpu);
        }
        let bytes = packed.to_dtype(DType::F32)?;
        let high = (&bytes / 16.0)?.floor()?;
        let low = (bytes - (&high * 16.0)?)?;
        let codes = Tensor::stack(&[high, low], 2)?.flatten_all()?.to_dtype(DType::U32)?;
        let values = Tensor::new(&self.values, packed.device())?.index_select(&codes, 0)?;
        let shares = values.reshape((rows, blocks, in_dim / blocks))?;
        shares.broadcast_mul(&scales.unsqueeze(2)?)?.reshape((rows, in_dim))
    }
}
