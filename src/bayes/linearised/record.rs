//! The record of one batch: the inputs of some linear maps, the gradients at their outputs, and the curvature
//! of the loss at the logits.

use candle_core::{DType, Device, Tensor};

use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::metrics::softmax;
use crate::ops;

/// The most tokens that are recorded at once: a record keeps several activations of every layer.
const TOKENS: usize = 2048;

/// What a record of linear maps is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bayes) enum Wanted {
    /// The Jacobian of every logit.
    Jacobians,
    /// The curvature of the loss alone: of the gradients of the logits, only the differences to the last one
    /// count, so that a class less is differentiated.
    Curvature,
}

/// The logits of a batch and the records of some linear maps.
#[derive(Debug)]
pub(in crate::bayes) struct BatchRecord {
    /// The logits, one vector per example.
    pub logits: Vec<Vec<f64>>,
    /// The maps in a fixed order.
    pub layers: Vec<LayerRecord>,
}

/// One linear map `W (o x i)` on one batch: `dF_k/dW = sum_t gradients[k] inputs^T`.
#[derive(Debug)]
pub(in crate::bayes) struct LayerRecord {
    /// `(b, t, i)`; zero on padding.
    pub inputs: Tensor,
    /// For each class k, `(b, t, o)`: the gradient of logit k; for [`Wanted::Curvature`] minus that of the last
    /// logit, which itself is left out.
    pub gradients: Vec<Tensor>,
    /// The number of tokens without padding.
    pub tokens: f64,
}

impl BatchRecord {
    /// # Errors
    /// If the model has fewer than two outputs, or a logit is not finite.
    pub fn new(outputs: &Tensor, layers: Vec<LayerRecord>) -> Result<Self> {
        let logits = outputs.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
        if let Some(classes) = logits.first().map(Vec::len).filter(|classes| *classes < 2) {
            let reason = format!("needs a classifier of at least 2 classes, the model has {classes}");
            return Err(Error::config("laplace", reason));
        }
        match logits.iter().flatten().find(|z| !z.is_finite()) {
            Some(bad) => Err(Error::config("laplace", format!("the model gives the logit {bad}"))),
            None => Ok(Self { logits, layers }),
        }
    }

    /// `sum_n log p(label_n)`.
    ///
    /// # Errors
    /// If a label is not a class of the model.
    pub fn log_likelihood(&self, batch: &Batch) -> Result<f64> {
        if batch.labels.dtype().is_float() {
            return Err(Error::config("labels", "expected classes, got scores"));
        }
        let labels = batch.labels.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let mut sum = 0.0;
        for (i, (z, label)) in self.logits.iter().zip(labels).enumerate() {
            let Some(own) = usize::try_from(label).ok().and_then(|label| z.get(label)) else {
                let row = batch.rows.get(i).copied().unwrap_or(i);
                let reason = format!("row {row} has class {label}, the model has {} outputs", z.len());
                return Err(Error::config("labels", reason));
            };
            let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            sum += own - top - z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
        }
        Ok(sum)
    }

    /// The roots L of the cross-entropy's Hessian at the logits, `L L^T = diag(p) - p p^T`:
    /// `L = diag(sqrt p) - p sqrt(p)^T`. Entry `[c][k]` is row k of column c for every example, `(b)`.
    pub fn hessian_roots(&self) -> Vec<Vec<Vec<f64>>> {
        let classes = self.logits.first().map_or(0, Vec::len);
        let mut roots = vec![vec![Vec::with_capacity(self.logits.len()); classes]; classes];
        for z in &self.logits {
            let p = softmax(z);
            for (c, column) in roots.iter_mut().enumerate() {
                for (k, of) in column.iter_mut().enumerate() {
                    of.push((f64::from(u8::from(k == c)) - p[k]) * p[c].sqrt());
                }
            }
        }
        roots
    }
}

impl LayerRecord {
    /// A record of the `inputs` of a batch, with padding set to zero and without gradients yet. `None` if
    /// examples share some of the inputs.
    ///
    /// # Errors
    /// As [`Places::per_example`].
    pub fn new(inputs: &Tensor, places: &Places) -> Result<Option<Self>> {
        let Some(inputs) = places.per_example(inputs)? else { return Ok(None) };
        let (b, t, _) = inputs.dims3()?;
        // A layer that sees a single token of each row (the first or the last) sees no padding.
        if t != places.length {
            return Ok(Some(Self { inputs, gradients: Vec::new(), tokens: (b * t) as f64 }));
        }
        let mask = ops::carry(&places.mask, inputs.device())?.to_dtype(inputs.dtype())?.unsqueeze(2)?;
        let inputs = inputs.broadcast_mul(&mask)?;
        Ok(Some(Self { inputs, gradients: Vec::new(), tokens: places.real as f64 }))
    }

    /// The Jacobian of logit k with respect to the weight, `(b, o, i)`, in double precision on the host.
    pub fn jacobian(&self, k: usize) -> Result<Tensor> {
        let gradient = self.gradients[k].transpose(1, 2)?.contiguous()?;
        host(&gradient.matmul(&self.inputs.contiguous()?)?)
    }

    /// `sum x x^T` over examples and tokens, `(i, i)`.
    pub fn input_square(&self) -> Result<Tensor> {
        square(&self.inputs)
    }

    /// `sum_c g_c g_c^T` over examples and tokens, `(o, o)`, where g_c is the gradient of the
    /// logits along column c of their Hessian's root.
    pub fn output_square(&self, roots: &[Vec<Vec<f64>>]) -> Result<Tensor> {
        let (dtype, device) = (self.inputs.dtype(), self.inputs.device().clone());
        let mut sum: Option<Tensor> = None;
        for root in roots {
            let mut column: Option<Tensor> = None;
            // A column of the root sums to zero: subtracting the last logit's gradient changes nothing.
            for (gradient, root) in self.gradients.iter().zip(root) {
                let factor = Tensor::from_slice(root, (root.len(), 1, 1), &device)?;
                let term = gradient.broadcast_mul(&factor.to_dtype(dtype)?)?;
                column = Some(ops::joined(column, term)?);
            }
            if let Some(column) = column {
                sum = Some(ops::joined(sum, square(&column)?)?);
            }
        }
        sum.ok_or_else(|| Error::config("laplace", "there is no gradient"))
    }
}

/// Calls `take` with every part of the batches and its record. Parts have at most [`TOKENS`] tokens, or one row; from
/// the first part on whose `record` is `None`, they have one row.
///
/// # Errors
/// The first error of `record` or `take`, or if even a single row has no record.
pub(in crate::bayes) fn each_part(
    batches: &[Batch],
    record: impl Fn(&Batch) -> Result<Option<BatchRecord>>,
    mut take: impl FnMut(&Batch, BatchRecord) -> Result<()>,
) -> Result<()> {
    let mut tokens = TOKENS;
    for batch in batches {
        let (rows, length) = batch.attention_mask.dims2()?;
        let mut start = 0;
        while start < rows {
            let count = (tokens / length.max(1)).clamp(1, rows - start);
            let part = batch.narrow(start, count)?;
            let part = if count == 1 { part.without_padding()? } else { part };
            match record(&part)? {
                Some(record) => {
                    take(&part, record)?;
                    start += count;
                }
                None if count > 1 => tokens = 0,
                None => {
                    return Err(Error::config("laplace", "the inputs of a layer are not those of one row"))
                }
            }
        }
    }
    Ok(())
}

/// The factor that scales sums over the rows of `batches` up to `of_rows` rows, if they are a sample of those.
///
/// # Errors
/// If there is no row, or more than `of_rows`.
pub(in crate::bayes) fn scale_to(of_rows: Option<usize>, batches: &[Batch]) -> Result<f64> {
    let rows: usize = batches.iter().map(|batch| batch.rows.len()).sum();
    let all = of_rows.unwrap_or(rows);
    if rows == 0 || rows > all {
        let reason = format!("a curvature needs some of the {all} training rows, got {rows}");
        return Err(Error::config("rows", reason));
    }
    Ok(all as f64 / rows as f64)
}

/// `X^T X` over the last dimension, in double precision on the host.
fn square(xs: &Tensor) -> Result<Tensor> {
    let flat = xs.flatten_to(xs.rank() - 2)?.contiguous()?;
    host(&flat.t()?.contiguous()?.matmul(&flat)?)
}

fn host(xs: &Tensor) -> Result<Tensor> {
    Ok(xs.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
}

/// The positions of the tokens of a batch. Models leave out padding in some layers, and all but one token of
/// each row in others.
#[derive(Debug)]
pub(in crate::bayes) struct Places {
    /// `(b, t)`, 1 on real tokens.
    mask: Tensor,
    examples: usize,
    length: usize,
    real: usize,
    /// `(b t)`: the index of each position among the real tokens; `real` for padding.
    packed: Tensor,
}

impl Places {
    /// The positions of the tokens of a batch.
    ///
    /// # Errors
    /// If candle fails.
    pub fn new(batch: &Batch) -> Result<Self> {
        let mask = batch.attention_mask.clone();
        let (examples, length) = mask.dims2()?;
        let shown = mask.flatten_all()?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        let real = shown.iter().filter(|shown| **shown != 0).count();
        let mut next = 0;
        let number = |shown: &u32| match shown {
            0 => real as u32,
            _ => {
                next += 1;
                next - 1
            }
        };
        let packed: Vec<u32> = shown.iter().map(number).collect();
        let packed = Tensor::from_vec(packed, examples * length, mask.device())?;
        Ok(Self { mask, examples, length, real, packed })
    }

    /// Brings a layer's tokens into the shape `(b, t, d)` or `(b, 1, d)`. Accepts these shapes, `(b, d)`,
    /// `(b t, d)`, and the real tokens only, in the order of their rows; padding is then zero.
    ///
    /// A layer may also see what examples share, such as DeBERTa's relative positions, as `(1, n, d)`: `None`,
    /// unless there is only one example, whose `n` tokens they then are.
    ///
    /// # Errors
    /// If the shape does not fit the batch.
    pub fn per_example(&self, xs: &Tensor) -> Result<Option<Tensor>> {
        let (b, t) = (self.examples, self.length);
        let tokens = match *xs.dims() {
            [rows, tokens, _] if rows == b && (tokens == t || tokens == 1 || b == 1) => xs.clone(),
            [1, _, _] => return Ok(None),
            [rows, d] if rows == b => xs.contiguous()?.reshape((b, 1, d))?,
            [rows, d] if rows == b * t => xs.contiguous()?.reshape((b, t, d))?,
            [rows, d] if rows == self.real => {
                let zero = Tensor::zeros((1, d), xs.dtype(), xs.device())?;
                let packed = ops::carry(&self.packed, xs.device())?;
                let padded = Tensor::cat(&[xs, &zero], 0)?.index_select(&packed, 0)?;
                padded.reshape((b, t, d))?
            }
            _ => {
                let reason = format!("expected the tokens of {b} rows of {t}, got shape {:?}", xs.shape());
                return Err(Error::config("laplace", reason));
            }
        };
        Ok(Some(tokens))
    }
}
