//! Log-probabilities of a text's tokens under a language model.

use candle_core::{DType, Device, Tensor};

use crate::adapter::Context;
use crate::data::causal::CausalBatch;
use crate::error::Result;
use crate::models::causal::CausalLm;
use crate::util::check::at_least_one;

/// The number of tokens whose logits exist at one time: 131 MB of f32 for a vocabulary of 128 000. The same
/// as in training.
const CHUNK: usize = 256;

/// Returns the log-probability of each target token of a batch. Over several contexts, the probabilities are
/// averaged. No graph is kept for gradients ([`Context::without_gradient`]).
///
/// # Errors
/// If there is no context, or a forward pass fails.
pub fn token_log_probabilities(
    model: &dyn CausalLm,
    batch: &CausalBatch,
    contexts: &[Context],
) -> Result<Vec<f64>> {
    at_least_one("contexts", contexts.len())?;
    let mut sums = vec![f64::NEG_INFINITY; batch.targets.dim(0)?];
    for cx in contexts {
        let cx = &cx.clone().without_gradient();
        let hidden = model.hidden(&batch.input_ids, &batch.attention_mask, None, cx)?.detach();
        let predicting = batch.positions.take(&hidden, cx.path)?; // (n, d)
        drop(hidden);
        let logs = target_log_probabilities(model, &predicting, &batch.targets, cx)?;
        for (sum, log) in sums.iter_mut().zip(logs) {
            let (high, low) = if *sum > log { (*sum, log) } else { (log, *sum) };
            *sum = if low == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() };
        }
    }
    let count = (contexts.len() as f64).ln();
    Ok(sums.into_iter().map(|sum| sum - count).collect())
}

/// Returns the log-probability of each of `n` targets, given the hidden states that predict them.
///
/// # Shapes
/// - `predicting`: `(n, hidden)`
/// - `targets`: `(n)` of i64, on any device
///
/// # Errors
/// If the model's head fails.
pub(crate) fn target_log_probabilities(
    model: &dyn CausalLm,
    predicting: &Tensor,
    targets: &Tensor,
    cx: &Context,
) -> Result<Vec<f64>> {
    let targets = targets.unsqueeze(1)?.to_device(model.device())?;
    let n = targets.dim(0)?;
    let mut logs = Vec::with_capacity(n);
    for at in (0..n).step_by(CHUNK) {
        let rows = CHUNK.min(n - at);
        let logits = model.head(&predicting.narrow(0, at, rows)?, cx)?.to_dtype(DType::F32)?; // (rows, vocab)
        let chosen = logits.gather(&targets.narrow(0, at, rows)?, 1)?.squeeze(1)?;
        let chosen = (chosen - logits.log_sum_exp(1)?)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        logs.extend(chosen.to_vec1::<f64>()?);
    }
    Ok(logs)
}
