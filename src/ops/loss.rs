//! Losses.

use std::borrow::Cow;

use candle_core::{bail, DType, Device, Result, Tensor, D};
use rayon::prelude::*;

use super::custom_vjp::custom_vjp;
use super::host::{dense, fill_rows, rows_per_piece, tensor, Host};
use super::path::{Implementation, OpPath};
use super::{reference, vmath};
#[cfg(feature = "cuda")]
use crate::kernels::loss as kernels;
use crate::util::dtype::wide;
use crate::util::simd::vectorized;

/// The label of rows that a loss leaves out, as in PyTorch and Hugging Face.
pub const IGNORED_LABEL: i64 = -100;

/// Mean cross-entropy over the rows that are not labelled `ignore`.
///
/// Log-softmax, selection and mean are one node that keeps one number per row; backward computes
/// `(softmax - onehot) / rows` in one pass. Forward plus backward is 2.8 times as fast as the reference at
/// 1024 x 50265, and saves five tensors of that size. On a CUDA device (f32, bf16), one kernel in each
/// direction reads the logits once.
///
/// # Shapes
/// - `logits`: `(n, classes)`
/// - `labels`: `(n)` of i64, best on the host: they are checked there, and reading them from a
///   device waits for it
/// - output: a scalar, in f32 for half-precision logits: losses are summed, and eight bits
///   would show no progress
///
/// # Errors
/// If every row is ignored, or a label is neither `ignore` nor a class: the message names the row,
/// the label and the number of classes.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, ignore: i64, path: OpPath) -> Result<Tensor> {
    let (n, classes) = logits.dims2()?;
    let checked = Labels::new(labels, n, classes, ignore)?;
    match path.on(&[logits]) {
        Implementation::Reference => {
            let labels = labels.detach().to_dtype(DType::I64)?.to_device(logits.device())?;
            reference::cross_entropy(
                &logits.to_dtype(wide(logits.dtype()))?,
                &labels,
                ignore,
                checked.counted,
            )
        }
        Implementation::Slices => {
            let labels = checked.all.iter().map(|&label| (label != ignore).then_some(label as usize));
            fused_cross_entropy(logits, labels.collect(), checked.counted)
        }
        #[cfg(feature = "cuda")]
        Implementation::Kernels if kernels::supports(logits) => {
            let rows = checked.on_device(logits.device())?;
            let log_sums = rows.log_sums(0, &logits.detach())?;
            custom_vjp("cross-entropy", [logits], rows.mean()?, move |call| {
                Ok([Some(rows.slopes(&call.args[0], &log_sums, &call.grad)?)])
            })
        }
        Implementation::Composed | Implementation::Kernels => composed_cross_entropy(logits, &checked),
    }
}

/// Labels of some rows, checked and on the host.
pub(super) struct Labels<'a> {
    pub all: Cow<'a, [i64]>,
    pub ignore: i64,
    /// The number of labelled rows of the whole batch, over which the mean is taken.
    pub counted: usize,
}

impl<'a> Labels<'a> {
    pub fn new(labels: &Tensor, n: usize, classes: usize, ignore: i64) -> Result<Self> {
        if labels.dims() != [n] {
            bail!("cross entropy: logits {:?} want labels ({n}), got {:?}", [n, classes], labels.dims());
        }
        let all = labels.detach().to_dtype(DType::I64)?.to_vec1::<i64>()?;
        for (row, &label) in all.iter().enumerate() {
            if label != ignore && !(0..classes as i64).contains(&label) {
                bail!("cross entropy: label {label} of row {row} is not one of {classes} classes");
            }
        }
        let counted = all.iter().filter(|&&label| label != ignore).count();
        if counted == 0 {
            bail!("cross entropy: all {n} rows carry the ignored label {ignore}");
        }
        Ok(Self { all: Cow::Owned(all), ignore, counted })
    }

    /// The labels on a device, as its kernels read them.
    #[cfg(feature = "cuda")]
    pub fn on_device(&self, device: &Device) -> Result<kernels::LabelledRows> {
        let label = |&label: &i64| if label == self.ignore { kernels::IGNORED } else { label as u32 };
        kernels::LabelledRows::new(self.all.iter().map(label).collect(), self.counted, device)
    }

    /// The labels of at most `len` rows from row `first` on.
    pub fn part(&'a self, first: usize, len: usize) -> Self {
        let all = &self.all[first..self.all.len().min(first + len)];
        Self { all: Cow::Borrowed(all), ..*self }
    }
}

/// The log-sum-exp of a row.
#[inline(always)]
pub(super) fn log_sum(row: &[f32]) -> f32 {
    let max = vmath::max(row);
    max + vmath::sum(row, |x| vmath::exp(x - max)).ln()
}

fn fused_cross_entropy(logits: &Tensor, labels: Vec<Option<usize>>, rows: usize) -> Result<Tensor> {
    let classes = logits.dim(1)?;
    let log_sums = {
        let logits = dense(logits)?;
        let logits = Host::of(&logits)?;
        // (n): the log-sum-exp of each row
        let pieces: Vec<Vec<f32>> = logits
            .par_chunks(rows_per_piece(classes) * classes)
            .map(|piece| vectorized!(piece.chunks_exact(classes).map(log_sum).collect()))
            .collect();
        pieces.concat()
    };
    let loss = {
        let logits = dense(logits)?;
        let logits = Host::of(&logits)?;
        let terms = labels.iter().zip(&log_sums).enumerate().filter_map(|(row, (label, log_sum))| {
            label.map(|label| f64::from(log_sum - logits[row * classes + label]))
        });
        terms.sum::<f64>() / rows as f64
    };
    let loss = Tensor::new(loss as f32, &Device::Cpu)?;
    custom_vjp("cross-entropy", [logits], loss, move |call| {
        let factor = call.grad.to_scalar::<f32>()? / rows as f32;
        let logits = dense(&call.args[0])?;
        let x = Host::of(&logits)?;
        let x: &[f32] = &x;
        let dx = fill_rows(x.len(), classes, |first, out| {
            vectorized!({
                for (i, out) in out.chunks_exact_mut(classes).enumerate() {
                    let row = first + i;
                    let Some(label) = labels[row] else { continue };
                    let log_sum = log_sums[row];
                    for (out, &x) in out.iter_mut().zip(&x[row * classes..]) {
                        *out = factor * vmath::exp(x - log_sum);
                    }
                    out[label] -= factor;
                }
            })
        });
        Ok([Some(tensor(dx, logits.dims())?)])
    })
}

pub(super) fn composed_cross_entropy(logits: &Tensor, labels: &Labels) -> Result<Tensor> {
    let (device, dtype) = (logits.device(), wide(logits.dtype()));
    let (n, rows, ignore) = (labels.all.len(), labels.counted, labels.ignore);
    let safe: Vec<u32> =
        labels.all.iter().map(|&label| if label == ignore { 0 } else { label as u32 }).collect();
    let keep: Vec<u8> = labels.all.iter().map(|&label| u8::from(label != ignore)).collect();
    let safe = Tensor::from_vec(safe, (n, 1), device)?;
    let keep = Tensor::from_vec(keep, (n, 1), device)?;
    let x = logits.detach().to_dtype(dtype)?.contiguous()?;
    let max = x.max_keepdim(D::Minus1)?;
    let log_sum = (x.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?.log()? + max)?; // (n, 1)
    let terms = (&log_sum - x.gather(&safe, 1)?)?;
    // Selected, not multiplied: an ignored row may hold NaN.
    let terms = keep.where_cond(&terms, &terms.zeros_like()?)?;
    let loss = (terms.sum_all()? / rows as f64)?;
    custom_vjp("cross-entropy", [logits], loss, move |call| {
        let p = call.args[0].to_dtype(dtype)?.broadcast_sub(&log_sum)?.exp()?.contiguous()?;
        let factor = (&call.grad / rows as f64)?;
        let minus_one = log_sum.zeros_like()?.affine(1.0, -1.0)?;
        let dx = p.scatter_add(&safe, &minus_one, 1)?.broadcast_mul(&factor)?;
        let keep = keep.broadcast_as(dx.dims())?.contiguous()?;
        Ok([Some(keep.where_cond(&dx, &dx.zeros_like()?)?)])
    })
}

/// Mean squared error as one node, whose backward is one pass over the difference.
///
/// # Shapes
/// - `predictions`, `targets`: any shape, the same for both
/// - output: a scalar, in f32 for half-precision predictions
///
/// # Errors
/// If the shapes differ, or there is nothing to average.
pub fn mean_squared_error(predictions: &Tensor, targets: &Tensor, path: OpPath) -> Result<Tensor> {
    if predictions.dims() != targets.dims() || predictions.elem_count() == 0 {
        bail!("mean squared error: predictions {:?}, targets {:?}", predictions.dims(), targets.dims());
    }
    let dtype = wide(predictions.dtype());
    if path.on(&[predictions, targets]) == Implementation::Reference {
        return reference::mean_squared_error(&predictions.to_dtype(dtype)?, &targets.to_dtype(dtype)?);
    }
    // There are few numbers per batch: slices would gain nothing over tensor operations.
    let difference = move |predictions: &Tensor, targets: &Tensor| {
        predictions.to_dtype(dtype)? - targets.to_dtype(dtype)?
    };
    let loss = difference(&predictions.detach(), &targets.detach())?.sqr()?.mean_all()?;
    custom_vjp("mean-squared-error", [predictions, targets], loss, move |call| {
        let [predictions, targets] = &call.args;
        let n = predictions.elem_count() as f64;
        let factor = (&call.grad * (2.0 / n))?;
        let dp = difference(predictions, targets)?.broadcast_mul(&factor)?;
        let dt = call.needs[1].then(|| dp.neg()).transpose()?;
        Ok([Some(dp), dt])
    })
}
