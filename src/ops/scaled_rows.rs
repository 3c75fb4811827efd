//! Adds scaled rows of a constant matrix to a matrix.

use candle_core::{bail, Result, Tensor, D};

use super::custom_vjp::custom_vjp;
use super::host::{dense, for_rows, tensor, Host};
use super::path::{Implementation, OpPath};
use super::vmath;
use crate::util::simd::vectorized;

/// `y_ij = x_ij + s_i m_ij` with a constant `m`.
///
/// One node with one pass in each direction: `dX = dY` (the same tensor), `ds_i = sum_j dY_ij m_ij`. In
/// elementary operations it would be four nodes with three temporaries.
///
/// # Shapes
/// - `xs`: `(rows, n)`, `scales`: `(rows)`, `matrix`: `(rows, n)`
/// - output: `(rows, n)`
///
/// # Errors
/// If the shapes do not fit.
pub fn add_scaled_rows(xs: &Tensor, scales: &Tensor, matrix: &Tensor, path: OpPath) -> Result<Tensor> {
    let (rows, width) = xs.dims2()?;
    if scales.dims() != [rows] || matrix.dims() != xs.dims() {
        bail!("scaled rows: xs {:?}, scales {:?}, matrix {:?}", xs.dims(), scales.dims(), matrix.dims());
    }
    let how = path.on(&[xs, scales, matrix]);
    if how == Implementation::Reference || matrix.track_op() {
        return xs + scales.unsqueeze(1)?.broadcast_mul(matrix)?;
    }
    let y = if how == Implementation::Slices {
        let (xs, scales, matrix) = (dense(xs)?, dense(scales)?, dense(matrix)?);
        let (mut y, s, m) = (Host::of(&xs)?.to_vec(), Host::of(&scales)?, Host::of(&matrix)?);
        let (s, m): (&[f32], &[f32]) = (&s, &m);
        for_rows(&mut y, width, |first, y| {
            vectorized!({
                let size = width.max(1);
                let rows = y.chunks_exact_mut(size).zip(m[first * width..].chunks_exact(size));
                for ((y, m), s) in rows.zip(&s[first..]) {
                    y.iter_mut().zip(m).for_each(|(y, m)| *y += s * m);
                }
            })
        });
        tensor(y, (rows, width))?
    } else {
        (xs.detach() + scales.detach().unsqueeze(1)?.broadcast_mul(matrix)?)?
    };
    let matrix = matrix.clone();
    custom_vjp("add-scaled-rows", [xs, scales], y, move |call| {
        let slopes = call.needs[1].then(|| {
            if how != Implementation::Slices {
                return (&call.grad * &matrix)?.sum(D::Minus1);
            }
            let matrix = dense(&matrix)?;
            let (g, m) = (Host::of(&call.grad)?, Host::of(&matrix)?);
            let mut slopes = vec![0f32; rows];
            let (g, m): (&[f32], &[f32]) = (&g, &m);
            for_rows(&mut slopes, 1, |first, slopes| {
                vectorized!({
                    for (i, slope) in slopes.iter_mut().enumerate() {
                        let row = (first + i) * width..(first + i + 1) * width;
                        *slope = vmath::sum2(&g[row.clone()], &m[row], |g, m| g * m);
                    }
                })
            });
            tensor(slopes, rows)
        });
        Ok([call.needs[0].then(|| call.grad.clone()), slopes.transpose()?])
    })
}
