//! Tensors that go from one device to another, and their gradients back.

use candle_core::{Device, Result, Tensor};

use super::custom_vjp::custom_vjp;

/// `xs` on `device`, differentiable; itself where it is there already.
///
/// # Errors
/// If a device fails, or candle knows no way between the two.
pub fn carry(xs: &Tensor, device: &Device) -> Result<Tensor> {
    if xs.device().same_device(device) {
        return Ok(xs.clone());
    }
    if xs.device().is_cpu() || device.is_cpu() {
        return xs.to_device(device); // what the host reads or writes is there when it goes on
    }
    let home = xs.device().clone();
    carried(xs, |xs| copied(xs, device), move |grad| copied(grad, &home))
}

/// What `there` makes of `xs` at another place, whose gradient `back` brings home.
///
/// # Errors
/// As both.
pub(crate) fn carried(
    xs: &Tensor,
    there: impl FnOnce(&Tensor) -> Result<Tensor>,
    back: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    custom_vjp("carry", [xs], there(&xs.detach())?, move |call| Ok([Some(back(&call.grad)?)]))
}

/// A copy of a tensor on another device, complete when this returns. Each device orders its own work alone: between GPUs
/// the copy waits for what writes its source, between two streams of one it does not, and nothing else keeps the source's
/// memory from its next use before it is read.
///
/// # Errors
/// As [`carry`].
pub(crate) fn copied(xs: &Tensor, device: &Device) -> Result<Tensor> {
    let own = xs.force_contiguous()?; // of a view, all of the memory would go, and stay
    if own.device().location() == device.location() {
        own.device().synchronize()?;
    }
    let there = own.to_device(device)?;
    device.synchronize()?;
    drop(own);
    Ok(there)
}

/// The sum of a term and of what was added up before it, where there is something: on the device of the first.
///
/// # Errors
/// As [`carry`].
pub(crate) fn joined(total: Option<Tensor>, term: Tensor) -> Result<Tensor> {
    match total {
        Some(total) => &total + carry(&term, total.device())?,
        None => Ok(term),
    }
}

/// Tensors of one shape in a row of rows, on the device of the first.
///
/// # Errors
/// As [`carry`]; if there is none, or shapes differ.
pub(crate) fn stacked(tensors: &[Tensor]) -> Result<Tensor> {
    let Some(first) = tensors.first() else { candle_core::bail!("there is no tensor to stack") };
    let here = tensors.iter().map(|tensor| carry(tensor, first.device())).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&here, 0)
}
