//! What a language model says of the tokens of a text.

use candle_core::{DType, Device};

use crate::adapter::Context;
use crate::data::causal::CausalBatch;
use crate::error::Result;
use crate::models::causal::CausalLm;

/// The logarithm of the probability of each token that a batch predicts, averaged over contexts as
/// probabilities.
///
/// # Errors
/// If a forward pass fails.
pub fn token_log_probabilities(
    model: &dyn CausalLm,
    batch: &CausalBatch,
    contexts: &[Context],
) -> Result<Vec<f64>> {
    let targets = batch.targets.unsqueeze(1)?.to_device(model.device())?;
    let mut sums = vec![f64::NEG_INFINITY; targets.dim(0)?];
    for cx in contexts {
        let hidden = model.hidden(&batch.input_ids, &batch.attention_mask, None, cx)?;
        let predicting = batch.positions.take(&hidden.detach(), cx.path)?;
        let logits = model.head(&predicting, cx)?.to_dtype(DType::F32)?; // (n, vocab)
        let chosen = logits.gather(&targets, 1)?.squeeze(1)?;
        let logs = (chosen - logits.log_sum_exp(1)?)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        for (sum, log) in sums.iter_mut().zip(logs.to_vec1::<f64>()?) {
            let (high, low) = if *sum > log { (*sum, log) } else { (log, *sum) };
            *sum = if low == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() };
        }
    }
    let count = (contexts.len() as f64).ln();
    Ok(sums.into_iter().map(|sum| sum - count).collect())
}
