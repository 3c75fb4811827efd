//! Rotary position embedding in Hugging Face's layout (rotated halves).

#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{bail, Result, Tensor, D};

use super::custom_vjp::custom_vjp;
use super::host::{dense, fill_rows, tensor, Host};
use super::path::{Implementation, OpPath};
use super::reference;
#[cfg(feature = "cuda")]
use crate::kernels::supports_all;
use crate::util::dtype::wide;
use crate::util::simd::vectorized;

/// Rotates each pair `(x_i, x_{i + n / 2})` of the first `n` elements of each head by the angle of its
/// position. The elements beyond `n` pass through (partial rotary positions, as in Phi).
///
/// One node with one pass in each direction; backward rotates by the opposite angle. Only the tables of
/// angles are kept. 11 times as fast as the reference.
///
/// # Shapes
/// - `xs`: `(b, t, heads, dim)`
/// - `cos`, `sin`: `(b or 1, t, n / 2)`, `n` at most `dim`; they get no gradient
/// - output: as `xs`
///
/// # Errors
/// If the shapes do not fit.
pub fn rotary(xs: &Tensor, cos: &Tensor, sin: &Tensor, path: OpPath) -> Result<Tensor> {
    let (b, t, _, dim) = xs.dims4()?;
    let fits = |table: &Tensor| matches!(*table.dims(), [tables, steps, half] if (tables == b || tables == 1) && steps == t && half > 0 && 2 * half <= dim);
    if !fits(cos) || !fits(sin) || cos.dims() != sin.dims() {
        bail!("rotary: cos {:?} and sin {:?} do not fit xs {:?}", cos.dims(), sin.dims(), xs.dims());
    }
    let how = path.on(&[xs, cos, sin]);
    let (cos, sin) = (cos.detach(), sin.detach());
    if how == Implementation::Reference {
        return reference::rotary(xs, &cos, &sin);
    }
    let rotate = move |xs: &Tensor, sign| rotate(how, xs, &cos, &sin, sign);
    let y = rotate(&xs.detach(), 1.0)?;
    custom_vjp("rotary", [xs], y, move |call| Ok([Some(rotate(&call.grad, -1.0)?)]))
}

/// The rotation of a detached tensor, forward (`sign` 1) or back (-1).
fn rotate(how: Implementation, xs: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Result<Tensor> {
    let (_, t, heads, dim) = xs.dims4()?;
    let half = cos.dim(2)?;
    if how == Implementation::Slices {
        let tables = cos.dim(0)?;
        let (x, cos, sin) = (dense(xs)?, dense(cos)?, dense(sin)?);
        let (x, cos, sin) = (Host::of(&x)?, Host::of(&cos)?, Host::of(&sin)?);
        let (x, cos, sin): (&[f32], &[f32], &[f32]) = (&x, &cos, &sin);
        let sign = sign as f32;
        let y = fill_rows(x.len(), dim, |first, out| {
            vectorized!({
                for (i, out) in out.chunks_exact_mut(dim).enumerate() {
                    let row = first + i; // of (b, t, heads)
                    let angle = (row / heads) % (t * tables) * half;
                    let (cos, sin) = (&cos[angle..angle + half], &sin[angle..angle + half]);
                    let (x1, x2) = x[row * dim..(row + 1) * dim].split_at(half);
                    let (y1, y2) = out.split_at_mut(half);
                    y2[half..].copy_from_slice(&x2[half..]);
                    for j in 0..half {
                        y1[j] = x1[j] * cos[j] - sign * x2[j] * sin[j];
                        y2[j] = x2[j] * cos[j] + sign * x1[j] * sin[j];
                    }
                }
            })
        });
        return tensor(y, xs.dims());
    }
    #[cfg(feature = "cuda")]
    if how == Implementation::Kernels
        && 2 * half == dim
        && supports_all([xs])
        && cos.dtype() == DType::F32
        && sin.dtype() == DType::F32
    {
        return crate::kernels::activation::rotary(xs, cos, sin, sign);
    }
    // The cosines would have only eight bits in bf16: the products are computed in f32.
    let dtype = wide(xs.dtype());
    let x = xs.to_dtype(dtype)?;
    let (x1, x2) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let (cos, sin) = (cos.to_dtype(dtype)?.unsqueeze(2)?, (sin.to_dtype(dtype)?.unsqueeze(2)? * sign)?);
    let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let y2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    let rest = x.narrow(D::Minus1, 2 * half, dim - 2 * half)?;
    Tensor::cat(&[y1, y2, rest], D::Minus1)?.to_dtype(xs.dtype())
}
