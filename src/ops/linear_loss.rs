//! The projection onto a vocabulary and its cross-entropy as one block.

use candle_core::{bail, Device, Result, Tensor, Var};
use rayon::prelude::*;

use super::custom_vjp::custom_vjp;
use super::host::{rows_per_piece, tensor};
use super::loss::{composed_cross_entropy, cross_entropy, log_sum, Labels};
use super::path::{Implementation, OpPath};
use super::quantized::Weight;
use super::soft_cap::{check as check_cap, soft_cap};
use super::vmath;
#[cfg(feature = "cuda")]
use crate::kernels::loss as kernels;
use crate::util::simd::vectorized;

/// The number of rows whose logits are in memory at one time.
const CHUNK: usize = 256;

/// The number of logits in memory at one time on a device, where few large launches are
/// fastest: 512 MiB as bf16.
#[cfg(feature = "cuda")]
const MAX_LOGITS: usize = 1 << 28;

/// `cross_entropy(x W^T, labels)` without storing all logits: one chunk of rows at a time is projected, and
/// its logits are overwritten by their gradient.
///
/// With a vocabulary of 32000, the logits of 1024 rows take 131 MB, and candle's backward holds four such
/// tensors while the activations of all layers are alive; here only `xs` and its gradient are held. A chunk
/// is 256 rows, or 2^28 logits on a CUDA device (f32, bf16). With a trainable weight, it is the composition
/// of projection and loss.
///
/// # Shapes
/// - `xs`: `(n, dim)`
/// - `weight`: `(classes, dim)`; a quantised weight is dequantised in blocks of rows
/// - `labels`: `(n)` of i64, best on the host; rows labelled `ignore` are left out
/// - output: a scalar, in f32 for half-precision `xs`
///
/// # Errors
/// If the shapes do not fit, and as [`cross_entropy`].
pub fn linear_cross_entropy(
    xs: &Tensor,
    weight: impl Into<Weight>,
    labels: &Tensor,
    ignore: i64,
    path: OpPath,
) -> Result<Tensor> {
    capped_linear_cross_entropy(xs, weight, labels, ignore, None, path)
}

/// [`linear_cross_entropy`] with an optional soft cap on the logits ([`soft_cap`]), as in Gemma 2.
///
/// # Errors
/// As [`linear_cross_entropy`] and [`soft_cap`].
pub fn capped_linear_cross_entropy(
    xs: &Tensor,
    weight: impl Into<Weight>,
    labels: &Tensor,
    ignore: i64,
    cap: Option<f64>,
    path: OpPath,
) -> Result<Tensor> {
    let weight = &weight.into();
    let how = weight.implementation(path, xs);
    if how == Implementation::Reference || weight.track_op() {
        let logits = weight.linear(xs, None, path)?;
        let logits = match cap {
            Some(cap) => soft_cap(&logits, cap, path)?,
            None => logits,
        };
        return cross_entropy(&logits, labels, ignore, path);
    }
    weight.check(xs)?;
    if xs.rank() != 2 {
        bail!("linear cross entropy: expected xs (n, dim), got {:?}", xs.dims());
    }
    if let Some(cap) = cap {
        check_cap(cap)?;
    }
    let labels = Labels::new(labels, xs.dim(0)?, weight.dims2()?.0, ignore)?;
    #[cfg(feature = "cuda")]
    if how == Implementation::Kernels && cap.is_none() && kernels::supports(xs) {
        return on_device(xs, weight, &labels, how);
    }
    let (mut loss, mut gradients) = (None, Vec::new());
    for first in (0..labels.all.len()).step_by(CHUNK) {
        let chunk = labels.part(first, CHUNK);
        let rows = xs.detach().narrow(0, first, chunk.all.len())?;
        let (part, gradient) = match how {
            Implementation::Slices => fused(&rows, weight, &chunk, cap)?,
            _ => composed(&weight.forward(how, &rows)?, &chunk, cap)?,
        };
        loss = Some(match loss {
            Some(loss) => (loss + part)?,
            None => part,
        });
        if xs.track_op() {
            gradients.push(weight.input_gradient(how, &gradient)?);
        }
    }
    let Some(loss) = loss else { bail!("linear cross entropy: there is no row") };
    node(xs, loss, &gradients)
}

/// The loss as a function of `xs`, whose gradient is given in chunks of rows. Without any, the
/// loss is not tracked.
fn node(xs: &Tensor, loss: Tensor, gradients: &[Tensor]) -> Result<Tensor> {
    if gradients.is_empty() {
        return Ok(loss);
    }
    let gradient = Tensor::cat(gradients, 0)?;
    custom_vjp("linear-cross-entropy", [xs], loss, move |call| {
        Ok([Some(gradient.broadcast_mul(&call.grad.to_dtype(gradient.dtype())?)?)])
    })
}

/// The loss by kernels that read the logits once and overwrite them with their gradient. All rows are one
/// chunk, unless they have more than [`MAX_LOGITS`] logits.
#[cfg(feature = "cuda")]
fn on_device(xs: &Tensor, weight: &Weight, labels: &Labels, how: Implementation) -> Result<Tensor> {
    let (n, rows) = (labels.all.len(), labels.on_device(xs.device())?);
    let (chunk, mut gradients) = ((MAX_LOGITS / weight.dims2()?.0).max(1), Vec::new());
    for first in (0..n).step_by(chunk) {
        let part = xs.detach().narrow(0, first, chunk.min(n - first))?;
        let logits = weight.forward(how, &part)?;
        if xs.track_op() {
            rows.slopes_in_place(first, &logits)?;
            gradients.push(weight.input_gradient(how, &logits)?);
        } else {
            rows.log_sums(first, &logits)?;
        }
    }
    node(xs, rows.mean()?, &gradients)
}

/// The contribution of a chunk of rows to the loss, and its gradient with respect to their logits,
/// which it overwrites.
fn fused(rows: &Tensor, weight: &Weight, labels: &Labels, cap: Option<f64>) -> Result<(Tensor, Tensor)> {
    let (n, classes) = (labels.all.len(), weight.dims2()?.0);
    let mut logits = weight.product(rows, n)?;
    let cap = cap.map(|cap| cap as f32);
    let (piece, factor) = (rows_per_piece(classes), 1.0 / labels.counted as f32);
    let work = |(i, logits): (usize, &mut [f32])| {
        let mut sum = 0.0;
        vectorized!(for (row, x) in logits.chunks_exact_mut(classes).enumerate() {
            let label = labels.all[i * piece + row];
            if label == labels.ignore {
                x.fill(0.0);
                continue;
            }
            if let Some(cap) = cap {
                x.iter_mut().for_each(|x| *x = cap * vmath::tanh(*x / cap));
            }
            let (log_sum, own) = (log_sum(x), x[label as usize]);
            sum += f64::from(log_sum - own);
            let Some(cap) = cap else {
                x.iter_mut().for_each(|x| *x = factor * vmath::exp(*x - log_sum));
                x[label as usize] -= factor;
                continue;
            };
            let slope = |x: f32| factor * (1.0 - (x / cap) * (x / cap)); // scaled derivative of the cap
            x.iter_mut().for_each(|x| *x = slope(*x) * vmath::exp(*x - log_sum));
            x[label as usize] -= slope(own);
        });
        sum
    };
    let sums: Vec<f64> = logits.par_chunks_mut(piece * classes).enumerate().map(work).collect();
    let loss = sums.iter().sum::<f64>() / labels.counted as f64;
    Ok((Tensor::new(loss as f32, &Device::Cpu)?, tensor(logits, (n, classes))?))
}

fn composed(logits: &Tensor, labels: &Labels, cap: Option<f64>) -> Result<(Tensor, Tensor)> {
    let leaf = Var::from_tensor(logits)?;
    let capped = match cap {
        Some(cap) => soft_cap(leaf.as_tensor(), cap, OpPath::Composed)?,
        None => leaf.as_tensor().clone(),
    };
    let loss = composed_cross_entropy(&capped, labels)?;
    match loss.backward()?.remove(leaf.as_tensor()) {
        Some(gradient) => Ok((loss.detach(), gradient)),
        None => bail!("linear cross entropy: the logits have no gradient"),
    }
}
