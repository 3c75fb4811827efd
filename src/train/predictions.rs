//! Evaluation of a classifier on a labelled split, at the posterior mean and averaged over draws.

use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::classifier::Classifier;
use super::distributed::{in_turns, Communicator, SingleProcess};
use crate::adapter::Pass;
use crate::data::batch::{in_order, Batch};
use crate::data::encode::Encoded;
use crate::data::task::Label;
use crate::error::{Error, Result};
use crate::metrics::{self, argmax, softmax, ClassScores, Metrics};
use crate::predict::{logits, posterior_probabilities, posterior_scores};
use crate::util::files;

/// A classifier's predictions for every row of a labelled split, to measure it by; for texts without labels, see
/// [`Classifier::predict`]. Values are probabilities, or the scores of a
/// regression.
#[derive(Debug, Clone, PartialEq)]
pub struct Predictions {
    /// The outputs at the posterior mean, before the softmax.
    pub logits: Vec<Vec<f64>>,
    /// The predictions at the posterior mean.
    pub mean: Vec<Vec<f64>>,
    /// The average over posterior draws, if requested.
    pub posterior: Option<Vec<Vec<f64>>>,
    /// The probabilities of the linearised model, if the caller adds them
    /// ([`LinearisedClassifier`](crate::bayes::LinearisedClassifier)).
    pub linearised: Option<Vec<Vec<f64>>>,
    /// [`Encoded::row`] of each row.
    rows: Vec<usize>,
    labels: Vec<Label>,
    positive: u32,
}

/// Computes the metrics of class probabilities and labels.
type OfClasses = fn(&[Vec<f64>], &[u32]) -> Result<Metrics>;

/// The metrics of a split.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// The metrics at the posterior mean.
    pub mean: Metrics,
    /// The metrics of the average over posterior draws.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub posterior: Option<Metrics>,
    /// The metrics of the linearised model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub linearised: Option<Metrics>,
}

/// Returns the outputs, and with `draws` their averages, of all rows in order. `parts[r]` has those of the
/// batches r, r + W, ..: first all outputs, then all averages, each of `width` numbers.
fn merge(
    parts: &[Vec<f64>],
    batches: &[Batch],
    width: usize,
    draws: bool,
) -> (Vec<Vec<f64>>, Option<Vec<Vec<f64>>>) {
    let (world, kinds) = (parts.len(), if draws { 2 } else { 1 });
    let collect = |kind: usize| {
        let rows = parts.iter().map(|part| part[part.len() / kinds * kind..].chunks(width.max(1)));
        let mut rows: Vec<_> = rows.collect();
        let of_batch = |(i, batch): (usize, &Batch)| {
            rows[i % world].by_ref().take(batch.rows.len()).map(<[f64]>::to_vec).collect::<Vec<_>>()
        };
        batches.iter().enumerate().flat_map(of_batch).collect()
    };
    (collect(0), draws.then(|| collect(1)))
}

/// Batches a split for evaluation, in the order of its rows.
///
/// # Errors
/// If there are no rows, or candle fails.
pub fn batches(classifier: &Classifier, rows: &[Encoded], batch_size: usize) -> Result<Vec<Batch>> {
    if rows.is_empty() {
        return Err(Error::config("rows", "there is no row to evaluate"));
    }
    let device = classifier.params.device();
    let pad_id = classifier.model.pad_id();
    let plan = in_order(rows.len(), batch_size)?;
    plan.iter()
        .map(|chosen| Batch::collate(&chosen.iter().map(|i| &rows[*i]).collect::<Vec<_>>(), pad_id, device))
        .collect()
}

impl Predictions {
    /// Predicts the rows of `batches` at the mean, and averaged over `samples` posterior draws unless 0.
    ///
    /// # Errors
    /// If a forward pass fails, `batches` do not match `rows`, or labels are not of the kind that the
    /// classifier predicts.
    pub fn new(classifier: &Classifier, rows: &[Encoded], batches: &[Batch], samples: usize) -> Result<Self> {
        Self::in_turns(classifier, rows, batches, samples, &SingleProcess)
    }

    /// [`Self::new`] divided among several processes, which take the batches in turns and all get all
    /// predictions.
    ///
    /// # Errors
    /// As [`Self::new`]; an error of one process is returned on all.
    pub fn in_turns(
        classifier: &Classifier,
        rows: &[Encoded],
        batches: &[Batch],
        samples: usize,
        communicator: &dyn Communicator,
    ) -> Result<Self> {
        let batched: usize = batches.iter().map(|batch| batch.rows.len()).sum();
        if batched != rows.len() {
            let reason = format!("{} rows, but {batched} in the batches", rows.len());
            return Err(Error::config("batches", reason));
        }
        let places = batches.iter().flat_map(|batch| &batch.rows).zip(rows).enumerate();
        if let Some((i, (got, row))) = places.into_iter().find(|(_, (got, row))| **got != row.row) {
            let reason = format!("place {i} holds row {got}, but the split has row {} there", row.row);
            return Err(Error::config("batches", reason));
        }
        batches.iter().try_for_each(|batch| classifier.check_labels(batch))?;
        if samples > 0 {
            classifier.check_has_posterior()?;
        }
        let regression = classifier.is_regression();
        let world = communicator.world();
        // One item per process, with all its batches, so that each draw is made once.
        let parts = in_turns(communicator, world, &mut |rank| {
            let own: Vec<Batch> = batches.iter().skip(rank).step_by(world).cloned().collect();
            let outputs = logits(classifier, &own, &Pass::Mean.into())?;
            let posterior = match (samples, regression) {
                (0, _) => Vec::new(),
                (n, true) => posterior_scores(classifier, &own, n)?,
                (n, false) => posterior_probabilities(classifier, &own, n)?,
            };
            Ok([outputs, posterior].concat().concat())
        })?;
        let (outputs, posterior) = merge(&parts, batches, classifier.model.num_labels(), samples > 0);
        let mean =
            if regression { outputs.clone() } else { outputs.iter().map(|row| softmax(row)).collect() };
        let (rows, labels) = rows.iter().map(|row| (row.row, row.label)).unzip();
        let positive = classifier.positive;
        Ok(Self { logits: outputs, mean, posterior, linearised: None, rows, labels, positive })
    }

    /// Returns the labels of the rows, in order.
    pub fn labels(&self) -> &[Label] {
        &self.labels
    }

    /// Returns every metric that applies, over the labelled rows.
    ///
    /// # Errors
    /// If no row has a label, or the predictions are not finite.
    pub fn evaluate(&self) -> Result<Evaluation> {
        self.evaluation(Metrics::classification)
    }

    /// [`Self::evaluate`] with the further metrics of [`Metrics::of_own_data`].
    ///
    /// # Errors
    /// As [`Self::evaluate`].
    pub fn evaluate_own_data(&self) -> Result<Evaluation> {
        self.evaluation(Metrics::of_own_data)
    }

    fn evaluation(&self, of_classes: OfClasses) -> Result<Evaluation> {
        let metrics = |values: &Vec<Vec<f64>>| self.metrics(values, of_classes);
        Ok(Evaluation {
            mean: metrics(&self.mean)?,
            posterior: self.posterior.as_ref().map(metrics).transpose()?,
            linearised: self.linearised.as_ref().map(metrics).transpose()?,
        })
    }

    fn metrics(&self, values: &[Vec<f64>], of_classes: OfClasses) -> Result<Metrics> {
        let (mut classes, mut scores) = (Vec::new(), Vec::new());
        let mut labelled = Vec::new();
        for (label, row) in self.labels.iter().zip(values) {
            match label {
                Label::Class(class) => classes.push(*class),
                Label::Score(score) => scores.push(f64::from(*score)),
                Label::Unknown => continue,
            }
            labelled.push(row.clone());
        }
        if scores.is_empty() {
            let metrics = of_classes(&labelled, &classes)?;
            let predicted: Vec<u32> = labelled.iter().map(|row| argmax(row) as u32).collect();
            let of_positive = |_| metrics::f1(&predicted, &classes, self.positive);
            Ok(Metrics { f1: metrics.f1.map(of_positive).transpose()?, ..metrics })
        } else {
            let predictions: Vec<f64> = labelled.iter().filter_map(|row| row.first().copied()).collect();
            Metrics::regression(&predictions, &scores)
        }
    }

    /// Returns the scores of each class, at the posterior mean; empty for a regression.
    ///
    /// # Errors
    /// If no row has a label.
    pub fn class_scores(&self) -> Result<Vec<ClassScores>> {
        let class = |(label, row): (&Label, &Vec<f64>)| match label {
            Label::Class(class) => Some((argmax(row) as u32, *class)),
            _ => None,
        };
        if self.labels.iter().any(|label| matches!(label, Label::Score(_))) {
            return Ok(Vec::new());
        }
        let (predicted, labels): (Vec<u32>, Vec<u32>) =
            self.labels.iter().zip(&self.mean).filter_map(class).unzip();
        metrics::class_scores(&predicted, &labels)
    }

    /// Writes one JSON object per row: its index in the data from 0, label, logits, mean,
    /// posterior and, if there are any, the probabilities of the linearised model.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = String::new();
        for (i, label) in self.labels.iter().enumerate() {
            let label = match label {
                Label::Class(class) => json!(class),
                Label::Score(score) => json!(score),
                Label::Unknown => json!(null),
            };
            let posterior = self.posterior.as_ref().map(|values| &values[i]);
            let mut row = json!({
                "index": self.rows[i], "label": label, "logits": self.logits[i], "mean": self.mean[i],
                "posterior": posterior,
            });
            if let Some(values) = &self.linearised {
                row["linearised"] = json!(values[i]);
            }
            text.push_str(&row.to_string());
            text.push('\n');
        }
        files::write(path, text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_processes_predicted_by_turns_is_put_into_the_order_of_the_rows() -> Result<()> {
        // Five batches of 3, 1, 2, 3 and 2 rows, of two numbers each: the row and its tenth.
        let row = |row| Encoded { ids: vec![1], type_ids: vec![0], label: Label::Class(0), row };
        let (mut batches, mut next) = (Vec::new(), 0);
        for count in [3, 1, 2, 3, 2] {
            let rows: Vec<Encoded> = (next..next + count).map(row).collect();
            next += count;
            batches.push(Batch::collate(&rows.iter().collect::<Vec<_>>(), 0, &Device::Cpu)?);
        }
        let numbers =
            |of: f64| (0..next).map(|row| vec![row as f64 + of, 0.1 * row as f64]).collect::<Vec<_>>();
        let (outputs, averages) = (numbers(0.0), numbers(100.0));
        for (world, draws) in [(1, true), (2, true), (3, true), (5, true), (3, false)] {
            let part = |rank| -> Vec<f64> {
                let own = |of: &[Vec<f64>]| {
                    let rows = batches.iter().skip(rank).step_by(world).flat_map(|batch| &batch.rows);
                    rows.flat_map(|row| of[*row].clone()).collect::<Vec<f64>>()
                };
                [own(&outputs), if draws { own(&averages) } else { Vec::new() }].concat()
            };
            let parts: Vec<Vec<f64>> = (0..world).map(part).collect();
            let expected = (outputs.clone(), draws.then(|| averages.clone()));
            assert_eq!(merge(&parts, &batches, 2, draws), expected, "{world} processes");
        }
        Ok(())
    }
}
