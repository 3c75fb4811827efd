//! Predictions of the posterior mean, and averaged over seeded posterior draws.

use candle_core::{DType, Tensor};

use crate::data::batch::Batch;
use crate::error::Result;
use crate::metrics::softmax;
use crate::slot::Pass;

/// A model that scores batches.
pub trait Predictor {
    /// `(b, outputs)`: logits, or the scores of a regression.
    ///
    /// # Errors
    /// If the forward pass fails.
    fn predict(&self, batch: &Batch, pass: &Pass) -> candle_core::Result<Tensor>;
}

/// The outputs for every row of some batches, one vector a row, in the batches' order.
///
/// # Errors
/// If the forward pass fails.
pub fn logits(model: &dyn Predictor, batches: &[Batch], pass: &Pass) -> Result<Vec<Vec<f64>>> {
    let mut rows = Vec::new();
    for batch in batches {
        rows.extend(model.predict(batch, pass)?.to_dtype(DType::F64)?.to_vec2::<f64>()?);
    }
    Ok(rows)
}

/// Class probabilities averaged over `samples` posterior draws, after the softmax of each. Draw s
/// is the same weights for every batch.
///
/// # Errors
/// If the forward pass fails.
pub fn posterior_probabilities(
    model: &dyn Predictor,
    batches: &[Batch],
    samples: usize,
) -> Result<Vec<Vec<f64>>> {
    average(model, batches, samples, |row| softmax(&row))
}

/// Scores of a regression averaged over `samples` posterior draws.
///
/// # Errors
/// If the forward pass fails.
pub fn posterior_scores(model: &dyn Predictor, batches: &[Batch], samples: usize) -> Result<Vec<Vec<f64>>> {
    average(model, batches, samples, |row| row)
}

fn average(
    model: &dyn Predictor,
    batches: &[Batch],
    samples: usize,
    transform: impl Fn(Vec<f64>) -> Vec<f64>,
) -> Result<Vec<Vec<f64>>> {
    let mut mean: Vec<Vec<f64>> = Vec::new();
    for draw in 0..samples {
        let rows = logits(model, batches, &Pass::Posterior { draw: draw as u64 })?;
        for (i, row) in rows.into_iter().enumerate() {
            let row = transform(row);
            match mean.get_mut(i) {
                Some(sum) => sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value),
                None => mean.push(row),
            }
        }
    }
    mean.iter_mut().flatten().for_each(|value| *value /= samples as f64);
    Ok(mean)
}
