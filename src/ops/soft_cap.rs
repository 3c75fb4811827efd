//! The soft cap on logits.

use candle_core::{bail, Result, Tensor};

use super::custom_vjp::custom_vjp;
use super::host::{dense, map, map2, tensor, Host};
use super::path::{Implementation, OpPath};
use super::{reference, vmath};
use crate::util::dtype::wide;

/// `cap tanh(x / cap)`: about x near 0, and never beyond the cap (Gemma 2, Riviere et al. 2024).
///
/// One node that keeps only one tensor; the derivative is `1 - (y / cap)^2`.
///
/// # Errors
/// If the cap is not positive and finite.
pub fn soft_cap(xs: &Tensor, cap: f64, path: OpPath) -> Result<Tensor> {
    check(cap)?;
    let how = path.on(&[xs]);
    if how == Implementation::Reference {
        return reference::soft_cap(xs, cap);
    }
    if how == Implementation::Slices {
        let (x, c) = (dense(xs)?, cap as f32);
        let y = tensor(map(&Host::of(&x)?, |x| c * vmath::tanh(x / c)), x.dims())?;
        return custom_vjp("soft cap", [xs], y, move |call| {
            let (y, grad) = (dense(&call.result)?, dense(&call.grad)?);
            let dx = map2(&Host::of(&y)?, &Host::of(&grad)?, |y, d| d * (1.0 - (y / c) * (y / c)));
            Ok([Some(tensor(dx, y.dims())?)])
        });
    }
    let dtype = wide(xs.dtype());
    let y = ((xs.detach().to_dtype(dtype)? / cap)?.tanh()? * cap)?.to_dtype(xs.dtype())?;
    custom_vjp("soft cap", [xs], y, move |call| {
        // Not from the result, which is rounded in half-precision dtypes.
        let slope = (call.args[0].to_dtype(dtype)? / cap)?.tanh()?.sqr()?.affine(-1.0, 1.0)?;
        Ok([Some((slope * call.grad.to_dtype(dtype)?)?.to_dtype(call.grad.dtype())?)])
    })
}

/// Fails unless the cap is positive and finite.
pub(super) fn check(cap: f64) -> Result<()> {
    if cap > 0.0 && cap.is_finite() {
        return Ok(());
    }
    bail!("soft cap: expected a positive number, got {cap}")
}
