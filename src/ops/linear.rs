//! The linear layer, frozen or trainable.

use candle_core::{bail, Result, Tensor, D};

use super::custom_vjp::custom_vjp;
use super::gemm::{gemm, Into, Mat};
use super::host::{column_sums, dense, tensor, Host};
use super::path::{Implementation, OpPath};
use super::reference;
use super::skinny_gemm::{add_product, FEW_ROWS};
#[cfg(feature = "cuda")]
use crate::kernels as kernel;
use crate::util::dtype::wide;

/// `y = x W^T + b`.
///
/// One node: the product starts from the bias, the weight is read in place, and backward computes one product
/// for each tracked tensor, which with a frozen weight is only `dY W`. Candle's own matmul also computes the
/// weight's gradient and then drops it, which makes forward plus backward take 2 times as long
/// (1024 rows, 768 to 768).
///
/// # Shapes
/// - `xs`: `(.., in)`, of rank 2 or more
/// - `weight`: `(out, in)`
/// - `bias`: `(out)`
/// - output: `(.., out)`, the dtype of `xs`
///
/// # Errors
/// If the shapes do not fit.
pub fn linear(xs: &Tensor, weight: &Tensor, bias: Option<&Tensor>, path: OpPath) -> Result<Tensor> {
    let how = match bias {
        Some(bias) => path.on(&[xs, weight, bias]),
        None => path.on(&[xs, weight]),
    };
    if how == Implementation::Reference {
        return reference::linear(xs, weight, bias);
    }
    check(xs, weight, bias)?;
    let y = affine(how, &xs.detach(), &weight.detach(), bias.map(Tensor::detach).as_ref())?;
    let bias = bias.filter(|bias| bias.track_op());
    if !weight.track_op() && bias.is_none() {
        let weight = weight.detach();
        return custom_vjp("linear", [xs], y, move |call| {
            Ok([Some(input_gradient(how, &call.grad, &weight)?)])
        });
    }
    let gradients = move |xs: &Tensor, weight: &Tensor, grad: &Tensor, needs: [bool; 2]| -> Result<_> {
        let dx = needs[0].then(|| input_gradient(how, grad, weight)).transpose()?;
        let dw = needs[1].then(|| weight_gradient(how, grad, xs)).transpose()?;
        Ok((dx, dw))
    };
    match bias {
        None => custom_vjp("linear", [xs, weight], y, move |call| {
            let (dx, dw) = gradients(&call.args[0], &call.args[1], &call.grad, call.needs)?;
            Ok([dx, dw])
        }),
        Some(bias) => custom_vjp("linear", [xs, weight, bias], y, move |call| {
            let needs = [call.needs[0], call.needs[1]];
            let (dx, dw) = gradients(&call.args[0], &call.args[1], &call.grad, needs)?;
            Ok([dx, dw, Some(bias_gradient(how, &call.grad)?)])
        }),
    }
}

/// Checks the shapes of a linear layer.
pub(super) fn check(xs: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let (out_dim, in_dim) = weight.dims2()?;
    if xs.rank() < 2 || xs.dim(D::Minus1)? != in_dim {
        bail!("linear: xs {:?} does not fit a weight (out, in) of {:?}", xs.dims(), weight.dims());
    }
    match bias {
        Some(bias) if bias.dims() != [out_dim] => {
            bail!("linear: bias {:?} does not fit a weight (out, in) of {:?}", bias.dims(), weight.dims())
        }
        _ => Ok(()),
    }
}

/// `(.., in)` as `(n, in)`.
pub(super) fn rows(xs: &Tensor) -> Result<Tensor> {
    let width = xs.dim(D::Minus1)?;
    xs.reshape((xs.elem_count() / width.max(1), width))
}

/// The shape of `xs` with another last dimension.
pub(super) fn with_last(xs: &Tensor, last: usize) -> Vec<usize> {
    let mut shape = xs.dims().to_vec();
    shape.pop();
    shape.push(last);
    shape
}

/// `x W^T + b` of detached tensors.
pub(super) fn forward(
    how: Implementation,
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (out_dim, in_dim) = weight.dims2()?;
    let shape = with_last(xs, out_dim);
    if how == Implementation::Slices {
        let (xs, weight) = (dense(xs)?, dense(weight)?);
        let bias = bias.map(dense).transpose()?;
        let n = xs.elem_count() / in_dim.max(1);
        let y = product(
            &Host::of(&xs)?,
            &Host::of(&weight)?,
            bias.as_ref().map(Host::of).transpose()?.as_deref(),
            n,
        );
        return tensor(y, shape);
    }
    let y = rows(xs)?.matmul(&weight.to_dtype(xs.dtype())?.t()?)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(xs.dtype())?)?.reshape(shape),
        None => y.reshape(shape),
    }
}

/// [`forward`] that may use custom kernels, whose product starts from the bias as on the CPU: the
/// sum is rounded once.
pub(super) fn affine(
    how: Implementation,
    xs: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(bias) =
        bias.filter(|bias| how == Implementation::Kernels && kernel::supports_all([xs, weight, bias]))
    {
        use kernel::gemm::Mat;
        let (x, weight) = (rows(xs)?, weight.contiguous()?);
        let y = kernel::linear::bias_rows(bias, &with_last(xs, weight.dim(0)?).into())?;
        kernel::gemm::add_product(&y, 1.0, &Mat::new(&x)?, &Mat::new(&weight)?.t())?;
        return Ok(y);
    }
    forward(how, xs, weight, bias)
}

/// `x W^T + b` of `n` rows.
pub(super) fn product(xs: &[f32], weight: &[f32], bias: Option<&[f32]>, n: usize) -> Vec<f32> {
    let in_dim = xs.len() / n.max(1);
    let out_dim = match bias {
        Some(bias) => bias.len(),
        None => weight.len() / in_dim.max(1),
    };
    if n <= FEW_ROWS {
        let mut y = bias.map_or_else(|| vec![0f32; n * out_dim], |bias| bias.repeat(n));
        add_product(&mut y, xs, weight, n);
        return y;
    }
    let (x, w) = (Mat::new(xs, n, in_dim), Mat::new(weight, out_dim, in_dim).t());
    match bias {
        Some(bias) => {
            let mut y = bias.repeat(n);
            gemm(&mut y, Into::Add, 1.0, x, w);
            y
        }
        None => {
            let mut y = vec![0f32; n * out_dim];
            gemm(&mut y, Into::Set, 1.0, x, w);
            y
        }
    }
}

/// `dX = dY W`.
pub(super) fn input_gradient(how: Implementation, grad: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (out_dim, in_dim) = weight.dims2()?;
    let shape = with_last(grad, in_dim);
    if how == Implementation::Slices {
        let weight = dense(weight)?;
        let n = grad.elem_count() / out_dim.max(1);
        return tensor(input_product(&Host::of(grad)?, &Host::of(&weight)?, n, out_dim), shape);
    }
    rows(grad)?.matmul(&weight.to_dtype(grad.dtype())?)?.reshape(shape)
}

/// `dX = dY W + dZ V`, for two products that share one input.
pub(super) fn shared_input_gradient(
    how: Implementation,
    [(dy, w), (dz, v)]: [(&Tensor, &Tensor); 2],
) -> Result<Tensor> {
    let dx = input_gradient(how, dy, w)?;
    #[cfg(feature = "cuda")]
    if how == Implementation::Kernels && kernel::supports_all([&dx, dz, v]) {
        use kernel::gemm::Mat;
        let (dz, v) = (rows(dz)?, v.contiguous()?);
        kernel::gemm::add_product(&dx, 1.0, &Mat::new(&dz)?, &Mat::new(&v)?)?;
        return Ok(dx);
    }
    dx + input_gradient(how, dz, v)?
}

/// `dY W` of `n` rows.
pub(super) fn input_product(grad: &[f32], weight: &[f32], n: usize, out_dim: usize) -> Vec<f32> {
    let in_dim = weight.len() / out_dim.max(1);
    let mut dx = vec![0f32; n * in_dim];
    gemm(&mut dx, Into::Set, 1.0, Mat::new(grad, n, out_dim), Mat::new(weight, out_dim, in_dim));
    dx
}

/// `dW = dY^T X`.
pub(super) fn weight_gradient(how: Implementation, grad: &Tensor, xs: &Tensor) -> Result<Tensor> {
    let (out_dim, in_dim) = (grad.dim(D::Minus1)?, xs.dim(D::Minus1)?);
    if how == Implementation::Slices {
        let xs = dense(xs)?;
        let n = xs.elem_count() / in_dim.max(1);
        let mut dw = vec![0f32; out_dim * in_dim];
        let (grad, xs) = (Host::of(grad)?, Host::of(&xs)?);
        gemm(&mut dw, Into::Set, 1.0, Mat::new(&grad, n, out_dim).t(), Mat::new(&xs, n, in_dim));
        return tensor(dw, (out_dim, in_dim));
    }
    rows(grad)?.t()?.matmul(&rows(xs)?)
}

/// The sum of `dY` over all rows.
fn bias_gradient(how: Implementation, grad: &Tensor) -> Result<Tensor> {
    if how == Implementation::Slices {
        let width = grad.dim(D::Minus1)?;
        return tensor(column_sums(&Host::of(grad)?, width), width);
    }
    rows(grad)?.to_dtype(wide(grad.dtype()))?.sum(0)
}
