//! The linear layer over a quantised weight.

use candle_core::{bail, Result, Tensor, D};

use super::weight::QuantizedWeight;
use crate::ops::custom_vjp::custom_vjp;
use crate::ops::gemm::{gemm, Into, Mat};
use crate::ops::host::{dense, tensor, Host};
use crate::ops::linear::{product, rows, with_last};
use crate::ops::path::OpPath;
use crate::ops::reference;

/// `y = x W^T + b` of a quantised W, which gets no gradient; nor does b.
///
/// Forward and backward dequantise a block of rows at a time, never the whole weight, and multiply by it as by any
/// other: the output is that of the dequantised weight, and so is the gradient `dY W`.
///
/// # Shapes
/// - `xs`: `(.., in)`, of rank 2 or more
/// - `weight`: `(out, in)`
/// - `bias`: `(out)`
/// - output: `(.., out)`, the dtype of `xs`
///
/// # Errors
/// If the shapes do not fit.
pub fn quantized_linear(
    xs: &Tensor,
    weight: &QuantizedWeight,
    bias: Option<&Tensor>,
    path: OpPath,
) -> Result<Tensor> {
    check(xs, weight, bias)?;
    let path = path.on(&[xs]);
    if path == OpPath::Reference {
        let weight = weight.dequantize()?.to_dtype(xs.dtype())?;
        return reference::linear(xs, &weight, bias.map(Tensor::detach).as_ref());
    }
    let y = forward(path, &xs.detach(), weight)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&bias.detach().to_dtype(y.dtype())?)?,
        None => y,
    };
    let weight = weight.clone();
    custom_vjp("quantized-linear", [xs], y, move |call| {
        Ok([Some(input_gradient(path, &call.grad, &weight)?)])
    })
}

/// The shapes of a layer.
pub(super) fn check(xs: &Tensor, weight: &QuantizedWeight, bias: Option<&Tensor>) -> Result<()> {
    let (out_dim, in_dim) = weight.dims();
    if xs.rank() < 2 || xs.dim(D::Minus1)? != in_dim || bias.is_some_and(|bias| bias.dims() != [out_dim]) {
        let bias = bias.map(Tensor::dims);
        bail!(
            "quantised linear: xs {:?} or bias {bias:?} does not fit a weight (out, in) of {:?}",
            xs.dims(),
            weight.dims()
        );
    }
    Ok(())
}

/// `x W^T` of a detached x.
pub(super) fn forward(path: OpPath, xs: &Tensor, weight: &QuantizedWeight) -> Result<Tensor> {
    let (out_dim, in_dim) = weight.dims();
    let shape = with_last(xs, out_dim);
    if path == OpPath::Fused {
        let xs = dense(xs)?;
        let xs = Host::of(&xs)?;
        let n = xs.len() / in_dim.max(1);
        let mut y = vec![0f32; n * out_dim];
        for (first, count) in weight.blocks() {
            let block = weight.rows(first, count)?;
            let part = product(&xs, &Host::of(&block)?, None, n);
            for (y, part) in y.chunks_exact_mut(out_dim).zip(part.chunks_exact(count)) {
                y[first..first + count].copy_from_slice(part);
            }
        }
        return tensor(y, shape);
    }
    let x = rows(xs)?;
    let part = |(first, count)| x.matmul(&weight.rows(first, count)?.to_dtype(x.dtype())?.t()?);
    Tensor::cat(&weight.blocks().map(part).collect::<Result<Vec<_>>>()?, 1)?.reshape(shape)
}

/// `dX = dY W`.
pub(super) fn input_gradient(path: OpPath, grad: &Tensor, weight: &QuantizedWeight) -> Result<Tensor> {
    let (out_dim, in_dim) = weight.dims();
    let shape = with_last(grad, in_dim);
    if path == OpPath::Fused {
        let grad = Host::of(grad)?;
        let n = grad.len() / out_dim.max(1);
        let mut dx = vec![0f32; n * in_dim];
        for (first, count) in weight.blocks() {
            let block = weight.rows(first, count)?;
            let dy = Mat::strided(&grad[first..], n, count, out_dim);
            gemm(&mut dx, Into::Add, 1.0, dy, Mat::new(&Host::of(&block)?, count, in_dim));
        }
        return tensor(dx, shape);
    }
    let grad = rows(grad)?;
    let mut dx = grad.narrow(1, 0, 1)?.zeros_like()?.broadcast_as((grad.dim(0)?, in_dim))?.contiguous()?;
    for (first, count) in weight.blocks() {
        let block = weight.rows(first, count)?.to_dtype(grad.dtype())?;
        dx = (dx + grad.narrow(1, first, count)?.contiguous()?.matmul(&block)?)?;
    }
    dx.reshape(shape)
}
