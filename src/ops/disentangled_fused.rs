//! Disentangled attention on slices: one task for each (batch, head), which goes through the
//! query rows in blocks.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::attention_fused::{heads, join, readable, softmax, Heads, BLOCK};
use super::attention_mask::{padding_bytes, Shape};
use super::disentangled_shape::Positioned;
use super::dropout_mask::DropoutMask;
use super::gemm::{gemm, Into, Mat};
use super::host::{add_assign, dense, tensor, Host};
use super::vmath;
use crate::util::simd::vectorized;

/// The constants of one call.
pub(super) struct FusedDisentangled {
    shape: Positioned,
    /// The row of positions of each distance, largest distance first, so that those of one query's
    /// keys are contiguous.
    rows: Vec<u32>,
    scale: f32,
    padding: Vec<u8>,
    keep: Option<DropoutMask>,
}

/// A projection of the batch's tokens followed by the positions, read in place.
struct Projected<'a> {
    content: Heads<'a>,
    positions: Heads<'a>,
}

impl FusedDisentangled {
    pub fn new(
        shape: Positioned,
        rows: &[u32],
        scale: f32,
        padding: &Tensor,
        keep: Option<DropoutMask>,
    ) -> Result<Self> {
        let rows = rows.iter().rev().copied().collect();
        Ok(Self { shape, rows, scale, padding: padding_bytes(padding)?, keep })
    }

    /// The views of a projection with `t` tokens in each row of the batch.
    fn projected<'a>(&self, x: &'a [f32], t: usize) -> Projected<'a> {
        let Shape { b, heads, dim, .. } = self.shape.content;
        let width = heads * dim;
        Projected {
            content: Heads { data: x, batch_stride: t * width, row_stride: width, dim },
            positions: Heads { data: &x[b * t * width..], batch_stride: 0, row_stride: width, dim },
        }
    }

    /// The output and the log-sum-exp of each row of scores, (b, heads, tq).
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Vec<f32>)> {
        let Shape { b, tq, tk, heads: n, dim, .. } = self.shape.content;
        let (q, k, v) = (dense(q)?, dense(k)?, readable(v)?);
        let (qh, kh, vh) = (Host::of(&q)?, Host::of(&k)?, Host::from_first(&v)?);
        let (q, k, v) = (self.projected(&qh, tq), self.projected(&kh, tk), heads(&vh, &v, dim));
        let mut y = vec![0f32; b * n * tq * dim]; // (b, heads, tq, dim)
        let mut log_sums = vec![0f32; b * n * tq];
        let task = |i: usize, y: &mut [f32], log_sums: &mut [f32]| {
            let (batch, head) = (i / n, i % n);
            let by_key = self.by_key(&k, &q, batch, head);
            let (mut scores, mut by_query) = self.buffers();
            for first in (0..tq).step_by(BLOCK) {
                let rows = BLOCK.min(tq - first);
                let at = (batch, head, first, rows);
                let p = &mut scores[..rows * tk];
                self.scores(p, &mut by_query, &by_key, &q, &k, at);
                vectorized!({
                    for (r, row) in p.chunks_exact_mut(tk.max(1)).enumerate() {
                        log_sums[first + r] = softmax(row);
                        if let Some(keep) = &self.keep {
                            keep.multiply((i * tq + first + r) * tk, row);
                        }
                    }
                });
                let out = &mut y[first * dim..(first + rows) * dim];
                gemm(out, Into::SetHere, 1.0, Mat::new(p, rows, tk), v.rows(batch, head, 0, tk));
            }
        };
        let pieces = y.par_chunks_mut((tq * dim).max(1)).zip(log_sums.par_chunks_mut(tq.max(1)));
        pieces.enumerate().for_each(|(i, (y, log_sums))| task(i, y, log_sums));
        Ok((tensor(join(&y, tq, n, dim), (b, tq, n * dim))?, log_sums))
    }

    /// The gradients of q, k and v; the formulae are in `disentangled.rs`.
    pub fn backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        y: &Tensor,
        grad: &Tensor,
        log_sums: &[f32],
    ) -> Result<[Option<Tensor>; 3]> {
        let Shape { b, tq, tk, heads: n, dim, .. } = self.shape.content;
        let m = self.shape.positions;
        let (q, k, v) = (dense(q)?, dense(k)?, readable(v)?);
        let (qh, kh, vh) = (Host::of(&q)?, Host::of(&k)?, Host::from_first(&v)?);
        let (q, k, v) = (self.projected(&qh, tq), self.projected(&kh, tk), heads(&vh, &v, dim));
        let (yh, gh) = (Host::from_first(y)?, Host::from_first(grad)?);
        let (y, dy) = (heads(&yh, y, dim), heads(&gh, grad, dim));
        let mut dq = vec![0f32; b * n * tq * dim]; // (b, heads, tq, dim)
        let mut dk = vec![0f32; b * n * tk * dim]; // (b, heads, tk, dim)
        let mut dv = dk.clone();
        let mut dpq = vec![0f32; b * n * m * dim]; // (b, heads, m, dim)
        let mut dpk = dpq.clone();
        let task = |i: usize, [dq, dk, dv, dpq, dpk]: [&mut [f32]; 5]| {
            let (batch, head) = (i / n, i % n);
            let by_key = self.by_key(&k, &q, batch, head);
            let (mut scores, mut by_query) = self.buffers();
            let mut ds = scores.clone();
            let (mut slopes_by_key, mut slopes_by_query) = (vec![0f32; tk * m], by_query.clone());
            let mut dropped = Vec::new();
            let keys = k.content.rows(batch, head, 0, tk);
            let key_positions = k.positions.rows(0, head, 0, m);
            for first in (0..tq).step_by(BLOCK) {
                let rows = BLOCK.min(tq - first);
                let at = (batch, head, first, rows);
                let row_index = |r: usize| i * tq + first + r;
                let (p, ds) = (&mut scores[..rows * tk], &mut ds[..rows * tk]);
                self.scores(p, &mut by_query, &by_key, &q, &k, at);
                vectorized!({
                    for (r, p) in p.chunks_exact_mut(tk.max(1)).enumerate() {
                        let log_sum = log_sums[row_index(r)];
                        p.iter_mut().for_each(|p| *p = vmath::exp(*p - log_sum));
                    }
                });
                let dys = dy.rows(batch, head, first, rows);
                gemm(ds, Into::SetHere, 1.0, dys, v.rows(batch, head, 0, tk).t());
                let weights: &[f32] = match &self.keep {
                    Some(keep) => {
                        dropped.clear();
                        dropped.extend_from_slice(p);
                        vectorized!({
                            for (r, row) in dropped.chunks_exact_mut(tk.max(1)).enumerate() {
                                keep.multiply(row_index(r) * tk, row);
                            }
                        });
                        &dropped
                    }
                    None => p,
                };
                gemm(dv, Into::AddHere, 1.0, Mat::new(weights, rows, tk).t(), dys);
                vectorized!({
                    let width = tk.max(1);
                    for (r, (ds, p)) in ds.chunks_exact_mut(width).zip(p.chunks_exact(width)).enumerate() {
                        if let Some(keep) = &self.keep {
                            keep.multiply(row_index(r) * tk, ds);
                        }
                        let (y, dy) = (y.row(batch, head, first + r), dy.row(batch, head, first + r));
                        let along = vmath::sum2(y, dy, |y, dy| y * dy);
                        for (ds, p) in ds.iter_mut().zip(p) {
                            *ds = (*ds - along) * p;
                        }
                    }
                });
                let slopes = &mut slopes_by_query[..rows * m];
                slopes.fill(0.0);
                for (r, ds) in ds.chunks_exact(tk.max(1)).enumerate() {
                    let slopes = &mut slopes[r * m..(r + 1) * m];
                    for (j, (ds, row)) in ds.iter().zip(self.rows_of(first + r)).enumerate() {
                        slopes[*row as usize] += ds;
                        slopes_by_key[j * m + *row as usize] += ds;
                    }
                }
                let queries = q.content.rows(batch, head, first, rows);
                let (ds, slopes) = (Mat::new(ds, rows, tk), Mat::new(slopes, rows, m));
                let dq = &mut dq[first * dim..(first + rows) * dim];
                gemm(dq, Into::SetHere, self.scale, ds, keys);
                gemm(dq, Into::AddHere, self.scale, slopes, key_positions);
                gemm(dk, Into::AddHere, self.scale, ds.t(), queries);
                gemm(dpk, Into::AddHere, self.scale, slopes.t(), queries);
            }
            let slopes = Mat::new(&slopes_by_key, tk, m);
            gemm(dk, Into::AddHere, self.scale, slopes, q.positions.rows(0, head, 0, m));
            gemm(dpq, Into::SetHere, self.scale, slopes.t(), keys);
        };
        let (q_task, k_task, p_task) = ((tq * dim).max(1), (tk * dim).max(1), (m * dim).max(1));
        let pieces = dq.par_chunks_mut(q_task).zip(dk.par_chunks_mut(k_task)).zip(dv.par_chunks_mut(k_task));
        let pieces = pieces.zip(dpq.par_chunks_mut(p_task)).zip(dpk.par_chunks_mut(p_task));
        pieces.enumerate().for_each(|(i, ((((dq, dk), dv), dpq), dpk))| task(i, [dq, dk, dv, dpq, dpk]));
        let width = n * dim;
        let whole = |content: &[f32], t: usize, positions: &[f32]| {
            let mut rows = join(content, t, n, dim);
            rows.extend(join(&self.over_batch(positions), m, n, dim));
            tensor(rows, (b * t + m, width))
        };
        let dv = tensor(join(&dv, tk, n, dim), (b, tk, width))?;
        Ok([Some(whole(&dq, tq, &dpq)?), Some(whole(&dk, tk, &dpk)?), Some(dv)])
    }

    /// The buffers of a block: its scores, and the products of its queries with the positions.
    fn buffers(&self) -> (Vec<f32>, Vec<f32>) {
        let Shape { tq, tk, .. } = self.shape.content;
        let rows = BLOCK.min(tq);
        (vec![0f32; rows * tk], vec![0f32; rows * self.shape.positions])
    }

    /// The scaled products of a head's keys with the positions `pq`, (tk, m).
    fn by_key(&self, k: &Projected, q: &Projected, batch: usize, head: usize) -> Vec<f32> {
        let (tk, m) = (self.shape.content.tk, self.shape.positions);
        let mut out = vec![0f32; tk * m];
        let keys = k.content.rows(batch, head, 0, tk);
        gemm(&mut out, Into::SetHere, self.scale, keys, q.positions.rows(0, head, 0, m).t());
        out
    }

    /// The row of positions of each key, seen from query `i`.
    #[inline(always)]
    fn rows_of(&self, i: usize) -> &[u32] {
        let tk = self.shape.content.tk;
        &self.rows[tk - 1 - i..][..tk]
    }

    /// Computes the scores of a block of queries, minus infinity for padding; `by_query` is scratch space.
    fn scores(
        &self,
        scores: &mut [f32],
        by_query: &mut [f32],
        by_key: &[f32],
        q: &Projected,
        k: &Projected,
        (batch, head, first, rows): (usize, usize, usize, usize),
    ) {
        let (tk, m) = (self.shape.content.tk, self.shape.positions);
        let queries = q.content.rows(batch, head, first, rows);
        let by_query = &mut by_query[..rows * m];
        gemm(scores, Into::SetHere, self.scale, queries, k.content.rows(batch, head, 0, tk).t());
        gemm(by_query, Into::SetHere, self.scale, queries, k.positions.rows(0, head, 0, m).t());
        let padding = &self.padding[batch * tk..(batch + 1) * tk];
        for (r, scores) in scores.chunks_exact_mut(tk.max(1)).enumerate() {
            let by_query = &by_query[r * m..(r + 1) * m];
            for (j, (score, row)) in scores.iter_mut().zip(self.rows_of(first + r)).enumerate() {
                let row = *row as usize;
                let sum = *score + by_query[row] + by_key[j * m + row];
                *score = if padding[j] == 0 { f32::NEG_INFINITY } else { sum };
            }
        }
    }

    /// Sums (b, heads, m, dim) over the batch.
    fn over_batch(&self, xs: &[f32]) -> Vec<f32> {
        let size = xs.len() / self.shape.content.b;
        let (first, rest) = xs.split_at(size);
        let mut sum = first.to_vec();
        rest.chunks_exact(size.max(1)).for_each(|part| add_assign(&mut sum, part));
        sum
    }
}
