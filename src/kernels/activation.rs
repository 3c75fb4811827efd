//! Activations and rotary positions on f32 and bf16 tensors of a CUDA device, computed in f32.

use candle_core::{DType, Result, Tensor, D};

use super::launch::{address, count, device_of, empty, launch, narrow, optional, some_rows, spread};

/// GELU of `xs` `(.., dim)` plus an optional bias `(dim)`.
///
/// # Errors
/// Unless the kernels support the tensors ([`super::supports_all`]).
pub(crate) fn gelu(xs: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (device, xs, bias) = (device_of(xs)?, xs.contiguous()?, bias.map(Tensor::contiguous).transpose()?);
    let (rows, dim) = rows_of(&xs)?;
    let (ys, narrow) = (empty(device, xs.shape(), xs.dtype())?, narrow(&xs));
    let (biased, bias) = optional(device, bias.as_ref(), xs.dtype())?;
    let (from, to) = (address(device, &xs, xs.dtype())?, address(device, &ys, xs.dtype())?);
    launch!(device; some_rows(rows); gelu_forward(&rows, &dim, &narrow, &biased, &from, &bias, &to));
    Ok(ys)
}

/// The gradient of `xs` in [`gelu`], from the gradient of its output.
///
/// # Errors
/// As [`gelu`].
pub(crate) fn gelu_gradient(xs: &Tensor, bias: Option<&Tensor>, grad: &Tensor) -> Result<Tensor> {
    let (device, dtype, grad) = (device_of(xs)?, xs.dtype(), grad.contiguous()?);
    let (xs, bias) = (xs.contiguous()?, bias.map(Tensor::contiguous).transpose()?);
    let (rows, dim) = rows_of(&xs)?;
    let (dxs, narrow) = (empty(device, xs.shape(), dtype)?, narrow(&xs));
    let (biased, bias) = optional(device, bias.as_ref(), dtype)?;
    let (from, grad, to) =
        (address(device, &xs, dtype)?, address(device, &grad, dtype)?, address(device, &dxs, dtype)?);
    launch!(device; some_rows(rows); gelu_backward(&rows, &dim, &narrow, &biased, &from, &bias, &grad, &to));
    Ok(dxs)
}

/// `silu(gate) * up` of tensors of one shape.
///
/// # Errors
/// As [`gelu`].
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (device, dtype) = (device_of(gate)?, gate.dtype());
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let ys = empty(device, gate.shape(), dtype)?;
    let (len, narrow) = (count(gate.elem_count())?, narrow(&gate));
    let (gate, up, to) =
        (address(device, &gate, dtype)?, address(device, &up, dtype)?, address(device, &ys, dtype)?);
    launch!(device; spread(len); silu_mul_forward(&len, &narrow, &gate, &up, &to));
    Ok(ys)
}

/// The gradients of `gate` and `up` in [`silu_mul`], from the gradient of its output.
///
/// # Errors
/// As [`gelu`].
pub(crate) fn silu_mul_gradients(gate: &Tensor, up: &Tensor, grad: &Tensor) -> Result<[Tensor; 2]> {
    let (device, dtype) = (device_of(gate)?, gate.dtype());
    let (gate, up, grad) = (gate.contiguous()?, up.contiguous()?, grad.contiguous()?);
    let gradients = [empty(device, gate.shape(), dtype)?, empty(device, gate.shape(), dtype)?];
    let (len, narrow) = (count(gate.elem_count())?, narrow(&gate));
    let (gate, up, grad) =
        (address(device, &gate, dtype)?, address(device, &up, dtype)?, address(device, &grad, dtype)?);
    let (dgate, dup) = (address(device, &gradients[0], dtype)?, address(device, &gradients[1], dtype)?);
    launch!(device; spread(len); silu_mul_backward(&len, &narrow, &gate, &up, &grad, &dgate, &dup));
    Ok(gradients)
}

/// Rotates the pairs of every head of `xs` `(b, t, heads, dim)`, forward (`sign` 1) or back (-1). The tables
/// are f32, `(b or 1, t, dim / 2)`.
///
/// # Errors
/// As [`gelu`], and if the tables are not f32.
pub(crate) fn rotary(xs: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Result<Tensor> {
    let (b, t, heads, dim) = xs.dims4()?;
    let (device, dtype) = (device_of(xs)?, xs.dtype());
    let (xs, cos, sin) = (xs.contiguous()?, cos.contiguous()?, sin.contiguous()?);
    let ys = empty(device, xs.shape(), dtype)?;
    let (positions, period) = (count(b * t)?, count(cos.dim(0)? * t)?);
    let (heads, half, narrow, sign) = (count(heads)?, count(dim / 2)?, narrow(&xs), sign as f32);
    let (from, to) = (address(device, &xs, dtype)?, address(device, &ys, dtype)?);
    let (cos, sin) = (address(device, &cos, DType::F32)?, address(device, &sin, DType::F32)?);
    launch!(device; some_rows(positions); rotary_turn(
        &positions, &period, &heads, &half, &narrow, &sign, &from, &cos, &sin, &to
    ));
    Ok(ys)
}

/// The number of rows and their length.
fn rows_of(xs: &Tensor) -> Result<(u32, u32)> {
    let dim = xs.dim(D::Minus1)?;
    Ok((count(xs.elem_count() / dim.max(1))?, count(dim)?))
}
