//! The product of a few rows with a weight that is read in place.

use rayon::prelude::*;

use pulp::{Arch, Simd, WithSimd};

/// The largest number of rows for this product: beyond it, arithmetic outweighs reading the weight.
pub(super) const FEW_ROWS: usize = 32;

/// The number of rows of the weight that one task reads.
const PIECE: usize = 64;

/// `y += x W^T` for `n` rows of x.
///
/// `gemm` packs its operands first, which for a transposed weight of m rows costs as much as m / 25 rows of
/// arithmetic. Here each row of W is read once, in order, and nothing is packed: 3 times as fast at 16 rows
/// of 768, and at memory bandwidth for one row.
pub(super) fn add_product(y: &mut [f32], xs: &[f32], weight: &[f32], n: usize) {
    let (in_dim, out_dim) = (xs.len() / n.max(1), y.len() / n.max(1));
    if in_dim == 0 || out_dim == 0 {
        return;
    }
    let pieces: Vec<Vec<f32>> = weight
        .par_chunks(PIECE * in_dim)
        .map(|weight| {
            let mut sums = vec![0f32; weight.len() / in_dim * n];
            Arch::new().dispatch(Piece { sums: &mut sums, xs, weight, in_dim });
            sums
        })
        .collect();
    for (piece, sums) in pieces.iter().enumerate() {
        for (j, sums) in sums.chunks_exact(n).enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                y[i * out_dim + piece * PIECE + j] += sum;
            }
        }
    }
}

/// The product of some rows of the weight with all rows of x; `sums` is (weight rows, x rows).
struct Piece<'a> {
    sums: &'a mut [f32],
    xs: &'a [f32],
    weight: &'a [f32],
    in_dim: usize,
}

impl WithSimd for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let n = self.xs.len() / self.in_dim;
        let weight: Vec<&[f32]> = self.weight.chunks_exact(self.in_dim).collect();
        let xs: Vec<&[f32]> = self.xs.chunks_exact(self.in_dim).collect();
        // Blocks of 4 x 4 keep the sums in registers; the remaining rows go one by one.
        for (j, ws) in weight.chunks(4).enumerate() {
            for (i, xs) in xs.chunks(4).enumerate() {
                let mut put = |row: usize, sums: &[f32]| {
                    let start = (4 * j + row) * n + 4 * i;
                    self.sums[start..start + sums.len()].copy_from_slice(sums);
                };
                match (<[&[f32]; 4]>::try_from(ws), <[&[f32]; 4]>::try_from(xs)) {
                    (Ok(ws), Ok(xs)) => {
                        dots(simd, ws, xs).iter().enumerate().for_each(|(row, sums)| put(row, sums));
                    }
                    (Ok(ws), Err(_)) => {
                        for (column, x) in xs.iter().enumerate() {
                            for (row, [sum]) in dots(simd, ws, [x]).into_iter().enumerate() {
                                self.sums[(4 * j + row) * n + 4 * i + column] = sum;
                            }
                        }
                    }
                    _ => {
                        for (row, w) in ws.iter().enumerate() {
                            for (column, x) in xs.iter().enumerate() {
                                self.sums[(4 * j + row) * n + 4 * i + column] = dots(simd, [w], [x])[0][0];
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The inner products of J rows with I rows, all of the same length.
#[inline(always)]
fn dots<S: Simd, const J: usize, const I: usize>(simd: S, ws: [&[f32]; J], xs: [&[f32]; I]) -> [[f32; I]; J] {
    let (w_heads, w_tails) = (ws.map(|w| S::as_simd_f32s(w).0), ws.map(|w| S::as_simd_f32s(w).1));
    let (x_heads, x_tails) = (xs.map(|x| S::as_simd_f32s(x).0), xs.map(|x| S::as_simd_f32s(x).1));
    let mut sums = [[simd.splat_f32s(0.0); I]; J];
    for k in 0..w_heads[0].len() {
        let x = x_heads.map(|x| x[k]);
        for (sums, w) in sums.iter_mut().zip(w_heads) {
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = simd.mul_add_f32s(w[k], x, *sum);
            }
        }
    }
    let mut out = [[0f32; I]; J];
    for j in 0..J {
        for i in 0..I {
            let rest: f32 = w_tails[j].iter().zip(x_tails[i]).map(|(w, x)| w * x).sum();
            out[j][i] = simd.reduce_sum_f32s(sums[j][i]) + rest;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Noise, Purpose};

    #[test]
    fn few_rows_give_the_products_of_their_definition() {
        // Full and partial blocks, tails of the inner dimension, more than one piece.
        for (n, in_dim, out_dim) in
            [(1, 1, 1), (4, 16, 8), (5, 37, 130), (7, 64, 67), (32, 100, 3), (1, 19, 9)]
        {
            let random = |path: &str, len| {
                let mut values = vec![0f32; len];
                Noise::new(4).stream(path, Purpose::Init).fill_normal_f32(0, &mut values);
                values
            };
            let (xs, weight) = (random("x", n * in_dim), random("w", out_dim * in_dim));
            let mut y = vec![0.5f32; n * out_dim];
            add_product(&mut y, &xs, &weight, n);
            for (i, y) in y.iter().enumerate() {
                let (x, w) = (&xs[i / out_dim * in_dim..], &weight[i % out_dim * in_dim..]);
                let want: f64 = (0..in_dim).map(|k| f64::from(x[k]) * f64::from(w[k])).sum();
                assert!((f64::from(*y) - want - 0.5).abs() < 2e-5, "{n} {in_dim} {out_dim} at {i}");
            }
        }
    }
}
