//! The attention core on slices: one task for each (batch, key head), which goes through the
//! query rows in blocks.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::attention_mask::{padding_bytes, Mask, Scores, Shape, Window};
use super::dropout_mask::DropoutMask;
use super::gemm::{gemm, Into, Mat};
use super::host::{for_rows, tensor, Host};
use super::vmath;
use crate::util::simd::vectorized;

/// Query rows per block of scores. A block stays in cache, and keys that no row of a causal
/// block sees are skipped.
pub(super) const BLOCK: usize = 64;

/// A [`Mask`] on the host.
pub(super) struct HostMask {
    padding: Option<Vec<u8>>,
    causal: bool,
    window: Option<usize>,
}

impl HostMask {
    pub fn new(mask: &Mask) -> Result<Self> {
        let padding = mask.padding.as_ref().map(padding_bytes).transpose()?;
        let window = mask.window.as_ref().map(Window::size);
        Ok(Self { padding, causal: mask.causal.is_some(), window })
    }
}

/// The constants of one call.
pub(super) struct FusedAttention {
    pub shape: Shape,
    pub scores: Scores,
    pub mask: HostMask,
    pub keep: Option<DropoutMask>,
}

/// A projected tensor (b, t, n * dim), read in place through strides.
pub(super) struct Heads<'a> {
    pub data: &'a [f32],
    pub batch_stride: usize,
    pub row_stride: usize,
    pub dim: usize,
}

impl<'a> Heads<'a> {
    /// `rows` rows of one head, starting at row `first`.
    pub fn rows(&self, batch: usize, head: usize, first: usize, rows: usize) -> Mat<'a> {
        let start = batch * self.batch_stride + first * self.row_stride + head * self.dim;
        Mat::strided(self.data.get(start..).unwrap_or(&[]), rows, self.dim, self.row_stride)
    }

    /// One row of one head.
    pub fn row(&self, batch: usize, head: usize, row: usize) -> &'a [f32] {
        let start = batch * self.batch_stride + row * self.row_stride + head * self.dim;
        &self.data[start..start + self.dim]
    }
}

/// The detached tensor with a dense last dimension. Batches and rows may have any stride, so that a slice of
/// a fused projection is read in place.
pub(super) fn readable(x: &Tensor) -> Result<Tensor> {
    if x.stride().last() == Some(&1) {
        Ok(x.detach())
    } else {
        x.detach().contiguous()
    }
}

pub(super) fn heads<'a>(host: &'a Host<'a>, x: &Tensor, dim: usize) -> Heads<'a> {
    Heads { data: host, batch_stride: x.stride()[0], row_stride: x.stride()[1], dim }
}

impl FusedAttention {
    /// The output and the log-sum-exp of each row of scores, (b, heads, tq).
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Vec<f32>)> {
        let Shape { b, tq, tk, heads: n, kv_heads, dim } = self.shape;
        let group = self.shape.group();
        let (q, k, v) = (readable(q)?, readable(k)?, readable(v)?);
        let (qh, kh, vh) = (Host::from_first(&q)?, Host::from_first(&k)?, Host::from_first(&v)?);
        let (q, k, v) = (heads(&qh, &q, dim), heads(&kh, &k, dim), heads(&vh, &v, dim));
        let scale = self.scores.scale as f32;
        let mut y = vec![0f32; b * n * tq * dim]; // (b, heads, tq, dim)
        let mut log_sums = vec![0f32; b * n * tq];
        let task = |(i, (y, log_sums)): (usize, (&mut [f32], &mut [f32]))| {
            let (batch, kv_head) = (i / kv_heads, i % kv_heads);
            let mut scores = vec![0f32; BLOCK.min(tq) * tk];
            for (head, first, rows) in self.blocks(kv_head) {
                let at = (head % group) * tq + first;
                let at_keys = self.seen(first..first + rows);
                let (start, seen) = (at_keys.start, at_keys.len());
                let p = &mut scores[..rows * seen];
                let keys = k.rows(batch, kv_head, start, seen).t();
                gemm(p, Into::SetHere, scale, q.rows(batch, head, first, rows), keys);
                vectorized!({
                    self.cap(p);
                    for (r, p) in p.chunks_exact_mut(seen.max(1)).enumerate() {
                        self.hide(p, batch, first + r, start);
                        log_sums[at + r] = softmax(p);
                        if let Some(keep) = &self.keep {
                            keep.multiply(((batch * n + head) * tq + first + r) * tk + start, p);
                        }
                    }
                });
                let values = v.rows(batch, kv_head, start, seen);
                gemm(
                    &mut y[at * dim..(at + rows) * dim],
                    Into::SetHere,
                    1.0,
                    Mat::new(p, rows, seen),
                    values,
                );
            }
        };
        let (y_task, sums_task) = ((group * tq * dim).max(1), (group * tq).max(1));
        y.par_chunks_mut(y_task).zip(log_sums.par_chunks_mut(sums_task)).enumerate().for_each(task);
        Ok((tensor(join(&y, tq, n, dim), (b, tq, n * dim))?, log_sums))
    }

    /// The gradients of q, k and v; the formulae are in `attention.rs`.
    pub fn backward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        grad: &Tensor,
        log_sums: &[f32],
    ) -> Result<[Option<Tensor>; 3]> {
        let Shape { b, tq, tk, heads: n, kv_heads, dim } = self.shape;
        let group = self.shape.group();
        let (q, k, v) = (readable(q)?, readable(k)?, readable(v)?);
        let (qh, kh, vh) = (Host::from_first(&q)?, Host::from_first(&k)?, Host::from_first(&v)?);
        let (q, k, v) = (heads(&qh, &q, dim), heads(&kh, &k, dim), heads(&vh, &v, dim));
        let (yh, gh) = (Host::from_first(y)?, Host::from_first(grad)?);
        let (y, dy) = (heads(&yh, y, dim), heads(&gh, grad, dim));
        let scale = self.scores.scale as f32;
        let mut dq = vec![0f32; b * n * tq * dim]; // (b, heads, tq, dim)
        let mut dk = vec![0f32; b * kv_heads * tk * dim]; // (b, kv_heads, tk, dim)
        let mut dv = dk.clone();
        let task = |i: usize, dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]| {
            let (batch, kv_head) = (i / kv_heads, i % kv_heads);
            let size = BLOCK.min(tq) * tk;
            let (mut ps, mut dropped, mut ds) = (vec![0f32; size], Vec::new(), vec![0f32; size]);
            let mut slopes = Vec::new(); // the cap's derivatives
            for (head, first, rows) in self.blocks(kv_head) {
                let at = (head % group) * tq + first;
                let at_keys = self.seen(first..first + rows);
                let (start, seen) = (at_keys.start, at_keys.len());
                let (p, ds) = (&mut ps[..rows * seen], &mut ds[..rows * seen]);
                let (queries, keys) = (q.rows(batch, head, first, rows), k.rows(batch, kv_head, start, seen));
                let (values, dys) = (v.rows(batch, kv_head, start, seen), dy.rows(batch, head, first, rows));
                gemm(p, Into::SetHere, scale, queries, keys.t());
                gemm(ds, Into::SetHere, 1.0, dys, values.t());
                let row_index = |r: usize| (batch * n + head) * tq + first + r;
                if let Some(cap) = self.scores.cap.map(|cap| cap as f32) {
                    vectorized!({
                        self.cap(p);
                        slopes.clear();
                        slopes.extend(p.iter().map(|score| 1.0 - (score / cap) * (score / cap)));
                    });
                }
                let (cells, here) = (|r: usize| row_index(r) * tk + start, start * dim..(start + seen) * dim);
                vectorized!({
                    for (r, p) in p.chunks_exact_mut(seen.max(1)).enumerate() {
                        self.hide(p, batch, first + r, start);
                        let log_sum = log_sums[row_index(r)];
                        p.iter_mut().for_each(|p| *p = vmath::exp(*p - log_sum));
                    }
                });
                let weights: &[f32] = match &self.keep {
                    Some(keep) => {
                        dropped.clear();
                        dropped.extend_from_slice(p);
                        vectorized!({
                            for (r, row) in dropped.chunks_exact_mut(seen.max(1)).enumerate() {
                                keep.multiply(cells(r), row);
                            }
                        });
                        &dropped
                    }
                    None => p,
                };
                gemm(&mut dv[here.clone()], Into::AddHere, 1.0, Mat::new(weights, rows, seen).t(), dys);
                let width = seen.max(1);
                vectorized!({
                    for (r, (ds, p)) in ds.chunks_exact_mut(width).zip(p.chunks_exact(width)).enumerate() {
                        if let Some(keep) = &self.keep {
                            keep.multiply(cells(r), ds);
                        }
                        let (y, dy) = (y.row(batch, head, first + r), dy.row(batch, head, first + r));
                        let along = vmath::sum2(y, dy, |y, dy| y * dy);
                        for (ds, p) in ds.iter_mut().zip(p) {
                            *ds = (*ds - along) * p;
                        }
                    }
                    ds.iter_mut().zip(&slopes).for_each(|(ds, slope)| *ds *= slope);
                });
                let ds = Mat::new(ds, rows, seen);
                gemm(&mut dq[at * dim..(at + rows) * dim], Into::SetHere, scale, ds, keys);
                gemm(&mut dk[here], Into::AddHere, scale, ds.t(), queries);
            }
        };
        let (q_task, k_task) = ((group * tq * dim).max(1), (tk * dim).max(1));
        let pieces = dq.par_chunks_mut(q_task).zip(dk.par_chunks_mut(k_task)).zip(dv.par_chunks_mut(k_task));
        pieces.enumerate().for_each(|(i, ((dq, dk), dv))| task(i, dq, dk, dv));
        let dq = tensor(join(&dq, tq, n, dim), (b, tq, n * dim))?;
        let dk = tensor(join(&dk, tk, kv_heads, dim), (b, tk, kv_heads * dim))?;
        let dv = tensor(join(&dv, tk, kv_heads, dim), (b, tk, kv_heads * dim))?;
        Ok([Some(dq), Some(dk), Some(dv)])
    }

    /// Caps scores in place if there is a cap.
    #[inline(always)]
    fn cap(&self, scores: &mut [f32]) {
        if let Some(cap) = self.scores.cap.map(|cap| cap as f32) {
            scores.iter_mut().for_each(|score| *score = cap * vmath::tanh(*score / cap));
        }
    }

    /// The blocks of query rows, as (head, first row, number of rows), of all query heads
    /// that share a key head.
    fn blocks(&self, kv_head: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        let (tq, group) = (self.shape.tq, self.shape.group());
        (kv_head * group..(kv_head + 1) * group).flat_map(move |head| {
            (0..tq).step_by(BLOCK).map(move |first| (head, first, BLOCK.min(tq - first)))
        })
    }

    /// The range of keys that at least one of these rows sees, ignoring padding.
    fn seen(&self, rows: Range<usize>) -> Range<usize> {
        let Shape { tq, tk, .. } = self.shape;
        // The position of a row among the keys is tk - tq + row.
        let end = match (self.mask.causal, self.mask.window) {
            (true, _) => (tk + rows.end).saturating_sub(tq).min(tk),
            (false, Some(window)) => (tk + rows.end - 1).saturating_add(window).saturating_sub(tq).min(tk),
            (false, None) => tk,
        };
        let start = self
            .mask
            .window
            .map_or(0, |window| (tk + rows.start + 1).saturating_sub(tq.saturating_add(window)));
        start..end
    }

    /// Sets the scores of keys that query `row` does not see to minus infinity; `scores`
    /// starts at key `start`.
    #[inline(always)]
    fn hide(&self, scores: &mut [f32], batch: usize, row: usize, start: usize) {
        let seen = self.seen(row..row + 1);
        let (from, to) = (seen.start - start, (seen.end - start).min(scores.len()));
        scores[..from].fill(f32::NEG_INFINITY);
        scores[to..].fill(f32::NEG_INFINITY);
        if let Some(padding) = &self.mask.padding {
            let first = batch * self.shape.tk + seen.start;
            for (score, &real) in scores[from..to].iter_mut().zip(&padding[first..]) {
                *score = if real == 0 { f32::NEG_INFINITY } else { *score };
            }
        }
    }
}

/// Rearranges (.., n, t, dim) to (.., t, n * dim).
pub(super) fn join(x: &[f32], t: usize, n: usize, dim: usize) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    for_rows(&mut out, n * dim, |first, out| {
        for (i, out) in out.chunks_exact_mut(n * dim).enumerate() {
            let (batch, row) = ((first + i) / t, (first + i) % t);
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let start = ((batch * n + head) * t + row) * dim;
                out.copy_from_slice(&x[start..start + dim]);
            }
        }
    });
    out
}

/// Applies softmax in place and returns the log-sum-exp. A row that sees no key becomes zero and its
/// log-sum-exp infinite, so that backward's `exp(score - log_sum)` is zero again.
#[inline(always)]
pub(super) fn softmax(row: &mut [f32]) -> f32 {
    let max = vmath::max(row);
    if max == f32::NEG_INFINITY && row.iter().all(|&x| x == f32::NEG_INFINITY) {
        row.fill(0.0);
        return f32::INFINITY;
    }
    row.iter_mut().for_each(|x| *x = vmath::exp(*x - max));
    let sum = vmath::sum(row, |x| x);
    row.iter_mut().for_each(|x| *x /= sum);
    max + sum.ln()
}
