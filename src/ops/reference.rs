//! Every block in candle's own differentiable operations, as the reference for tests.

use candle_core::{DType, Result, Tensor, D};

use super::attention_mask::{visible, Mask, Scores, Shape};
use super::disentangled_shape::{spread, Positioned};
use super::dropout_mask::DropoutMask;
use super::vmath;

pub(super) fn linear(xs: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = xs.contiguous()?.broadcast_matmul(&weight.t()?)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

pub(super) fn low_rank(xs: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let xs_a = xs.contiguous()?.to_dtype(a.dtype())?.broadcast_matmul(&a.t()?)?;
    xs_a.broadcast_matmul(&b.t()?)? * scale
}

pub(super) fn embedding(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(weight.dim(D::Minus1)?);
    weight.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
}

pub(super) fn layer_norm(xs: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = xs.broadcast_sub(&xs.mean_keepdim(D::Minus1)?)?;
    let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(var + eps)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

pub(super) fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let var = xs.sqr()?.mean_keepdim(D::Minus1)?;
    xs.broadcast_div(&(var + eps)?.sqrt()?)?.broadcast_mul(weight)
}

/// Avoids `Tensor::gelu_erf`, whose backward uses six digits of `1 / sqrt(2 pi)`.
pub(super) fn gelu(xs: &Tensor) -> Result<Tensor> {
    let cdf = ((xs * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?;
    (xs * cdf)? * 0.5
}

pub(super) fn silu(xs: &Tensor) -> Result<Tensor> {
    xs.silu()
}

pub(super) fn dropout(xs: &Tensor, keep: &DropoutMask) -> Result<Tensor> {
    xs * (keep.tensor(xs.shape(), xs.device())?.to_dtype(xs.dtype())? * keep.scale())?
}

pub(super) fn rotary(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (half, dim) = (cos.dim(D::Minus1)?, xs.dim(D::Minus1)?);
    let (x1, x2) = (xs.narrow(D::Minus1, 0, half)?, xs.narrow(D::Minus1, half, half)?);
    let (cos, sin) = (cos.unsqueeze(2)?, sin.unsqueeze(2)?);
    let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let y2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    Tensor::cat(&[y1, y2, xs.narrow(D::Minus1, 2 * half, dim - 2 * half)?], D::Minus1)
}

pub(super) fn soft_cap(xs: &Tensor, cap: f64) -> Result<Tensor> {
    (xs / cap)?.tanh()? * cap
}

/// Computed from the exponential, which candle differentiates exactly.
pub(super) fn gelu_tanh(xs: &Tensor) -> Result<Tensor> {
    let inner = ((xs.sqr()? * vmath::GELU_CUBE)? + 1.0)?;
    let twice = ((xs * inner)? * (2.0 * vmath::GELU_SLOPE))?;
    xs * (twice.neg()?.exp()? + 1.0)?.recip()?
}

pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &Shape,
    scores_of: Scores,
    mask: &Mask,
    dropout: Option<&DropoutMask>,
) -> Result<Tensor> {
    let &Shape { b, tq, tk, heads, kv_heads, dim } = shape;
    let split = |x: &Tensor, t: usize, n: usize| -> Result<Tensor> {
        x.reshape((b, t, n, 1, dim))?
            .broadcast_as((b, t, n, heads / n, dim))?
            .reshape((b, t, heads, dim))?
            .transpose(1, 2)?
            .contiguous()
    };
    let (q, k, v) = (split(q, tq, heads)?, split(k, tk, kv_heads)?, split(v, tk, kv_heads)?);
    let mut scores = (q.matmul(&k.t()?)? * scores_of.scale)?;
    if let Some(cap) = scores_of.cap {
        scores = soft_cap(&scores, cap)?;
    }
    probabilities(&scores, visible(shape, mask, q.device())?, dropout)?
        .matmul(&v)?
        .transpose(1, 2)?
        .reshape((b, tq, heads * dim))
}

/// The softmax of scores (b, heads, tq, tk) over the visible keys, with dropout.
fn probabilities(scores: &Tensor, visible: Option<Tensor>, dropout: Option<&DropoutMask>) -> Result<Tensor> {
    let keep = match visible {
        Some(keep) => keep,
        None => Tensor::ones((1, 1, 1, 1), DType::U8, scores.device())?,
    };
    let keep = keep.broadcast_as(scores.shape())?.to_dtype(scores.dtype())?;
    let bias = ((&keep - 1.0)? * 1e30)?;
    let scores = (scores + bias)?;
    let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let e = (e * keep)?; // rows without a visible key give zero, not NaN
    let sum = e.sum_keepdim(D::Minus1)?;
    // The sum of these rows is 0, so divide by 1. A small constant would not do: the derivative divides by
    // its square, which would be 0.
    let p = e.broadcast_div(&(&sum + sum.eq(0f64)?.to_dtype(sum.dtype())?)?)?;
    match dropout {
        Some(keep) => self::dropout(&p, keep),
        None => Ok(p),
    }
}

pub(super) fn disentangled_attention(
    [q, k, v]: [&Tensor; 3],
    shape: &Positioned,
    index: &Tensor,
    scale: f64,
    visible: Option<Tensor>,
    dropout: Option<&DropoutMask>,
) -> Result<Tensor> {
    let Shape { b, tq, tk, heads, .. } = shape.content;
    let ((q, pq), (k, pk)) = (shape.split(q, tq)?, shape.split(k, tk)?);
    let by_query = q.matmul(&pk.t()?)?.gather(&spread(index, b, heads)?, 3)?;
    let by_key = k.matmul(&pq.t()?)?.gather(&spread(&index.t()?, b, heads)?, 3)?;
    let scores = (((q.matmul(&k.t()?)? + by_query)? + by_key.transpose(2, 3)?)? * scale)?;
    let p = probabilities(&scores, visible, dropout)?;
    shape.join(&p.matmul(&shape.split_values(v, tk)?)?)
}

/// `labels` (n) of i64 are in range or `ignore`; `rows` is the number of those that are not ignored.
pub(super) fn cross_entropy(logits: &Tensor, labels: &Tensor, ignore: i64, rows: usize) -> Result<Tensor> {
    let keep = labels.ne(ignore)?;
    let safe = (labels * keep.to_dtype(DType::I64)?)?;
    let log_p = candle_nn::ops::log_softmax(logits, D::Minus1)?;
    let picked = log_p.gather(&safe.unsqueeze(1)?, 1)?.squeeze(1)?;
    (picked * keep.to_dtype(logits.dtype())?)?.sum_all()?.neg()? / rows as f64
}

pub(super) fn mean_squared_error(predictions: &Tensor, targets: &Tensor) -> Result<Tensor> {
    (predictions - targets)?.sqr()?.mean_all()
}
