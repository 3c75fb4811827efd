//! Norms and dropout on f32 and bf16 tensors of a CUDA device.

use candle_core::cuda_backend::CudaDevice;
use candle_core::{Result, Tensor};

use super::launch::{address, count, device_of, empty, grid, launch, narrow, one_each, optional};

/// A norm over the rows of `xs`, or of `xs + residual`; an RMS norm if it is not centred.
pub(crate) struct Norm<'a> {
    /// `(.., dim)`.
    pub xs: &'a Tensor,
    /// Of the shape of `xs`.
    pub residual: Option<&'a Tensor>,
    /// `(dim)`.
    pub weight: &'a Tensor,
    pub eps: f64,
    pub centred: bool,
}

impl Norm<'_> {
    /// The norm with an optional bias `(dim)`, of the shape of `xs`.
    ///
    /// # Errors
    /// If the tensors are not supported ([`supports_all`](super::supports_all)).
    pub fn forward(&self, bias: Option<&Tensor>) -> Result<Tensor> {
        let bias = bias.map(Tensor::contiguous).transpose()?;
        self.launch(|call| {
            let Call { device, rows, dim, narrow, centred, eps, added, xs, residual, weight, ys } = call;
            let (biased, bias) = optional(device, bias.as_ref(), self.xs.dtype())?;
            launch!(device; grid(*rows); norm_forward(
                dim, narrow, centred, eps, added, &biased, xs, residual, weight, &bias, ys
            ));
            Ok(())
        })
    }

    /// The gradient of `xs`, which is also that of the residual, from the gradient of the output.
    ///
    /// # Errors
    /// If the tensors are not supported ([`supports_all`](super::supports_all)).
    pub fn backward(&self, grad: &Tensor) -> Result<Tensor> {
        let grad = grad.contiguous()?;
        self.launch(|call| {
            let Call { device, rows, dim, narrow, centred, eps, added, xs, residual, weight, ys } = call;
            let grad = address(device, &grad, self.xs.dtype())?;
            launch!(device; grid(*rows); norm_backward(
                dim, narrow, centred, eps, added, xs, residual, weight, &grad, ys
            ));
            Ok(())
        })
    }

    /// A tensor with the shape and dtype of `xs`, filled by `launch`.
    fn launch(&self, launch: impl FnOnce(&Call) -> Result<()>) -> Result<Tensor> {
        let device = device_of(self.xs)?;
        let (xs, weight) = (self.xs.contiguous()?, self.weight.contiguous()?);
        let residual = self.residual.map(Tensor::contiguous).transpose()?;
        let dim = weight.elem_count();
        let ys = empty(device, xs.shape(), xs.dtype())?;
        let (added, residual) = optional(device, residual.as_ref(), xs.dtype())?;
        launch(&Call {
            device,
            rows: count(xs.elem_count() / dim)?,
            dim: count(dim)?,
            narrow: narrow(&xs),
            centred: self.centred.into(),
            eps: self.eps as f32,
            added,
            xs: address(device, &xs, xs.dtype())?,
            residual,
            weight: address(device, &weight, xs.dtype())?,
            ys: address(device, &ys, xs.dtype())?,
        })?;
        Ok(ys)
    }
}

/// The arguments of the kernels that both directions share.
struct Call<'a> {
    device: &'a CudaDevice,
    rows: u32,
    dim: u32,
    narrow: u32,
    centred: u32,
    eps: f32,
    added: u32,
    xs: u64,
    residual: u64,
    weight: u64,
    ys: u64,
}

/// Zeroes the elements whose word of noise is below `threshold`, and multiplies the others by `scale`.
///
/// # Errors
/// If `xs` is not supported ([`supports_all`](super::supports_all)).
pub(crate) fn dropout(xs: &Tensor, threshold: u32, scale: f64, key: u64, draw: u64) -> Result<Tensor> {
    let (device, xs) = (device_of(xs)?, xs.contiguous()?);
    let ys = empty(device, xs.shape(), xs.dtype())?;
    let (len, narrow, scale) = (count(xs.elem_count())?, narrow(&xs), scale as f32);
    let (from, to) = (address(device, &xs, xs.dtype())?, address(device, &ys, xs.dtype())?);
    launch!(device; one_each(len.div_ceil(4)); dropout_apply(
        &len, &narrow, &threshold, &key, &draw, &scale, &from, &to
    ));
    Ok(ys)
}
