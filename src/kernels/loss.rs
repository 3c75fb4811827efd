//! Cross-entropy over rows of f32 or bf16 logits on a CUDA device, each read once.

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::launch::{address, count, device_of, empty, grid, launch, narrow, supports_all};

/// The label of an ignored row.
pub(crate) const IGNORED: u32 = u32::MAX;

/// Whether these kernels support the logits: f32 or bf16, on a CUDA device, not empty.
pub(crate) fn supports(logits: &Tensor) -> bool {
    supports_all([logits])
}

/// The labels of some rows, and the term of each row in the loss.
pub(crate) struct LabelledRows {
    labels: Tensor, // (n) of u32
    terms: Tensor,  // (n) of f32
    counted: usize,
}

impl LabelledRows {
    /// Creates rows with these labels, each a class or [`IGNORED`], of which `counted` are not ignored.
    /// This is one upload.
    ///
    /// # Errors
    /// If the device fails, or is not a CUDA device.
    pub fn new(labels: Vec<u32>, counted: usize, device: &Device) -> Result<Self> {
        let labels = Tensor::new(labels, device)?;
        let terms = empty(device_of(&labels)?, labels.shape(), DType::F32)?;
        Ok(Self { labels, terms, counted })
    }

    /// Computes the terms of the rows from number `first` on from their logits `(rows, classes)`, and keeps
    /// them for [`Self::mean`]. Returns the log-sum-exp of each row, `(rows)` of f32.
    ///
    /// # Errors
    /// If the logits are not supported ([`supports`]), or the device fails.
    pub fn log_sums(&self, first: usize, logits: &Tensor) -> Result<Tensor> {
        let device = device_of(logits)?;
        let log_sums = empty(device, &Shape::from(logits.dim(0)?), DType::F32)?;
        self.read(first, &logits.contiguous()?, 0, address(device, &log_sums, DType::F32)?, 0)?;
        Ok(log_sums)
    }

    /// Computes the terms as [`Self::log_sums`] does, and overwrites the logits, which must not be shared,
    /// with their gradient, `(softmax - onehot) / counted`.
    ///
    /// # Errors
    /// As [`Self::log_sums`].
    pub fn slopes_in_place(&self, first: usize, logits: &Tensor) -> Result<()> {
        self.read(first, logits, 1, 0, address(device_of(logits)?, logits, logits.dtype())?)
    }

    fn read(&self, first: usize, logits: &Tensor, sloped: u32, log_sums: u64, slopes: u64) -> Result<()> {
        let (rows, classes) = logits.dims2()?;
        let (labels, terms) = (self.labels.narrow(0, first, rows)?, self.terms.narrow(0, first, rows)?);
        let (device, narrow) = (device_of(logits)?, narrow(logits));
        let (rows, classes, factor) = (count(rows)?, count(classes)?, 1.0 / self.counted as f32);
        let (from, labels) =
            (address(device, logits, logits.dtype())?, address(device, &labels, DType::U32)?);
        let terms = address(device, &terms, DType::F32)?;
        launch!(device; grid(rows); cross_entropy(
            &classes, &narrow, &sloped, &factor, &from, &labels, &terms, &log_sums, &slopes
        ));
        Ok(())
    }

    /// `grad (softmax - onehot) / counted` of all rows, with the shape and dtype of the logits, from the
    /// log-sum-exps of [`Self::log_sums`] and the gradient of the loss, a scalar of f32.
    ///
    /// # Errors
    /// As [`Self::log_sums`].
    pub fn slopes(&self, logits: &Tensor, log_sums: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (device, narrow, logits) = (device_of(logits)?, narrow(logits), logits.contiguous()?);
        let slopes = empty(device, logits.shape(), logits.dtype())?;
        let (rows, classes) = logits.dims2()?;
        let (rows, classes, factor) = (count(rows)?, count(classes)?, 1.0 / self.counted as f32);
        let (from, to) =
            (address(device, &logits, logits.dtype())?, address(device, &slopes, logits.dtype())?);
        let (labels, log_sums) =
            (address(device, &self.labels, DType::U32)?, address(device, log_sums, DType::F32)?);
        let grad = address(device, grad, DType::F32)?;
        launch!(device; grid(rows); cross_entropy_slopes(
            &classes, &narrow, &factor, &from, &labels, &log_sums, &grad, &to
        ));
        Ok(slopes)
    }

    /// The mean over the counted rows: a scalar of f32.
    ///
    /// # Errors
    /// If the device fails.
    pub fn mean(&self) -> Result<Tensor> {
        let device = device_of(&self.terms)?;
        let loss = empty(device, &Shape::from(()), DType::F32)?;
        let (rows, factor) = (count(self.terms.elem_count())?, 1.0 / self.counted as f64);
        let (terms, to) = (address(device, &self.terms, DType::F32)?, address(device, &loss, DType::F32)?);
        launch!(device; grid(1); mean_of_terms(&rows, &factor, &terms, &to));
        Ok(loss)
    }
}
