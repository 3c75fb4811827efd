//! The attention core.

use candle_core::{DType, Result, Tensor, D};

use crate::noise::Stream;

/// Which keys a query may attend to.
#[derive(Debug, Clone)]
pub struct Mask {
    /// (batch, keys) of u8: 1 where the key is a real token. None: all are.
    pub padding: Option<Tensor>,
    /// Query i (of tq, the last ones) sees keys 0 ..= tk - tq + i only.
    pub causal: bool,
}

/// `softmax(scale q k^T + mask) v` per head, laid out as projected.
///
/// `q` (b, tq, heads * dim), `k` and `v` (b, tk, kv_heads * dim), output (b, tq, heads * dim).
/// `dropout`: (p, stream, draw) of the attention probabilities.
#[allow(clippy::too_many_arguments)]
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    kv_heads: usize,
    scale: f64,
    mask: &Mask,
    dropout: Option<(f64, Stream, u64)>,
) -> Result<Tensor> {
    let (b, tq, width) = q.dims3()?;
    let (tk, dim) = (k.dim(1)?, width / heads);
    let split = |x: &Tensor, t: usize, n: usize| -> Result<Tensor> {
        x.reshape((b, t, n, 1, dim))?
            .broadcast_as((b, t, n, heads / n, dim))?
            .reshape((b, t, heads, dim))?
            .transpose(1, 2)?
            .contiguous()
    };
    let (q, k, v) = (split(q, tq, heads)?, split(k, tk, kv_heads)?, split(v, tk, kv_heads)?);
    let mut keep = Tensor::ones((b, 1, tq, tk), DType::U8, q.device())?;
    if let Some(padding) = &mask.padding {
        keep = keep.broadcast_mul(&padding.reshape((b, 1, 1, tk))?)?;
    }
    if mask.causal {
        let rows: Vec<u8> = (0..tq).flat_map(|i| (0..tk).map(move |j| u8::from(j + tq <= tk + i))).collect();
        keep = keep.broadcast_mul(&Tensor::from_vec(rows, (1, 1, tq, tk), q.device())?)?;
    }
    let keep = keep.broadcast_as((b, heads, tq, tk))?.to_dtype(q.dtype())?;
    let bias = ((&keep - 1.0)? * 1e30)?;
    let scores = ((q.matmul(&k.t()?)? * scale)? + bias)?;
    let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let e = (e * keep)?; // rows without a key to attend to give zero, not NaN
    let mut p = e.broadcast_div(&(e.sum_keepdim(D::Minus1)? + 1e-30)?)?;
    if let Some((rate, stream, draw)) = dropout {
        p = super::dropout(&p, rate, &stream, draw)?;
    }
    p.matmul(&v)?.transpose(1, 2)?.reshape((b, tq, width))
}
