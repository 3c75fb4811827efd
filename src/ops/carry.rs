//! Differentiable copies of tensors between devices.

use candle_core::{Device, Result, Tensor};

use super::custom_vjp::custom_vjp;

/// `xs` on `device`, differentiable; `xs` itself if it is already there.
///
/// # Errors
/// If a device fails, or candle cannot copy between the two.
pub fn carry(xs: &Tensor, device: &Device) -> Result<Tensor> {
    if xs.device().same_device(device) {
        return Ok(xs.clone());
    }
    if xs.device().is_cpu() || device.is_cpu() {
        return xs.to_device(device); // copies to and from the host are synchronous
    }
    let home = xs.device().clone();
    carried(xs, |xs| copied(xs, device), move |grad| copied(grad, &home))
}

/// Moves the detached `xs` with `there`; in backward, `back` moves the gradient back.
///
/// # Errors
/// If `there` fails. The backward pass fails if `back` does.
pub(crate) fn carried(
    xs: &Tensor,
    there: impl FnOnce(&Tensor) -> Result<Tensor>,
    back: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    custom_vjp("carry", [xs], there(&xs.detach())?, move |call| Ok([Some(back(&call.grad)?)]))
}

/// A copy of a tensor on another device, complete when this returns.
///
/// Each device orders only its own work. A copy between GPUs waits for pending writes to its source, but a
/// copy between two streams of one GPU does not: the source is synchronised first. Waiting for the copy also
/// keeps the source's memory from being reused before it has been read.
///
/// # Errors
/// As [`carry`].
pub(crate) fn copied(xs: &Tensor, device: &Device) -> Result<Tensor> {
    let own = xs.force_contiguous()?; // a view would transfer, and keep, its whole storage
    if own.device().location() == device.location() {
        own.device().synchronize()?;
    }
    let there = own.to_device(device)?;
    device.synchronize()?;
    drop(own);
    Ok(there)
}

/// Adds `term` to the `total` so far, on the device of the total; without a total, returns `term`.
///
/// # Errors
/// As [`carry`].
pub(crate) fn joined(total: Option<Tensor>, term: Tensor) -> Result<Tensor> {
    match total {
        Some(total) => &total + carry(&term, total.device())?,
        None => Ok(term),
    }
}

/// Stacks tensors of one shape along a new first dimension, on the device of the first tensor.
///
/// # Errors
/// As [`carry`], and if there is no tensor or the shapes differ.
pub(crate) fn stacked(tensors: &[Tensor]) -> Result<Tensor> {
    let Some(first) = tensors.first() else { candle_core::bail!("there is no tensor to stack") };
    let here = tensors.iter().map(|tensor| carry(tensor, first.device())).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&here, 0)
}
