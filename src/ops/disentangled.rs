//! Disentangled attention (He et al. 2021): scores also depend on the relative position of query and key.

use candle_core::{bail, Result, Tensor, D};

use super::attention_mask::{visible, Mask, Shape};
use super::attention_softmax::Softmax;
use super::custom_vjp::custom_vjp;
use super::disentangled_fused::FusedDisentangled;
use super::disentangled_shape::{spread, Positioned};
use super::dropout::DropoutPlan;
use super::dropout_mask::{check, DropoutMask};
use super::path::{Implementation, OpPath};
use super::reference;
use crate::noise::Stream;
use crate::util::dtype::wide;

/// `softmax(scale (q_i k_j + q_i pk_r + k_j pq_r) + padding) v` per head, where `r` is the row of relative
/// positions that belongs to the distance `i - j`. The terms are content to content, content to position, and
/// position to content.
///
/// One node of (q, k, v). In q and k, the rows of the positions follow those of the batch, because one
/// projection computes both: DeBERTa-v3 shares the projections, so that an adapted layer is called once. No
/// matrix of (b, heads, tq, tk) is kept, only the log-sum-exp of each softmax row, as in
/// [`attention`](super::attention()).
///
/// `dropout`: (p, stream, draw) for the attention probabilities, whose elements are numbered in the order of
/// (b, heads, tq, tk).
///
/// # Shapes
/// - `q`: `(b * tq + m, heads * dim)`: the queries of each row of the batch, then `pq`
/// - `k`: `(b * tk + m, heads * dim)`: the keys of each row of the batch, then `pk`
/// - `v`: `(b, tk, heads * dim)`
/// - `rows`: for each distance from `-(tk - 1)` to `tk - 1`, the index of its row among the `m` positions;
///   query `i` is token `i` of its row of the batch, and `tq` is at most `tk`
/// - `padding`: `(b, tk)` of u8, 1 where the key is a real token
/// - output: `(b, tq, heads * dim)`
///
/// # Errors
/// If the shapes do not fit, an index in `rows` is not below `m`, or p is not in `[0, 1)`.
#[allow(clippy::too_many_arguments)]
pub fn disentangled_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    rows: &[u32],
    heads: usize,
    scale: f64,
    padding: &Tensor,
    dropout: Option<(f64, Stream, u64)>,
    path: OpPath,
) -> Result<Tensor> {
    let shape = Positioned::new(q, k, v, rows, heads)?;
    let Shape { b, tq, tk, .. } = shape.content;
    if padding.dims() != [b, tk] {
        bail!("attention: padding {:?} does not fit (batch, keys) of {:?}", padding.dims(), (b, tk));
    }
    if let Some((p, ..)) = dropout {
        check(p)?;
    }
    let mask = Mask { padding: Some(padding.clone()), ..Mask::default() };
    let dropout = dropout.filter(|(p, ..)| *p > 0.0);
    let probabilities = candle_core::Shape::from((b, heads, tq, tk));
    let keep =
        || dropout.map(|(p, stream, draw)| DropoutMask::new(probabilities.elem_count(), p, &stream, draw));
    let (dq, dk, dv) = (q.detach(), k.detach(), v.detach());
    match path.on(&[q, k, v]) {
        Implementation::Reference => {
            let visible = visible(&shape.content, &mask, q.device())?;
            let index = shape.index(rows, q)?;
            reference::disentangled_attention([q, k, v], &shape, &index, scale, visible, keep().as_ref())
        }
        Implementation::Slices => {
            let core = FusedDisentangled::new(shape, rows, scale as f32, padding, keep())?;
            let (y, log_sums) = core.forward(&dq, &dk, &dv)?;
            custom_vjp("disentangled attention", [q, k, v], y, move |call| {
                core.backward(call.args.each_ref(), &call.result, &call.grad, &log_sums)
            })
        }
        how => {
            let kind = (&probabilities, wide(q.dtype()), q.device());
            let plan = |(p, stream, draw)| DropoutPlan::new(kind, p, &stream, draw, how);
            let core = ComposedDisentangled {
                index: shape.index(rows, q)?,
                softmax: Softmax {
                    visible: visible(&shape.content, &mask, q.device())?,
                    dropout: dropout.map(plan).transpose()?,
                },
                shape,
                scale,
            };
            let (y, log_sums) = core.forward(&dq, &dk, &dv)?;
            custom_vjp("disentangled attention", [q, k, v], y, move |call| {
                core.backward(call.args.each_ref(), &call.result, &call.grad, &log_sums)
            })
        }
    }
}

/// The core in tensor operations.
struct ComposedDisentangled {
    shape: Positioned,
    index: Tensor, // (tq, tk)
    scale: f64,
    softmax: Softmax,
}

/// Queries and keys, and the positions `pq` and `pk`, split into heads.
struct Split {
    q: Tensor,
    pq: Tensor,
    k: Tensor,
    pk: Tensor,
}

impl ComposedDisentangled {
    fn split(&self, q: &Tensor, k: &Tensor) -> Result<Split> {
        let Shape { tq, tk, .. } = self.shape.content;
        let ((q, pq), (k, pk)) = (self.shape.split(q, tq)?, self.shape.split(k, tk)?);
        Ok(Split { q, pq, k, pk })
    }

    /// The indices of both gathers, (b, heads, tq, tk) and (b, heads, tk, tq).
    fn indices(&self) -> Result<[Tensor; 2]> {
        let Shape { b, heads, .. } = self.shape.content;
        Ok([spread(&self.index, b, heads)?, spread(&self.index.t()?, b, heads)?])
    }

    /// The scaled scores (b, heads, tq, tk) in the wide dtype, before masking.
    fn scores(&self, split: &Split, [by_query, by_key]: &[Tensor; 2]) -> Result<Tensor> {
        let dtype = wide(split.q.dtype());
        let product = |a: &Tensor, b: &Tensor| a.matmul(&b.transpose(2, 3)?.contiguous()?)?.to_dtype(dtype);
        let scores = product(&split.q, &split.k)?;
        let scores = (scores + product(&split.q, &split.pk)?.gather(by_query, 3)?)?;
        let scores = (scores + product(&split.k, &split.pq)?.gather(by_key, 3)?.transpose(2, 3)?)?;
        scores * self.scale
    }

    /// The output and the log-sum-exp of each row of scores, (b, heads, tq, 1).
    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (p, log_sums) = self.softmax.of(self.scores(&self.split(q, k)?, &self.indices()?)?)?;
        let p = self.softmax.drop(&p)?.to_dtype(v.dtype())?;
        let y = p.matmul(&self.shape.split_values(v, self.shape.content.tk)?)?;
        Ok((self.shape.join(&y)?, log_sums))
    }

    /// The gradients of q, k and v. With `P` the probabilities, `M` the dropout mask, `O` the output, `s` the
    /// scale, and `G_q` and `G_k` the gradients of the scores summed by rows of positions (`G_q[i, r]` is the
    /// sum over the keys whose distance from query i has row `r`): `dV = (P M)^T dO`,
    /// `dS = P (M dO V^T - rowsum(dO O))`, `dQ = s (dS K + G_q PK)`, `dK = s (dS^T Q + G_k PQ)`,
    /// `dPK = s G_q^T Q`, `dPQ = s G_k^T K`.
    fn backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        y: &Tensor,
        grad: &Tensor,
        log_sums: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let Shape { b, tq, tk, heads, .. } = self.shape.content;
        let (m, dtype) = (self.shape.positions, wide(q.dtype()));
        let (split, indices) = (self.split(q, k)?, self.indices()?);
        let values = self.shape.split_values(v, tk)?;
        let (y, dy) = (self.shape.split_values(y, tq)?, self.shape.split_values(grad, tq)?);
        let along = (y.to_dtype(dtype)? * dy.to_dtype(dtype)?)?.sum_keepdim(D::Minus1)?;
        let p = self.softmax.again(self.scores(&split, &indices)?, log_sums)?;
        let t = |x: &Tensor| x.transpose(2, 3)?.contiguous();
        let dv = t(&self.softmax.drop(&p)?.to_dtype(v.dtype())?)?.matmul(&dy)?;
        let dp = dy.matmul(&t(&values)?)?.to_dtype(dtype)?;
        let ds = ((self.softmax.drop(&dp)?.broadcast_sub(&along)? * p)? * self.scale)?;
        let gathered = |rows: usize, index: &Tensor, ds: &Tensor| {
            let none = Tensor::zeros((b, heads, rows, m), dtype, ds.device())?;
            none.scatter_add(index, ds, 3)?.to_dtype(q.dtype())
        };
        let by_query = gathered(tq, &indices[0], &ds)?; // (b, heads, tq, m)
        let by_key = gathered(tk, &indices[1], &t(&ds)?)?; // (b, heads, tk, m)
        let ds = ds.to_dtype(q.dtype())?;
        let dq = (ds.matmul(&split.k)? + by_query.matmul(&split.pk)?)?;
        let dk = (t(&ds)?.matmul(&split.q)? + by_key.matmul(&split.pq)?)?;
        let (dpk, dpq) = (t(&by_query)?.matmul(&split.q)?, t(&by_key)?.matmul(&split.k)?);
        Ok([
            Some(self.shape.unsplit(&dq, &dpq)?),
            Some(self.shape.unsplit(&dk, &dpk)?),
            Some(self.shape.join(&dv)?),
        ])
    }
}
