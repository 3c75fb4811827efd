//! Predictions at the posterior mean, and averaged over seeded posterior draws.

use candle_core::{DType, Tensor};

use crate::adapter::{Context, DrawCache, Pass};
use crate::data::batch::Batch;
use crate::error::Result;
use crate::metrics::softmax;
use crate::util::check::at_least_one;

/// A model that scores batches.
pub trait Predictor {
    /// Returns logits, or the scores of a regression, of shape `(b, outputs)`.
    ///
    /// # Errors
    /// If the forward pass fails.
    fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor>;
}

/// Returns the outputs for every row of the batches, one vector per row, in the batches' order. No graph is
/// kept for gradients ([`Context::without_gradient`]).
///
/// # Errors
/// If the forward pass fails.
pub fn logits(model: &dyn Predictor, batches: &[Batch], cx: &Context) -> Result<Vec<Vec<f64>>> {
    let cx = cx.clone().without_gradient();
    let mut rows = Vec::new();
    for batch in batches {
        rows.extend(model.predict(batch, &cx)?.to_dtype(DType::F64)?.to_vec2::<f64>()?);
    }
    Ok(rows)
}

/// Returns class probabilities averaged over `samples` posterior draws, after the softmax of each. Draw s has
/// the same weights for every batch. An even number of samples consists of whole pairs ([`Pass::sign`]),
/// whose average is closer to that of many draws.
///
/// # Errors
/// If `samples` is 0, or the forward pass fails.
pub fn posterior_probabilities(
    model: &dyn Predictor,
    batches: &[Batch],
    samples: usize,
) -> Result<Vec<Vec<f64>>> {
    average(model, batches, samples, |row| softmax(&row))
}

/// Returns the scores of a regression, averaged over `samples` posterior draws.
///
/// # Errors
/// If `samples` is 0, or the forward pass fails.
pub fn posterior_scores(model: &dyn Predictor, batches: &[Batch], samples: usize) -> Result<Vec<Vec<f64>>> {
    average(model, batches, samples, |row| row)
}

/// Returns the class probabilities of each of `samples` posterior draws, of shape `(s, n, c)`: the values
/// that [`posterior_probabilities`] averages.
///
/// # Errors
/// As [`posterior_probabilities`].
pub fn posterior_draws(
    model: &dyn Predictor,
    batches: &[Batch],
    samples: usize,
) -> Result<Vec<Vec<Vec<f64>>>> {
    let mut draws = Vec::new();
    each_draw(model, batches, samples, |rows| draws.push(rows.iter().map(|row| softmax(row)).collect()))?;
    Ok(draws)
}

fn average(
    model: &dyn Predictor,
    batches: &[Batch],
    samples: usize,
    transform: impl Fn(Vec<f64>) -> Vec<f64>,
) -> Result<Vec<Vec<f64>>> {
    let mut mean = RunningMean::default();
    each_draw(model, batches, samples, |rows| mean.add(rows.into_iter().map(&transform)))?;
    Ok(mean.finish())
}

/// A running mean over predictions of the same rows; only keeps their sum.
#[derive(Default)]
pub(crate) struct RunningMean {
    sum: Vec<Vec<f64>>,
    count: f64,
}

impl RunningMean {
    /// Adds one prediction for every row.
    pub fn add(&mut self, rows: impl Iterator<Item = Vec<f64>>) {
        self.count += 1.0;
        for (i, row) in rows.enumerate() {
            match self.sum.get_mut(i) {
                Some(sum) => sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value),
                None => self.sum.push(row),
            }
        }
    }

    /// Returns the mean of the predictions added so far.
    pub fn finish(mut self) -> Vec<Vec<f64>> {
        self.sum.iter_mut().flatten().for_each(|value| *value /= self.count);
        self.sum
    }
}

/// Calls `take` with the outputs of every row for each of the posterior draws 0, 1, ..
fn each_draw(
    model: &dyn Predictor,
    batches: &[Batch],
    samples: usize,
    mut take: impl FnMut(Vec<Vec<f64>>),
) -> Result<()> {
    at_least_one("posterior_samples", samples)?;
    for draw in 0..samples {
        let pass = Pass::Posterior { draw: draw as u64 };
        // A cache per draw: the next draw does not reuse these weights.
        take(logits(model, batches, &Context::from(pass).with_draws(&DrawCache::default()))?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::data::encode::Encoded;
    use crate::data::task::Label;

    /// Returns the logits `(id, draw)` for every row, with draw -1 for the mean pass.
    struct Echo;

    impl Predictor for Echo {
        fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
            let draw = match cx.pass {
                Pass::Posterior { draw } => draw as f32,
                _ => -1.0,
            };
            let ids = batch.input_ids.narrow(1, 0, 1)?.to_dtype(DType::F32)?;
            Tensor::cat(&[&ids, &(ids.zeros_like()? + f64::from(draw))?], 1)
        }
    }

    fn batches() -> Result<Vec<Batch>> {
        let row = |id: u32| Encoded { ids: vec![id], type_ids: vec![0], label: Label::Class(0), row: 0 };
        let batch = |ids: &[u32]| {
            let rows: Vec<Encoded> = ids.iter().map(|id| row(*id)).collect();
            Batch::collate(&rows.iter().collect::<Vec<_>>(), 0, &Device::Cpu)
        };
        Ok(vec![batch(&[3, 1])?, batch(&[2])?])
    }

    #[test]
    fn draws_are_counted_from_zero_and_averaged_after_the_softmax() -> Result<()> {
        let batches = batches()?;
        assert_eq!(logits(&Echo, &batches, &Pass::Mean.into())?, [[3.0, -1.0], [1.0, -1.0], [2.0, -1.0]]);
        assert_eq!(posterior_scores(&Echo, &batches, 3)?, [[3.0, 1.0], [1.0, 1.0], [2.0, 1.0]]);
        // [(1 / (1 + exp(-i)) + 1 / (1 + exp(1 - i))) / 2 for i in (3, 1, 2)]
        let expected = [0.9166856024001578, 0.6155292893150024, 0.8059278283039436];
        let got = posterior_probabilities(&Echo, &batches, 2)?;
        for (row, expected) in got.iter().zip(expected) {
            assert!((row[0] - expected).abs() < 1e-12 && (row[0] + row[1] - 1.0).abs() < 1e-12, "{row:?}");
        }
        let draws = posterior_draws(&Echo, &batches, 2)?;
        assert_eq!(draws.len(), 2);
        for (i, row) in got.iter().enumerate() {
            assert_eq!(row[0], (draws[0][i][0] + draws[1][i][0]) / 2.0);
        }
        Ok(())
    }

    #[test]
    fn an_average_of_nothing_is_an_error() -> Result<()> {
        let error = posterior_probabilities(&Echo, &batches()?, 0).unwrap_err().to_string();
        assert!(error.contains("posterior_samples"), "{error}");
        Ok(())
    }
}
