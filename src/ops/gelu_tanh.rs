//! The gate of Gemma's feed-forward block.

use candle_core::{Result, Tensor};

use super::custom_vjp::custom_vjp;
use super::host::{dense, map2, map3, tensor, Host};
use super::path::OpPath;
use super::{reference, vmath};
use crate::util::dtype::wide;

/// `gelu(gate) * up` with the tanh approximation of GELU: one node, one pass each way, nothing kept but its two
/// arguments.
///
/// # Errors
/// If the shapes differ.
pub fn gelu_tanh_mul(gate: &Tensor, up: &Tensor, path: OpPath) -> Result<Tensor> {
    match path.on(&[gate, up]) {
        OpPath::Reference => reference::gelu_tanh(gate)? * up,
        OpPath::Fused if gate.dims() == up.dims() => {
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
            let y = (value(&gate.detach().to_dtype(dtype)?)? * up.detach().to_dtype(dtype)?)?;
            custom_vjp("gelu-tanh-mul", [gate, up], y.to_dtype(gate.dtype())?, move |call| {
                let [gate, up] = &call.args;
                let (g, d) = (gate.to_dtype(dtype)?, call.grad.to_dtype(dtype)?);
                let dgate = ((slope(&g)? * up.to_dtype(dtype)?)? * &d)?.to_dtype(gate.dtype())?;
                Ok([Some(dgate), Some((value(&g)? * d)?.to_dtype(up.dtype())?)])
            })
        }
    }
}

/// The tanh GELU in a wide dtype.
fn value(x: &Tensor) -> Result<Tensor> {
    x * share(x)?
}

/// What it lets through of x: the logistic function of twice the tangent's argument.
fn share(x: &Tensor) -> Result<Tensor> {
    let twice = (x
        * (x.sqr()? * (2.0 * vmath::GELU_SLOPE * vmath::GELU_CUBE))?
            .affine(1.0, 2.0 * vmath::GELU_SLOPE)?)?;
    (twice.neg()?.exp()? + 1.0)?.recip()
}

/// Its derivative, `s + x s (1 - s) u'` with s the share and u the argument of the logistic function.
fn slope(x: &Tensor) -> Result<Tensor> {
    let s = share(x)?;
    let inner =
        (x.sqr()? * (6.0 * vmath::GELU_SLOPE * vmath::GELU_CUBE))?.affine(1.0, 2.0 * vmath::GELU_SLOPE)?;
    let steep = ((x * &s)? * s.affine(-1.0, 1.0)?)?;
    s + (steep * inner)?
}
