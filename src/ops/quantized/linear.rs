//! The linear layer with a quantised weight.

use candle_core::{bail, Result, Tensor, D};

use super::quantized_weight::QuantizedWeight;
use crate::ops::custom_vjp::custom_vjp;
use crate::ops::gemm::{gemm, Into, Mat};
use crate::ops::host::{dense, tensor, Host};
use crate::ops::linear::{product as dense_product, rows, with_last};
use crate::ops::path::{Implementation, OpPath};
use crate::ops::reference;
use crate::util::dtype::wide;

/// The largest number of rows that go through candle's kernels: up to it they are at least as fast as blocks,
/// whatever the kind. At 2048 to 8192 on two cores, 8 rows take 0.5 ms with Q4K and 8 ms with Q4_0, which has
/// the slowest kernel, instead of 10 ms.
const FEW_ROWS: usize = 8;

/// `y = x W^T + b` with a quantised W. Neither W nor b gets a gradient.
///
/// Forward and backward dequantise one block of rows at a time, never the whole weight, and multiply by it.
/// Output and gradient, `dY W`, are those of the dequantised weight. At 256 rows and 2048 to 8192,
/// dequantising costs a tenth of the product itself.
///
/// On the CPU, up to 8 rows of an untracked x, as in text generation, go through candle's kernels if the
/// weight is of one of GGUF's kinds: 20 times as fast for one row. These kernels round x to 8 bits, which is
/// about 0.7 % of an output's size (0.5 % for Q4_0), and keep a copy of the weight in their own order from
/// the first such call on.
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
    linear(xs, weight, bias, path, true)
}

/// [`quantized_linear`] in blocks for any number of rows, never by candle's kernels, which round x: the
/// result of a training step must not depend on whether x is tracked.
///
/// # Errors
/// As [`quantized_linear`].
pub(super) fn quantized_linear_by_blocks(
    xs: &Tensor,
    weight: &QuantizedWeight,
    bias: Option<&Tensor>,
    path: OpPath,
) -> Result<Tensor> {
    linear(xs, weight, bias, path, false)
}

fn linear(
    xs: &Tensor,
    weight: &QuantizedWeight,
    bias: Option<&Tensor>,
    path: OpPath,
    few_are_rounded: bool,
) -> Result<Tensor> {
    let (out_dim, in_dim) = weight.dims();
    check(xs, weight, bias)?;
    let bias = bias.map(Tensor::detach);
    let how = path.on(&[xs]);
    if how == Implementation::Reference {
        return reference::linear(xs, &weight.dequantize()?.to_dtype(xs.dtype())?, bias.as_ref());
    }
    if few_are_rounded && !xs.track_op() && xs.elem_count() <= FEW_ROWS * in_dim {
        if let Some(y) = weight.product_of_few(&rows(xs)?)? {
            let y = match bias {
                Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?)?,
                None => y,
            };
            return y.reshape(with_last(xs, out_dim));
        }
    }
    let y = forward(how, &xs.detach(), weight, bias.as_ref())?;
    let weight = weight.clone();
    custom_vjp("quantized-linear", [xs], y, move |call| Ok([Some(input_gradient(how, &call.grad, &weight)?)]))
}

/// Checks the shapes of a layer.
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

/// `x W^T + b` of detached tensors, in blocks.
pub(super) fn forward(
    how: Implementation,
    xs: &Tensor,
    weight: &QuantizedWeight,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let shape = with_last(xs, weight.dims().0);
    if how == Implementation::Slices {
        let (xs, bias) = (dense(xs)?, bias.map(|bias| dense(&bias.to_dtype(xs.dtype())?)).transpose()?);
        let bias = bias.as_ref().map(Host::of).transpose()?;
        return tensor(product(&Host::of(&xs)?, weight, bias.as_deref())?, shape);
    }
    let x = rows(xs)?;
    let part = |(first, count)| x.matmul(&weight.rows(first, count)?.to_dtype(x.dtype())?.t()?);
    let y = Tensor::cat(&weight.blocks().map(part).collect::<Result<Vec<_>>>()?, 1)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(x.dtype())?)?.reshape(shape),
        None => y.reshape(shape),
    }
}

/// `x W^T + b` on the CPU.
pub(super) fn product(xs: &[f32], weight: &QuantizedWeight, bias: Option<&[f32]>) -> Result<Vec<f32>> {
    let (out_dim, in_dim) = weight.dims();
    let n = xs.len() / in_dim.max(1);
    let (mut y, mut block) = (vec![0f32; n * out_dim], Vec::new());
    for (first, count) in weight.blocks() {
        block.resize(count * in_dim, 0.0);
        weight.fill(first, &mut block)?;
        let part = dense_product(xs, &block, bias.map(|bias| &bias[first..first + count]), n);
        for (y, part) in y.chunks_exact_mut(out_dim).zip(part.chunks_exact(count)) {
            y[first..first + count].copy_from_slice(part);
        }
    }
    Ok(y)
}

/// `dX = dY W`, in blocks.
pub(super) fn input_gradient(how: Implementation, grad: &Tensor, weight: &QuantizedWeight) -> Result<Tensor> {
    let (out_dim, in_dim) = weight.dims();
    let shape = with_last(grad, in_dim);
    if how == Implementation::Slices {
        let grad = Host::of(grad)?;
        let n = grad.len() / out_dim.max(1);
        let (mut dx, mut block) = (vec![0f32; n * in_dim], Vec::new());
        for (first, count) in weight.blocks() {
            block.resize(count * in_dim, 0.0);
            weight.fill(first, &mut block)?;
            let dy = Mat::strided(grad.get(first..).unwrap_or(&[]), n, count, out_dim);
            gemm(&mut dx, Into::Add, 1.0, dy, Mat::new(&block, count, in_dim));
        }
        return tensor(dx, shape);
    }
    let grad = rows(grad)?;
    // A sum over many blocks, which half precision would round each time.
    let dtype = wide(grad.dtype());
    let mut dx = Tensor::zeros((grad.dim(0)?, in_dim), dtype, grad.device())?;
    for (first, count) in weight.blocks() {
        let block = weight.rows(first, count)?.to_dtype(grad.dtype())?;
        dx = (dx + grad.narrow(1, first, count)?.contiguous()?.matmul(&block)?.to_dtype(dtype)?)?;
    }
    dx.to_dtype(grad.dtype())?.reshape(shape)
}
