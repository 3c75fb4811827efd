//! The feed-forward block of a decoder with frozen weights.

use candle_core::{bail, Result, Tensor};

use super::activation::{silu_mul, silu_mul_gradients};
use super::custom_vjp::{custom_vjp, Saved};
use super::gemm::{gemm, Into, Mat};
use super::host::{dense, for_rows, tensor, Host};
use super::linear::{check, forward, input_gradient, input_product, linear, shared_input_gradient};
use super::path::{Implementation, OpPath};
use super::vmath;
use crate::util::simd::vectorized;

/// `(silu(x Wg^T) * x Wu^T) Wd^T` (Shazeer 2020).
///
/// With frozen weights, this is one node that keeps only the two projections and frees them in backward. The
/// product of the two is recomputed in one cheap pass, and the second part of `dX` is added to the first in
/// place. With a trainable weight, the composition is used.
///
/// # Shapes
/// - `xs`: `(.., dim)`, of rank 2 or more
/// - `gate`, `up`: `(hidden, dim)`, `down`: `(out, hidden)`
/// - output: `(.., out)`
///
/// # Errors
/// If the shapes do not fit.
pub fn swiglu(xs: &Tensor, gate: &Tensor, up: &Tensor, down: &Tensor, path: OpPath) -> Result<Tensor> {
    let how = path.on(&[xs, gate, up, down]);
    if how == Implementation::Reference || [gate, up, down].iter().any(|weight| weight.track_op()) {
        let (gate, up) = (linear(xs, gate, None, path)?, linear(xs, up, None, path)?);
        return linear(&silu_mul(&gate, &up, path)?, down, None, path);
    }
    check(xs, gate, None)?;
    if up.dims() != gate.dims() || down.dims2()?.1 != gate.dim(0)? {
        bail!("swiglu: gate {:?}, up {:?}, down {:?} do not fit", gate.dims(), up.dims(), down.dims());
    }
    let (g, u) = projections(how, &xs.detach(), gate, up)?;
    let y = forward(how, &silu_mul(&g, &u, path)?, down, None)?;
    let saved = Saved::new((g, u));
    let (gate, up, down) = (gate.clone(), up.clone(), down.clone());
    custom_vjp("swiglu", [xs], y, move |call| {
        let (g, u) = match saved.take() {
            Some(saved) => saved,
            None => projections(how, &call.args[0], &gate, &up)?,
        };
        if how != Implementation::Slices {
            let d = input_gradient(how, &call.grad, &down)?;
            let [dg, du] = silu_mul_gradients(how, &g, &u, &d)?;
            return Ok([Some(shared_input_gradient(how, [(&dg, &gate), (&du, &up)])?)]);
        }
        let (gate, up, down) = (dense(&gate)?, dense(&up)?, dense(&down)?);
        let ((hidden, dim), out_dim) = (gate.dims2()?, down.dim(0)?);
        let n = g.elem_count() / hidden.max(1);
        let mut du = input_product(&Host::of(&call.grad)?, &Host::of(&down)?, n, out_dim);
        let mut dg = Host::of(&g)?.to_vec();
        // The gradient of the product becomes those of its factors, in place.
        let u = Host::of(&u)?;
        let u: &[f32] = &u;
        for_rows(&mut dg, 1, |first, dg| {
            vectorized!(for ((g, d), u) in dg.iter_mut().zip(&du[first..]).zip(&u[first..]) {
                *g = d * u * vmath::silu_slope(*g);
            })
        });
        let g = Host::of(&g)?;
        let g: &[f32] = &g;
        for_rows(&mut du, 1, |first, du| {
            vectorized!(for (d, g) in du.iter_mut().zip(&g[first..]) {
                *d *= g * vmath::sigmoid(*g);
            })
        });
        let mut dx = input_product(&dg, &Host::of(&gate)?, n, hidden);
        let up = Host::of(&up)?;
        gemm(&mut dx, Into::Add, 1.0, Mat::new(&du, n, hidden), Mat::new(&up, hidden, dim));
        Ok([Some(tensor(dx, call.args[0].dims())?)])
    })
}

fn projections(how: Implementation, xs: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
    Ok((forward(how, xs, gate, None)?, forward(how, xs, up, None)?))
}
