//! Layer norm and RMS norm.

use candle_core::{Result, Tensor, D};

/// Layer norm over the last dimension.
pub fn layer_norm(xs: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?;
    let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(var + eps)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// `layer_norm(xs + residual)`.
pub fn add_layer_norm(
    xs: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    layer_norm(&(xs + residual)?, weight, bias, eps)
}

/// RMS norm over the last dimension.
pub fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let var = xs.sqr()?.mean_keepdim(D::Minus1)?;
    xs.broadcast_div(&(var + eps)?.sqrt()?)?.broadcast_mul(weight)
}
