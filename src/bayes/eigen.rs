//! Eigenvalues and eigenvectors of symmetric matrices, in double precision on the host.
//!
//! Householder reflections reduce the matrix to tridiagonal form, and implicit QL steps with Wilkinson's
//! shift diagonalise it (Golub and Van Loan, "Matrix computations", section 8.3; `tqli` of Press et al.,
//! "Numerical recipes", section 11.3). Candle has no decompositions. Of the crates that have them, nalgebra
//! changes the features of Candle's dependencies, and faer brings a second gemm.

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::util::simd::vectorized;

/// The non-negative eigenvalues and the eigenvectors of a positive semi-definite matrix.
#[derive(Debug, Clone)]
pub(super) struct Eigen {
    pub values: Vec<f64>,
    /// `(n, n)`, eigenvector j as row j.
    pub vectors: Tensor,
}

impl Eigen {
    /// Decomposes `matrix`, `(n, n)`; `name` appears in errors. Negative eigenvalues are treated as rounding
    /// errors and become zero.
    ///
    /// # Errors
    /// If an element is not finite, or the iteration does not converge.
    pub fn new(name: &str, matrix: &Tensor) -> Result<Self> {
        let mut rows = matrix.to_vec2::<f64>()?;
        if rows.iter().flatten().any(|v| !v.is_finite()) {
            return Err(Error::tensor(name, "the matrix to decompose holds NaN or infinity"));
        }
        let n = rows.len();
        let (mut diagonal, mut beside, mut vectors) = vectorized!(tridiagonal(&mut rows));
        if !vectorized!(diagonalise(&mut diagonal, &mut beside, &mut vectors)) {
            return Err(Error::tensor(name, "the eigenvalues of its products do not converge"));
        }
        let vectors = Tensor::from_vec(vectors.concat(), (n, n), &Device::Cpu)?;
        Ok(Self { values: diagonal.into_iter().map(|value| value.max(0.0)).collect(), vectors })
    }
}

/// Reduces `a` to the tridiagonal `Q^T A Q`. Returns its diagonal, its off-diagonal (padded with a zero to
/// the same length) and Q^T.
#[inline(always)] // into `vectorized!`
fn tridiagonal(a: &mut [Vec<f64>]) -> (Vec<f64>, Vec<f64>, Vec<Vec<f64>>) {
    let n = a.len();
    let mut beside = vec![0.0; n];
    // 1 - beta v v^T acts on the rows from k + 1 on.
    let mut reflections: Vec<(f64, Vec<f64>)> = Vec::with_capacity(n);
    for k in 0..n.saturating_sub(1) {
        let mut v: Vec<f64> = a[k + 1..].iter().map(|row| row[k]).collect();
        let largest = v.iter().fold(0f64, |most, x| most.max(x.abs()));
        if largest == 0.0 {
            reflections.push((0.0, v));
            continue;
        }
        // Scale first: squares of small numbers would underflow to zero.
        v.iter_mut().for_each(|x| *x /= largest);
        let norm = dot(&v, &v).sqrt();
        let head = -norm.copysign(v[0]);
        beside[k] = head * largest;
        v[0] -= head;
        let beta = 2.0 / dot(&v, &v);
        let rest = &mut a[k + 1..];
        let mut w: Vec<f64> = rest.iter().map(|row| beta * dot(&row[k + 1..], &v)).collect();
        let half = 0.5 * beta * dot(&w, &v);
        w.iter_mut().zip(&v).for_each(|(w, v)| *w -= half * v);
        for (i, row) in rest.iter_mut().enumerate() {
            let (vi, wi) = (v[i], w[i]);
            row[k + 1..].iter_mut().zip(v.iter().zip(&w)).for_each(|(x, (v, w))| *x -= vi * w + wi * v);
        }
        reflections.push((beta, v));
    }
    let diagonal = a.iter().enumerate().map(|(i, row)| row[i]).collect();
    // Accumulate Q^T from the last reflection to the first; its rows are the columns of Q.
    let mut q: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for (k, (beta, v)) in reflections.iter().enumerate().rev() {
        for column in &mut q[k + 1..] {
            let along = beta * dot(&column[k + 1..], v);
            column[k + 1..].iter_mut().zip(v).for_each(|(x, v)| *x -= along * v);
        }
    }
    (diagonal, beside, q)
}

/// Diagonalises the tridiagonal matrix with diagonal `d` and off-diagonal `e`: `d` becomes the eigenvalues,
/// and the rows of `vectors` are rotated into the eigenvectors. Returns false if an eigenvalue does not
/// converge within 60 steps.
#[inline(always)]
fn diagonalise(d: &mut [f64], e: &mut [f64], vectors: &mut [Vec<f64>]) -> bool {
    let n = d.len();
    let size = d.iter().zip(e.iter()).fold(0f64, |most, (d, e)| most.max(d.abs() + e.abs()));
    // Relative to the whole matrix: a curvature of low rank has a block of nothing but rounding errors.
    let least = f64::EPSILON * size;
    for l in 0..n {
        for step in 0.. {
            let m = (l..n).find(|m| *m + 1 == n || e[*m].abs() <= least).unwrap_or(l);
            if m == l {
                break;
            }
            if step == 60 {
                return false;
            }
            let shift = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let mut g = d[m] - d[l] + e[l] / (shift + shift.hypot(1.0).copysign(shift));
            let (mut sin, mut cos, mut p) = (1.0, 1.0, 0.0);
            let mut split = false;
            for i in (l..m).rev() {
                let (f, b) = (sin * e[i], cos * e[i]);
                let r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    split = true;
                    break;
                }
                (sin, cos) = (f / r, g / r);
                g = d[i + 1] - p;
                let r = (d[i] - g) * sin + 2.0 * cos * b;
                p = sin * r;
                d[i + 1] = g + p;
                g = cos * r - b;
                let (before, after) = vectors.split_at_mut(i + 1);
                for (x, y) in before[i].iter_mut().zip(after[0].iter_mut()) {
                    (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
                }
            }
            if !split {
                d[l] -= p;
                e[l] = g;
                e[m] = 0.0;
            }
        }
    }
    true
}

#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Four partial sums, so that the compiler can vectorise the loop.
    let mut sums = [0.0; 4];
    let (left, right) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest: f64 = left.remainder().iter().zip(right.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in left.zip(right) {
        (0..4).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::{Noise, Purpose};

    /// `X^T X` of X `(rows, n)`.
    fn gram(rows: usize, n: usize) -> Result<Tensor> {
        let mut z = vec![0f64; rows * n];
        Noise::new(1).stream("gram", Purpose::Init).fill_normal(0, &mut z);
        let xs = Tensor::from_vec(z, (rows, n), &Device::Cpu)?;
        Ok(xs.t()?.contiguous()?.matmul(&xs)?)
    }

    fn largest(xs: &Tensor) -> Result<f64> {
        Ok(xs.abs()?.max_all()?.to_scalar::<f64>()?)
    }

    #[test]
    fn vectors_are_orthonormal_and_give_the_matrix_back_at_any_rank() -> Result<()> {
        let diagonal = Tensor::from_slice(&[3.0, 0.0, 0.0, 1e-9], (2, 2), &Device::Cpu)?;
        let zero = Tensor::zeros((4, 4), candle_core::DType::F64, &Device::Cpu)?;
        let cases = [gram(1, 1)?, gram(3, 2)?, gram(60, 37)?, gram(1, 7)?, gram(5, 80)?, diagonal, zero];
        for matrix in cases {
            let n = matrix.dim(0)?;
            let Eigen { values, vectors } = Eigen::new("x", &matrix)?;
            let unit = vectors.matmul(&vectors.t()?)?;
            assert!(largest(&(unit - Tensor::eye(n, vectors.dtype(), &Device::Cpu)?)?)? < 1e-13, "{n}");
            let scaled = vectors.broadcast_mul(&Tensor::from_slice(&values, (n, 1), &Device::Cpu)?)?;
            let back = vectors.t()?.contiguous()?.matmul(&scaled)?;
            assert!(largest(&(back - &matrix)?)? <= 1e-13 * (1.0 + largest(&matrix)?), "{n}");
        }
        Ok(())
    }

    #[test]
    fn what_is_not_finite_is_refused() -> Result<()> {
        let matrix = Tensor::from_slice(&[1.0, f64::NAN, f64::NAN, 1.0], (2, 2), &Device::Cpu)?;
        assert!(Eigen::new("layer", &matrix).unwrap_err().to_string().contains("layer"));
        Ok(())
    }
}
