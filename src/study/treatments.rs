//! The ways to predict with a trained model that a study compares.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::cell::{Bin, CellResult};
use super::recipe::Recipe;
use crate::bayes::posterior_probabilities;
use crate::data::encode::Encoded;
use crate::data::task::Label;
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::train::{batches, Classifier, Predictions};

/// The bins of a reliability diagram.
const BINS: usize = 10;
/// Rows of an evaluation batch.
const BATCH: usize = 64;

/// A trained model and the rows it is measured on.
pub(super) struct Held<'a> {
    pub classifier: &'a Classifier,
    pub train: &'a [Encoded],
    pub held_out: &'a [Encoded],
    pub dev: &'a [Encoded],
    pub foreign: &'a [Encoded],
    pub draws: usize,
    /// Earlier parameters of the same training.
    pub members: Vec<BTreeMap<String, Tensor>>,
}

/// Fills in the arms of a result.
pub(super) fn measure(held: &Held, recipe: &Recipe, result: &mut CellResult) -> Result<()> {
    let batched = batches(held.classifier, held.dev, BATCH)?;
    let mean = Predictions::new(held.classifier, held.dev, &batched, 0)?;
    if held.classifier.is_regression() {
        result.arms.insert("mean".to_string(), mean.evaluate().map_err(not_finite)?.mean);
        return Ok(());
    }
    let labels = classes(held.dev)?;
    let mut add = |arm: &str, probabilities: &[Vec<f64>]| -> Result<()> {
        let metrics = Metrics::classification(probabilities, &labels).map_err(not_finite)?;
        result.arms.insert(arm.to_string(), metrics);
        result.reliability.insert(arm.to_string(), reliability(probabilities, &labels));
        Ok(())
    };
    add("mean", &mean.mean)?;
    if recipe.has_posterior() {
        let probabilities = posterior_probabilities(held.classifier, &batched, held.draws)?;
        add(&format!("{} draws", held.draws), &probabilities)?;
    }
    Ok(())
}

/// The labels of classes.
fn classes(rows: &[Encoded]) -> Result<Vec<u32>> {
    let class = |row: &Encoded| match row.label {
        Label::Class(class) => Ok(class),
        Label::Score(_) => Err(Error::config("labels", format!("row {} has a score", row.row))),
    };
    rows.iter().map(class).collect()
}

/// Predictions that are no probabilities are those of a model that diverged.
fn not_finite(error: Error) -> Error {
    Error::NonFinite { step: 0, term: format!("predictions ({error})"), value: f64::NAN, rows: Vec::new() }
}

/// The reliability diagram: bins of equal width over the highest probability.
fn reliability(probabilities: &[Vec<f64>], labels: &[u32]) -> Vec<Bin> {
    let mut bins = vec![Bin::default(); BINS];
    for (row, label) in probabilities.iter().zip(labels) {
        let (best, highest) =
            row.iter().enumerate().fold((0, f64::MIN), |top, (i, p)| if *p > top.1 { (i, *p) } else { top });
        let bin = &mut bins[((highest * BINS as f64) as usize).min(BINS - 1)];
        bin.count += 1;
        bin.confidence += highest;
        bin.accuracy += f64::from(u8::from(best == *label as usize));
    }
    for bin in bins.iter_mut().filter(|bin| bin.count > 0) {
        bin.confidence /= bin.count as f64;
        bin.accuracy /= bin.count as f64;
    }
    bins
}
