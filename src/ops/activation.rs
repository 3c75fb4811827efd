//! Activations.

use candle_core::{Result, Tensor};

use super::custom_vjp::custom_vjp;
use super::host::{dense, map, map2, map3, tensor, Host};
use super::path::{Implementation, OpPath};
use super::{reference, vmath};
#[cfg(feature = "cuda")]
use crate::kernels::{activation as kernel, supports_all};
use crate::util::dtype::wide;

/// The exact (erf) GELU, `x Phi(x)`.
///
/// Value and derivative share one exponential, and only `xs` is kept for backward. Forward and backward are 4
/// times as fast as `Tensor::gelu_erf` at 1024 x 3072.
///
/// # Errors
/// If candle fails.
pub fn gelu(xs: &Tensor, path: OpPath) -> Result<Tensor> {
    match path.on(&[xs]) {
        Implementation::Reference => reference::gelu(xs),
        Implementation::Slices => unary("gelu", xs, vmath::gelu, vmath::gelu_slope),
        how => {
            let y = gelu_of(how, &xs.detach(), None)?;
            custom_vjp("gelu", [xs], y, move |call| {
                Ok([Some(gelu_gradient(how, &call.args[0], None, &call.grad)?)])
            })
        }
    }
}

/// `x sigmoid(x)`.
///
/// # Errors
/// If candle fails.
pub fn silu(xs: &Tensor, path: OpPath) -> Result<Tensor> {
    match path.on(&[xs]) {
        Implementation::Reference => reference::silu(xs),
        Implementation::Slices => unary("silu", xs, |x| x * vmath::sigmoid(x), vmath::silu_slope),
        Implementation::Composed | Implementation::Kernels => {
            let dtype = wide(xs.dtype());
            let y = xs.detach().to_dtype(dtype)?.silu()?.to_dtype(xs.dtype())?;
            custom_vjp("silu", [xs], y, move |call| {
                Ok([Some((silu_slope(&call.args[0].to_dtype(dtype)?)? * call.grad.to_dtype(dtype)?)?)])
            })
        }
    }
}

/// `silu(gate) * up` (SwiGLU).
///
/// One node with one pass each in forward and backward; only its two arguments are kept.
///
/// # Errors
/// If the shapes differ.
pub fn silu_mul(gate: &Tensor, up: &Tensor, path: OpPath) -> Result<Tensor> {
    match path.on(&[gate, up]) {
        Implementation::Reference => reference::silu(gate)? * up,
        Implementation::Slices if gate.dims() == up.dims() => {
            let y = binary(gate, up, |g, u| g * vmath::sigmoid(g) * u)?;
            custom_vjp("silu-mul", [gate, up], y, |call| {
                let [gate, up] = &call.args;
                let dgate = call.needs[0].then(|| {
                    let (g, u) = (dense(gate)?, dense(up)?);
                    let slope = |g, u, d| vmath::silu_slope(g) * u * d;
                    let dgate = map3(&Host::of(&g)?, &Host::of(&u)?, &Host::of(&call.grad)?, slope);
                    tensor(dgate, gate.dims())
                });
                let dup = call.needs[1].then(|| binary(gate, &call.grad, |g, d| g * vmath::sigmoid(g) * d));
                Ok([dgate.transpose()?, dup.transpose()?])
            })
        }
        how => {
            let y = silu_mul_of(how, &gate.detach(), &up.detach())?;
            custom_vjp("silu-mul", [gate, up], y, move |call| {
                let [gate, up] = &call.args;
                let [dgate, dup] = silu_mul_gradients(how, gate, up, &call.grad)?;
                Ok([Some(dgate), Some(dup)])
            })
        }
    }
}

/// `gelu(gate) * up` with the tanh approximation of GELU, as in Gemma's feed-forward block.
///
/// One node with one pass each in forward and backward; only its two arguments are kept.
///
/// # Errors
/// If the shapes differ.
pub fn gelu_tanh_mul(gate: &Tensor, up: &Tensor, path: OpPath) -> Result<Tensor> {
    match path.on(&[gate, up]) {
        Implementation::Reference => reference::gelu_tanh(gate)? * up,
        Implementation::Slices if gate.dims() == up.dims() => {
            let (g, u) = (dense(gate)?, dense(up)?);
            let y = tensor(map2(&Host::of(&g)?, &Host::of(&u)?, |g, u| vmath::gelu_tanh(g).0 * u), g.dims())?;
            custom_vjp("gelu-tanh-mul", [gate, up], y, |call| {
                let [gate, up] = &call.args;
                let (g, u, d) = (dense(gate)?, dense(up)?, dense(&call.grad)?);
                let (g, u, d) = (Host::of(&g)?, Host::of(&u)?, Host::of(&d)?);
                let dgate = || tensor(map3(&g, &u, &d, |g, u, d| vmath::gelu_tanh(g).1 * u * d), gate.dims());
                let dup = || tensor(map2(&g, &d, |g, d| vmath::gelu_tanh(g).0 * d), up.dims());
                Ok([call.needs[0].then(dgate).transpose()?, call.needs[1].then(dup).transpose()?])
            })
        }
        _ => {
            let dtype = wide(gate.dtype());
            let y = (gelu_tanh_value(&gate.detach().to_dtype(dtype)?)? * up.detach().to_dtype(dtype)?)?;
            custom_vjp("gelu-tanh-mul", [gate, up], y.to_dtype(gate.dtype())?, move |call| {
                let [gate, up] = &call.args;
                let (g, d) = (gate.to_dtype(dtype)?, call.grad.to_dtype(dtype)?);
                let dgate = ((gelu_tanh_slope(&g)? * up.to_dtype(dtype)?)? * &d)?.to_dtype(gate.dtype())?;
                Ok([Some(dgate), Some((gelu_tanh_value(&g)? * d)?.to_dtype(up.dtype())?)])
            })
        }
    }
}

/// An elementwise function and its derivative as one node.
fn unary(
    name: &'static str,
    xs: &Tensor,
    f: impl Fn(f32) -> f32 + Sync,
    slope: impl Fn(f32) -> f32 + Send + Sync + 'static,
) -> Result<Tensor> {
    let x = dense(xs)?;
    let y = tensor(map(&Host::of(&x)?, f), x.dims())?;
    custom_vjp(name, [xs], y, move |call| Ok([Some(binary(&call.args[0], &call.grad, |x, d| slope(x) * d)?)]))
}

/// Applies `f` elementwise to two tensors of the same shape.
fn binary(a: &Tensor, b: &Tensor, f: impl Fn(f32, f32) -> f32 + Sync) -> Result<Tensor> {
    let (a, b) = (dense(a)?, dense(b)?);
    let y = map2(&Host::of(&a)?, &Host::of(&b)?, f);
    tensor(y, a.dims())
}

/// GELU of the detached `xs` `(.., dim)` plus an optional bias `(dim)`, which is added in the wide dtype.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub(super) fn gelu_of(how: Implementation, xs: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if how == Implementation::Kernels && supports_all([xs].into_iter().chain(bias)) {
        return kernel::gelu(xs, bias);
    }
    biased(xs, bias)?.gelu_erf()?.to_dtype(xs.dtype())
}

/// The gradient of [`gelu_of`], `(Phi(x) + x phi(x)) dY` with `x = xs + bias`; all tensors are detached.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub(super) fn gelu_gradient(
    how: Implementation,
    xs: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if how == Implementation::Kernels && supports_all([xs, grad].into_iter().chain(bias)) {
        return kernel::gelu_gradient(xs, bias, grad);
    }
    let x = biased(xs, bias)?;
    let cdf = (((&x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
    let pdf = ((x.sqr()? * -0.5)?.exp()?
        * (0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2))?;
    let slope = (cdf + (x * pdf)?)?;
    (slope * grad.to_dtype(wide(xs.dtype()))?)?.to_dtype(xs.dtype())
}

fn biased(xs: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let x = xs.to_dtype(wide(xs.dtype()))?;
    match bias {
        Some(bias) => x.broadcast_add(&bias.to_dtype(x.dtype())?),
        None => Ok(x),
    }
}

/// `silu(gate) * up` of detached tensors, computed in the wide dtype.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub(super) fn silu_mul_of(how: Implementation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if how == Implementation::Kernels && gate.dims() == up.dims() && supports_all([gate, up]) {
        return kernel::silu_mul(gate, up);
    }
    let dtype = wide(gate.dtype());
    (gate.to_dtype(dtype)?.silu()? * up.to_dtype(dtype)?)?.to_dtype(gate.dtype())
}

/// The gradients of `gate` and `up` in [`silu_mul_of`]; all tensors are detached.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub(super) fn silu_mul_gradients(
    how: Implementation,
    gate: &Tensor,
    up: &Tensor,
    grad: &Tensor,
) -> Result<[Tensor; 2]> {
    #[cfg(feature = "cuda")]
    if how == Implementation::Kernels && supports_all([gate, up, grad]) {
        return kernel::silu_mul_gradients(gate, up, grad);
    }
    let dtype = wide(gate.dtype());
    let (g, d) = (gate.to_dtype(dtype)?, grad.to_dtype(dtype)?);
    let dgate = ((silu_slope(&g)? * up.to_dtype(dtype)?)? * &d)?.to_dtype(gate.dtype())?;
    Ok([dgate, (g.silu()? * d)?.to_dtype(up.dtype())?])
}

/// The derivative of `x sigmoid(x)`: `s (1 + x (1 - s))`, in a wide dtype.
fn silu_slope(xs: &Tensor) -> Result<Tensor> {
    let s = (xs.neg()?.exp()? + 1.0)?.recip()?;
    let inner = ((xs * (1.0 - &s)?)? + 1.0)?;
    s * inner
}

/// The tanh GELU in a wide dtype.
fn gelu_tanh_value(x: &Tensor) -> Result<Tensor> {
    x * gelu_tanh_share(x)?
}

/// The factor `s` of the tanh GELU `x s`: `s = (1 + tanh u) / 2`, which is the logistic function of `2 u`.
fn gelu_tanh_share(x: &Tensor) -> Result<Tensor> {
    let twice = (x
        * (x.sqr()? * (2.0 * vmath::GELU_SLOPE * vmath::GELU_CUBE))?
            .affine(1.0, 2.0 * vmath::GELU_SLOPE)?)?;
    (twice.neg()?.exp()? + 1.0)?.recip()
}

/// The derivative of the tanh GELU, `s + x s (1 - s) u'`, where `s` is [`gelu_tanh_share`] and `u` the
/// argument of the logistic function.
fn gelu_tanh_slope(x: &Tensor) -> Result<Tensor> {
    let s = gelu_tanh_share(x)?;
    let inner =
        (x.sqr()? * (6.0 * vmath::GELU_SLOPE * vmath::GELU_CUBE))?.affine(1.0, 2.0 * vmath::GELU_SLOPE)?;
    let steep = ((x * &s)? * s.affine(-1.0, 1.0)?)?;
    s + (steep * inner)?
}
