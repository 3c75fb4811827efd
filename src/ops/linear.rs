//! Linear layers: frozen, trainable, and frozen with a low-rank adapter.

use candle_core::{Result, Tensor, D};

/// `y = x W^T + b`. `xs` (.., in), `weight` (out, in), `bias` (out).
pub fn linear(xs: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = xs.broadcast_matmul(&weight.t()?)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// `s (x A^T) B^T`. `xs` (.., in), `a` (r, in), `b` (out, r); computed in the dtype of `a`, returned in that of `xs`.
pub fn low_rank(xs: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let y = xs.to_dtype(a.dtype())?.broadcast_matmul(&a.t()?)?.broadcast_matmul(&b.t()?)?;
    (y * scale)?.to_dtype(xs.dtype())
}

/// `y = x W^T + bias + s (x A^T) B^T`.
pub fn adapted_linear(
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    linear(xs, weight, bias)? + low_rank(xs, a, b, scale)?
}

/// Rows of `weight` (vocabulary, dim) at `ids` (..) of u32: (.., dim).
pub fn embedding(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(weight.dim(D::Minus1)?);
    weight.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
}
