//! Dropout masks from addressed noise.

use candle_core::{bail, Device, Result, Shape, Tensor};

use super::host::{dense, for_rows, tensor, Host};
use crate::noise::{Stream, WORD_LANES};
use crate::util::simd::vectorized;

/// Fails unless `p` is in `[0, 1)`.
pub(super) fn check(p: f64) -> Result<()> {
    if !(0.0..1.0).contains(&p) {
        bail!("dropout: the probability must be in [0, 1), got {p}");
    }
    Ok(())
}

/// The factor on kept elements.
pub(super) fn scale(p: f64) -> f64 {
    1.0 / (1.0 - p)
}

/// The threshold on words of noise: an element whose word is below it is dropped.
pub(super) fn threshold(p: f64) -> u32 {
    (p * 2f64.powi(32)) as u32
}

/// The mask as a tensor of u8, 1 for kept elements: by a kernel on CUDA devices, from the host elsewhere.
pub(super) fn mask_tensor(
    shape: &Shape,
    device: &Device,
    p: f64,
    stream: &Stream,
    draw: u64,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        use crate::kernels::{alloc_uninit, count, launch, one_each, tensor};
        let (len, key, threshold) = (count(shape.elem_count())?, stream.key(), threshold(p));
        let mut keep = alloc_uninit::<u8>(device, shape.elem_count())?;
        let blocks = one_each(len.div_ceil(4));
        launch!(device; blocks; keep_mask(&len, &threshold, &key, &draw, &mut keep));
        return Ok(tensor(keep, shape, device));
    }
    DropoutMask::new(shape.elem_count(), p, stream, draw).tensor(shape, device)
}

/// A dropout mask, one bit per element.
pub(super) struct DropoutMask {
    bits: Vec<u8>,
    len: usize,
    scale: f64,
}

impl DropoutMask {
    pub fn new(len: usize, p: f64, stream: &Stream, draw: u64) -> Self {
        let threshold = threshold(p);
        let mut bits = vec![0u8; len.div_ceil(8)];
        let (group, piece) = (WORD_LANES / 2, 1024); // in bytes; a byte is two blocks of four words
        let fill = |(i, bits): (usize, &mut [u8])| {
            vectorized!(for (j, bytes) in bits.chunks_mut(group).enumerate() {
                let words = stream.word_group(draw, (i * piece / group + j) as u64);
                let mut nibbles = [0u8; WORD_LANES];
                for (bit, words) in words.iter().enumerate() {
                    for (nibble, word) in nibbles.iter_mut().zip(words) {
                        *nibble |= u8::from(*word >= threshold) << bit;
                    }
                }
                for (byte, pair) in bytes.iter_mut().zip(nibbles.chunks_exact(2)) {
                    *byte = pair[0] | pair[1] << 4;
                }
            });
        };
        if bits.len() <= piece {
            fill((0, &mut bits));
        } else {
            use rayon::prelude::*;
            bits.par_chunks_mut(piece).enumerate().for_each(fill);
        }
        Self { bits, len, scale: scale(p) }
    }

    /// The factor on kept elements.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Applies the mask to `xs`, whose first element is number `first`. It multiplies, so that NaN stays NaN.
    #[inline(always)]
    pub fn multiply(&self, first: usize, xs: &mut [f32]) {
        let scale = self.scale as f32;
        let factor = |byte: u8, i: usize| if byte >> i & 1 == 0 { 0.0 } else { scale };
        // The elements up to the next whole byte of bits, then whole bytes (SIMD), then the rest.
        let (head, rest) = xs.split_at_mut((first.wrapping_neg() & 7).min(xs.len()));
        for (i, x) in head.iter_mut().enumerate() {
            *x *= factor(self.bits[first >> 3], (first & 7) + i);
        }
        let bytes = &self.bits[(first + head.len()).div_ceil(8).min(self.bits.len())..];
        for (xs, &byte) in rest.chunks_mut(8).zip(bytes) {
            match <&mut [f32; 8]>::try_from(&mut *xs) {
                Ok(xs) => (0..8).for_each(|i| xs[i] *= factor(byte, i)),
                Err(_) => xs.iter_mut().enumerate().for_each(|(i, x)| *x *= factor(byte, i)),
            }
        }
    }

    /// The mask as a tensor of u8.
    pub fn tensor(&self, shape: &Shape, device: &Device) -> Result<Tensor> {
        let bytes: Vec<u8> = (0..self.len).map(|i| self.bits[i >> 3] >> (i & 7) & 1).collect();
        Tensor::from_vec(bytes, shape, device)
    }

    /// Applies dropout to the detached `xs`, f32 on the CPU.
    pub fn apply(&self, xs: &Tensor) -> Result<Tensor> {
        let xs = dense(xs)?;
        let mut y = Host::of(&xs)?.to_vec();
        for_rows(&mut y, 1, |first, piece| vectorized!(self.multiply(first, piece)));
        tensor(y, xs.dims())
    }
}
