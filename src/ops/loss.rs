//! Losses.

use candle_core::{DType, Result, Tensor, D};

/// Mean cross-entropy of `logits` (n, classes) against `labels` (n) of i64, rows labelled `ignore` left out.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, ignore: i64) -> Result<Tensor> {
    let keep = labels.ne(ignore)?.to_dtype(logits.dtype())?;
    let safe = (labels * labels.ne(ignore)?.to_dtype(DType::I64)?)?;
    let log_p = candle_nn::ops::log_softmax(logits, D::Minus1)?;
    let picked = log_p.gather(&safe.unsqueeze(1)?, 1)?.squeeze(1)?;
    (picked * &keep)?.sum_all()?.neg()? / keep.sum_all()?
}

/// Mean squared error of `predictions` (n) against `targets` (n).
pub fn mean_squared_error(predictions: &Tensor, targets: &Tensor) -> Result<Tensor> {
    (predictions - targets)?.sqr()?.mean_all()
}
