//! Metrics of predictions: the scores of GLUE, and the calibration of probabilities.
//!
//! Everything is in double precision; definitions follow scikit-learn and SciPy.

mod calibration;
mod class_scores;
mod quantile;
mod uncertainty;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::special;

pub(crate) use calibration::{confidence_bin, ConfidenceBins};
pub use calibration::{ece_debiased, ece_floor};
pub use class_scores::{class_scores, ClassScores};
pub use quantile::{median, quantile};
pub use uncertainty::{auroc, entropy, uncertainty, Uncertainty};

/// The number of bins of the expected calibration error.
pub const ECE_BINS: usize = 15;

/// The scores of one evaluation; scores that do not apply are `None`.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(default)]
pub struct Metrics {
    /// The share of rows whose most probable class is the label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// F1 of the positive one of two classes, which is class 1 unless another is named
    /// (`Classifier::set_positive_class`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f1: Option<f64>,
    /// The mean of the classes' F1; only set by [`Self::of_own_data`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub macro_f1: Option<f64>,
    /// The mean of the classes' F1 weighted by their rows; only set by [`Self::of_own_data`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weighted_f1: Option<f64>,
    /// Matthews correlation coefficient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matthews: Option<f64>,
    /// Pearson correlation; `None` if the predictions or the targets are constant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pearson: Option<f64>,
    /// Spearman rank correlation; `None` if the predictions or the targets are constant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spearman: Option<f64>,
    /// Mean `-ln p` of the labels, in nats; infinite (`null` in JSON) if a label has probability 0.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "null_is_infinite")]
    pub nll: Option<f64>,
    /// Expected calibration error, as a fraction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ece: Option<f64>,
    /// Brier score per row, summed over classes: 0 to 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub brier: Option<f64>,
    /// Mean squared error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mse: Option<f64>,
}

/// Reads `null` as infinity: JSON has no infinity, which is written as `null`.
fn null_is_infinite<'de, D: Deserializer<'de>>(value: D) -> std::result::Result<Option<f64>, D::Error> {
    Ok(Some(Option::<f64>::deserialize(value)?.unwrap_or(f64::INFINITY)))
}

impl Metrics {
    /// Scores of class probabilities: one row per example, one column per class.
    ///
    /// # Errors
    /// If there is no row, if rows and labels differ in number, if rows differ in length or have fewer than
    /// two classes, if a value is not a probability (NaN included), or if a label is out of range.
    pub fn classification(probabilities: &[Vec<f64>], labels: &[u32]) -> Result<Self> {
        let classes = check_probabilities(probabilities, labels)?;
        let predicted: Vec<u32> = probabilities.iter().map(|p| argmax(p) as u32).collect();
        Ok(Self {
            accuracy: Some(accuracy(&predicted, labels)?),
            f1: if classes == 2 { Some(f1(&predicted, labels, 1)?) } else { None },
            matthews: Some(matthews(&predicted, labels)?),
            nll: Some(nll(probabilities, labels)?),
            ece: Some(ece(probabilities, labels)?),
            brier: Some(brier(probabilities, labels)?),
            ..Self::default()
        })
    }

    /// [`Self::classification`] with macro and weighted F1, which none of the benchmarks here report.
    ///
    /// # Errors
    /// As [`Self::classification`].
    pub fn of_own_data(probabilities: &[Vec<f64>], labels: &[u32]) -> Result<Self> {
        let metrics = Self::classification(probabilities, labels)?;
        let predicted: Vec<u32> = probabilities.iter().map(|p| argmax(p) as u32).collect();
        let scores = class_scores(&predicted, labels)?;
        // As in scikit-learn: over the classes that occur as a prediction or a label.
        let macro_f1 = scores.iter().map(|class| class.f1).sum::<f64>() / scores.len() as f64;
        let weighted = scores.iter().map(|class| class.f1 * class.rows as f64).sum::<f64>();
        let weighted_f1 = weighted / labels.len() as f64;
        Ok(Self { macro_f1: Some(macro_f1), weighted_f1: Some(weighted_f1), ..metrics })
    }

    /// Scores of predicted numbers.
    ///
    /// # Errors
    /// If there is no row, if both slices differ in length, or if a value is not finite.
    pub fn regression(predictions: &[f64], targets: &[f64]) -> Result<Self> {
        Ok(Self {
            pearson: pearson(predictions, targets)?,
            spearman: spearman(predictions, targets)?,
            mse: Some(mse(predictions, targets)?),
            ..Self::default()
        })
    }

    /// Returns the names of the metrics of a model with `outputs` outputs (1: a regression), as [`Self::get`]
    /// takes them.
    pub fn names(outputs: usize) -> &'static [&'static str] {
        match outputs {
            1 => &["pearson", "spearman", "mse"],
            2 => &["accuracy", "f1", "macro_f1", "weighted_f1", "matthews", "nll", "ece", "brier"],
            _ => &["accuracy", "macro_f1", "weighted_f1", "matthews", "nll", "ece", "brier"],
        }
    }

    /// Returns the metric `name` as a score of which more is better: losses and errors are negated.
    pub fn score(&self, name: &str) -> Option<f64> {
        let sign = if ["nll", "ece", "brier", "mse"].contains(&name) { -1.0 } else { 1.0 };
        self.get(name).map(|value| sign * value)
    }

    /// Returns the value of the field `name`; `None` if it is absent or the name is unknown.
    pub fn get(&self, name: &str) -> Option<f64> {
        match name {
            "accuracy" => self.accuracy,
            "f1" => self.f1,
            "macro_f1" => self.macro_f1,
            "weighted_f1" => self.weighted_f1,
            "matthews" => self.matthews,
            "pearson" => self.pearson,
            "spearman" => self.spearman,
            "nll" => self.nll,
            "ece" => self.ece,
            "brier" => self.brier,
            "mse" => self.mse,
            _ => None,
        }
    }
}

/// Returns the probabilities of one row of logits.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let mut row = logits.to_vec();
    special::softmax(&mut row);
    row
}

/// The share of predictions that equal their label.
///
/// # Errors
/// If there is no row, or if both slices differ in length.
pub fn accuracy(predicted: &[u32], labels: &[u32]) -> Result<f64> {
    same_length(predicted.len(), labels.len())?;
    let right = predicted.iter().zip(labels).filter(|(p, l)| p == l).count();
    Ok(right as f64 / labels.len() as f64)
}

/// F1 of the class `positive`; 0 if it is neither predicted nor a label.
///
/// # Errors
/// As [`accuracy`].
pub fn f1(predicted: &[u32], labels: &[u32], positive: u32) -> Result<f64> {
    same_length(predicted.len(), labels.len())?;
    let count = |values: &[u32]| values.iter().filter(|v| **v == positive).count() as f64;
    let both =
        predicted.iter().zip(labels).filter(|(p, l)| **p == positive && **l == positive).count() as f64;
    let total = count(predicted) + count(labels);
    Ok(if total == 0.0 { 0.0 } else { 2.0 * both / total })
}

/// Matthews correlation coefficient for any number of classes (Gorodkin 2004); 0 if all predictions or all
/// labels are of one class.
///
/// # Errors
/// As [`accuracy`].
pub fn matthews(predicted: &[u32], labels: &[u32]) -> Result<f64> {
    same_length(predicted.len(), labels.len())?;
    let mut counts = std::collections::BTreeMap::<u32, (f64, f64)>::new();
    for (p, l) in predicted.iter().zip(labels) {
        counts.entry(*p).or_default().0 += 1.0;
        counts.entry(*l).or_default().1 += 1.0;
    }
    let n = labels.len() as f64;
    let right = predicted.iter().zip(labels).filter(|(p, l)| p == l).count() as f64;
    let sum = |term: fn(&(f64, f64)) -> f64| counts.values().map(term).sum::<f64>();
    let scale = (n * n - sum(|c| c.0 * c.0)).sqrt() * (n * n - sum(|c| c.1 * c.1)).sqrt();
    Ok(if scale == 0.0 { 0.0 } else { (right * n - sum(|c| c.0 * c.1)) / scale })
}

/// Pearson correlation; `None` if either side is constant, where the correlation is undefined.
///
/// # Errors
/// As [`accuracy`], and if a value is not finite.
pub fn pearson(a: &[f64], b: &[f64]) -> Result<Option<f64>> {
    check_numbers(a, b)?;
    let constant = |v: &[f64]| v.iter().all(|x| *x == v[0]);
    if constant(a) || constant(b) {
        return Ok(None);
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (x, y) = (x - ma, y - mb);
        (ab, aa, bb) = (ab + x * y, aa + x * x, bb + y * y);
    }
    let r = ab / (f64::sqrt(aa) * f64::sqrt(bb));
    Ok(r.is_finite().then(|| r.clamp(-1.0, 1.0)))
}

/// Spearman correlation: the Pearson correlation of the ranks, where ties share their mean rank.
///
/// # Errors
/// As [`pearson`].
pub fn spearman(a: &[f64], b: &[f64]) -> Result<Option<f64>> {
    check_numbers(a, b)?;
    pearson(&ranks(a), &ranks(b))
}

/// Mean of `-ln p` of the labels, in nats. Probabilities are not clamped: a label of probability 0 makes the
/// result infinite.
///
/// # Errors
/// As [`Metrics::classification`].
pub fn nll(probabilities: &[Vec<f64>], labels: &[u32]) -> Result<f64> {
    check_probabilities(probabilities, labels)?;
    let sum: f64 = probabilities.iter().zip(labels).map(|(p, l)| p[*l as usize].ln()).sum();
    Ok(0.0 - sum / labels.len() as f64)
}

/// Expected calibration error (Guo et al. 2017), as a fraction: the gap between accuracy and mean top
/// probability in each of [`ECE_BINS`] bins `(lo, hi]` of equal width, weighted by the bin's rows.
///
/// # Errors
/// As [`Metrics::classification`].
pub fn ece(probabilities: &[Vec<f64>], labels: &[u32]) -> Result<f64> {
    check_probabilities(probabilities, labels)?;
    let mut gaps = [0.0; ECE_BINS];
    for (p, l) in probabilities.iter().zip(labels) {
        let class = argmax(p);
        gaps[confidence_bin(p[class])] += f64::from(u8::from(class == *l as usize)) - p[class];
    }
    Ok(gaps.iter().map(|gap: &f64| gap.abs()).sum::<f64>() / labels.len() as f64)
}

/// Brier score: squared distance between the probabilities and the one-hot label, summed over classes,
/// averaged over rows.
///
/// # Errors
/// As [`Metrics::classification`].
pub fn brier(probabilities: &[Vec<f64>], labels: &[u32]) -> Result<f64> {
    check_probabilities(probabilities, labels)?;
    let hit = |c: usize, l: u32| f64::from(u8::from(c == l as usize));
    let row =
        |(p, l): (&Vec<f64>, &u32)| p.iter().enumerate().map(|(c, p)| (p - hit(c, *l)).powi(2)).sum::<f64>();
    Ok(probabilities.iter().zip(labels).map(row).sum::<f64>() / labels.len() as f64)
}

/// Mean squared error.
///
/// # Errors
/// As [`pearson`].
pub fn mse(predictions: &[f64], targets: &[f64]) -> Result<f64> {
    check_numbers(predictions, targets)?;
    let sum: f64 = predictions.iter().zip(targets).map(|(p, t)| (p - t).powi(2)).sum();
    Ok(sum / targets.len() as f64)
}

/// Returns the index of the first of the largest entries. Comparisons with NaN are false: a NaN is never
/// chosen, except that a row that begins with NaN gives 0.
pub(crate) fn argmax(row: &[f64]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

/// Returns ranks from 1; equal values share their mean rank.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|i, j| values[*i].total_cmp(&values[*j]));
    let (mut out, mut start) = (vec![0.0; values.len()], 0);
    for tied in order.chunk_by(|i, j| values[*i] == values[*j]) {
        let rank = start as f64 + (tied.len() as f64 + 1.0) / 2.0;
        tied.iter().for_each(|i| out[*i] = rank);
        start += tied.len();
    }
    out
}

fn same_length(predictions: usize, labels: usize) -> Result<()> {
    match (predictions, labels) {
        (0, 0) => Err(Error::config("predictions", "there is no row to score")),
        (p, l) if p != l => Err(Error::config("predictions", format!("{p} predictions for {l} labels"))),
        _ => Ok(()),
    }
}

fn check_numbers(a: &[f64], b: &[f64]) -> Result<()> {
    same_length(a.len(), b.len())?;
    match a.iter().zip(b).enumerate().find(|(_, (x, y))| !(x.is_finite() && y.is_finite())) {
        Some((row, (x, y))) => {
            Err(Error::config("predictions", format!("row {row}: prediction {x}, target {y}")))
        }
        None => Ok(()),
    }
}

/// Checks the rows and labels and returns the number of classes.
fn check_probabilities(probabilities: &[Vec<f64>], labels: &[u32]) -> Result<usize> {
    same_length(probabilities.len(), labels.len())?;
    let classes = probabilities[0].len();
    for (row, (p, label)) in probabilities.iter().zip(labels).enumerate() {
        if p.len() != classes || classes < 2 {
            let reason = format!("row {row}: {} classes, row 0: {classes}; at least 2 needed", p.len());
            return Err(Error::config("probabilities", reason));
        }
        if let Some(bad) = p.iter().find(|p| !(0.0..=1.0 + 1e-6).contains(*p)) {
            return Err(Error::config("probabilities", format!("row {row}: {bad} is no probability")));
        }
        if *label as usize >= classes {
            return Err(Error::config("labels", format!("row {row}: label {label} of {classes} classes")));
        }
    }
    Ok(classes)
}

#[cfg(test)]
mod tests;
