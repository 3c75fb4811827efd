//! Dropout from addressed noise.

use candle_core::{Result, Tensor};

use crate::noise::Stream;

/// Zeroes each element with probability `p` and scales the rest by `1 / (1 - p)`.
pub fn dropout(xs: &Tensor, p: f64, stream: &Stream, draw: u64) -> Result<Tensor> {
    let mut u = vec![0f64; xs.elem_count()];
    stream.fill_uniform(draw, &mut u);
    let mask: Vec<f64> = u.iter().map(|u| if *u < p { 0.0 } else { 1.0 / (1.0 - p) }).collect();
    xs * Tensor::from_vec(mask, xs.shape(), xs.device())?.to_dtype(xs.dtype())?
}
