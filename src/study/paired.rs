//! Compares two arms on the rows that both measured: differences of scores, paired by task, seed, learning
//! rate, batch size and row.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::cell::{CellKey, CellResult, Status};
use super::rows::CellRows;
use super::stats::{two_level, PairedTask, TwoLevel};
use crate::error::{Error, Result};
use crate::metrics::{argmax, confidence_bin, ConfidenceBins};
use crate::noise::Noise;

/// The number of bootstrap resamples, which gives the standard error to within 1.6 %.
const RESAMPLES: usize = 2000;

/// A score over rows by which two arms are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowScore {
    /// The mean `-ln p` of the labels.
    Nll,
    /// The debiased expected calibration error ([`crate::metrics::ece_debiased`]).
    Ece,
    /// The Brier score, summed over classes.
    Brier,
    /// The fraction of correct rows.
    Accuracy,
}

impl RowScore {
    /// All scores.
    pub const ALL: [Self; 4] = [Self::Nll, Self::Ece, Self::Brier, Self::Accuracy];

    /// Whether a lower value is better.
    pub const fn lower_is_better(self) -> bool {
        !matches!(self, Self::Accuracy)
    }
}

impl fmt::Display for RowScore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nll => "NLL",
            Self::Ece => "ECE, debiased",
            Self::Brier => "Brier",
            Self::Accuracy => "accuracy",
        })
    }
}

/// The scores of one arm of a cell, row by row.
#[derive(Debug)]
pub(super) struct RowScores {
    nll: Vec<f64>,
    brier: Vec<f64>,
    right: Vec<bool>,
    confidence: Vec<f64>,
    bin: Vec<usize>,
}

impl RowScores {
    fn new(rows: &CellRows, treatment: &str) -> Option<Self> {
        let (probabilities, classes) = rows.probabilities(treatment)?;
        let mut scores = Self {
            nll: Vec::new(),
            brier: Vec::new(),
            right: Vec::new(),
            confidence: Vec::new(),
            bin: Vec::new(),
        };
        let logs = rows.arms.get(treatment)?;
        for ((p, log), label) in probabilities.chunks(classes).zip(logs.chunks(classes)).zip(&rows.label) {
            let label = *label as usize;
            let top = argmax(p);
            let hit = |class: usize| f64::from(u8::from(class == label));
            scores.nll.push(-f64::from(log[label]));
            scores.brier.push(p.iter().enumerate().map(|(class, p)| (p - hit(class)).powi(2)).sum());
            scores.right.push(top == label);
            scores.confidence.push(p[top]);
            scores.bin.push(confidence_bin(p[top]));
        }
        Some(scores)
    }

    /// A score over the weighted rows.
    fn score(&self, score: RowScore, weights: &[f64]) -> f64 {
        match score {
            RowScore::Nll => mean(self.nll.iter().copied(), weights),
            RowScore::Brier => mean(self.brier.iter().copied(), weights),
            RowScore::Accuracy => mean(self.right.iter().map(|right| f64::from(u8::from(*right))), weights),
            RowScore::Ece => {
                let mut bins = ConfidenceBins::default();
                for (i, weight) in weights.iter().enumerate() {
                    bins.add(self.bin[i], self.confidence[i], self.right[i], *weight);
                }
                bins.debiased()
            }
        }
    }

    /// A score over the rows with weight 1.
    pub fn plain(&self, score: RowScore) -> f64 {
        self.score(score, &vec![1.0; self.nll.len()])
    }
}

fn mean(values: impl Iterator<Item = f64>, weights: &[f64]) -> f64 {
    // A row with weight 0 may have an infinite value.
    let weighted = values.zip(weights).filter(|(_, w)| **w > 0.0).map(|(v, w)| v * w);
    weighted.sum::<f64>() / weights.iter().sum::<f64>()
}

/// Two arms in one setting (learning rate and batch size).
type Pair = [RowScores; 2];

/// The settings that are done in both arms, with their rows.
#[derive(Debug)]
pub(super) struct PairedRows {
    /// The pairs by task and seed.
    tasks: BTreeMap<String, BTreeMap<u64, Vec<Pair>>>,
}

impl PairedRows {
    /// The settings of the cells for which `wanted` is true.
    ///
    /// # Errors
    /// If two cells of a task were not measured on the same rows; the error names one.
    pub fn new(
        cells: &[CellResult],
        rows: &BTreeMap<String, CellRows>,
        [own, other]: [&Arm; 2],
        wanted: impl Fn(&CellKey) -> bool,
    ) -> Result<Self> {
        let mut tasks: BTreeMap<String, BTreeMap<u64, Vec<Pair>>> = BTreeMap::new();
        let mut measured: BTreeMap<&str, &CellRows> = BTreeMap::new();
        let done = |cell: &&CellResult| cell.status == Status::Done && wanted(&cell.key);
        for cell in cells.iter().filter(done).filter(|cell| cell.key.method == own.method) {
            let partner = CellKey { method: other.method.clone(), ..cell.key.clone() };
            if !cells.iter().filter(done).any(|cell| cell.key == partner) {
                continue;
            }
            let names = [cell.key.folder_name(), partner.folder_name()];
            let [Some(first), Some(second)] = names.each_ref().map(|name| rows.get(name)) else { continue };
            let task = measured.entry(&cell.key.task).or_insert(first);
            for (name, kept) in names.iter().zip([first, second]) {
                if (&kept.row, &kept.label) != (&task.row, &task.label) {
                    let reason =
                        format!("{name} was not measured on the rows of the other cells of its task");
                    return Err(Error::config("rows", reason));
                }
            }
            let pair = [RowScores::new(first, &own.treatment), RowScores::new(second, &other.treatment)];
            if let [Some(first), Some(second)] = pair {
                let seeds = tasks.entry(cell.key.task.clone()).or_default();
                seeds.entry(cell.key.seed).or_default().push([first, second]);
            }
        }
        Ok(Self { tasks })
    }

    /// The tasks with a pair.
    pub fn tasks(&self) -> impl Iterator<Item = &str> {
        self.tasks.keys().map(String::as_str)
    }

    /// The smallest number of seeds of a task.
    pub fn seeds(&self) -> usize {
        self.tasks.values().map(BTreeMap::len).min().unwrap_or(0)
    }

    /// The number of settings.
    pub fn settings(&self) -> usize {
        self.tasks.values().flat_map(BTreeMap::values).map(Vec::len).sum()
    }

    /// The differences of a score on a task, one per setting.
    pub fn differences(&self, task: &str, score: RowScore) -> Vec<f64> {
        let pairs = self.tasks.get(task).into_iter().flat_map(BTreeMap::values).flatten();
        pairs.map(|[own, other]| own.plain(score) - other.plain(score)).collect()
    }

    /// The mean difference of a score on each task, as in [`Self::difference`]: over the settings of a seed,
    /// then over seeds.
    pub fn by_task(&self, score: RowScore) -> Vec<(String, f64)> {
        let of_task = |seeds: &BTreeMap<u64, Vec<Pair>>| {
            let of_seed = |pairs: &Vec<Pair>| mean_difference(pairs, |rows| rows.plain(score));
            seeds.values().map(of_seed).sum::<f64>() / seeds.len() as f64
        };
        self.tasks.iter().map(|(task, seeds)| (task.clone(), of_task(seeds))).collect()
    }

    /// Bootstraps the mean difference own - other of a score: the mean over the settings of a seed, then over
    /// the seeds of a task, then over tasks. The resamples do not depend on the arms, so that comparisons use
    /// the same ones.
    pub fn difference(&self, score: RowScore) -> Option<TwoLevel> {
        let mut tasks = Vec::new();
        for seeds in self.tasks.values() {
            let (rows, count) = (seeds.values().next()?.first()?[0].nll.len(), seeds.len());
            let differences = move |weights: &[f64]| {
                let of_seed = |pairs: &Vec<Pair>| mean_difference(pairs, |rows| rows.score(score, weights));
                seeds.values().map(of_seed).collect::<Vec<f64>>()
            };
            tasks.push(PairedTask { rows, seeds: count, differences: Box::new(differences) });
        }
        two_level(&tasks, RESAMPLES, Noise::new(0))
    }
}

/// The mean difference own - other of a score over pairs.
fn mean_difference(pairs: &[Pair], score: impl Fn(&RowScores) -> f64) -> f64 {
    pairs.iter().map(|[own, other]| score(own) - score(other)).sum::<f64>() / pairs.len() as f64
}

/// The scores of one cell in one treatment, if the cell kept its rows.
pub(super) fn row_scores(
    rows: &BTreeMap<String, CellRows>,
    key: &CellKey,
    treatment: &str,
) -> Option<RowScores> {
    RowScores::new(rows.get(&key.folder_name())?, treatment)
}
