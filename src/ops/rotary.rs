//! Rotary position embedding in Hugging Face's layout (rotated halves).

use candle_core::{Result, Tensor, D};

/// `xs` (b, t, heads, dim), `cos` and `sin` (b or 1, t, dim / 2).
pub fn rotary(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = xs.dim(D::Minus1)? / 2;
    let (x1, x2) = (xs.narrow(D::Minus1, 0, half)?, xs.narrow(D::Minus1, half, half)?);
    let (cos, sin) = (cos.unsqueeze(2)?, sin.unsqueeze(2)?);
    let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let y2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    Tensor::cat(&[y1, y2], D::Minus1)
}
