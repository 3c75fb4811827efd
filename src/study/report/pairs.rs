//! Pairs of two arms in the same settings: only settings that both have are compared.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::cell::{CellResult, Status};
use super::super::stats::wilcoxon;
use super::arm::{of_any_task, settings_of, Arm};
use crate::metrics::{median, quantile, Metrics};

/// A score of a cell in one arm.
pub(super) type Score = fn(&CellResult, &Metrics) -> Option<f64>;

/// The task's own metric.
pub(super) const METRIC: Score = |cell, metrics| metrics.get(&cell.metric);
/// The negative log-likelihood.
pub(super) const NLL: Score = |_, metrics| metrics.nll;
/// The expected calibration error.
pub(super) const ECE: Score = |_, metrics| metrics.ece;

/// A cell that is done, in one arm.
type Scored<'a> = (&'a CellResult, &'a Metrics);

/// Two arms in the settings (task, learning rate, batch size, seed) that are done in both. A diverged cell
/// also removes its partner, so that a bad setting that only one arm survives does not move a median.
pub(super) struct Pairs<'a>(BTreeMap<&'a str, Vec<[Scored<'a>; 2]>>);

impl<'a> Pairs<'a> {
    pub fn new(cells: &'a [CellResult], arm: &Arm, other: &Arm) -> Self {
        let of = |arm: &Arm| -> BTreeMap<String, Scored<'a>> {
            let done = cells.iter().filter(|c| c.status == Status::Done && c.key.method == arm.method);
            let scored =
                |cell: &'a CellResult| Some((settings_of(&cell.key), (cell, cell.arms.get(&arm.treatment)?)));
            done.filter_map(scored).collect()
        };
        let (own, others) = (of(arm), of(other));
        let mut pairs: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (settings, own) in own {
            if let Some(other) = others.get(&settings) {
                pairs.entry(&own.0.key.task).or_default().push([own, *other]);
            }
        }
        Self(pairs)
    }

    /// The tasks with a pair.
    pub fn tasks(&self) -> impl Iterator<Item = &'a str> + '_ {
        self.0.keys().copied()
    }

    /// A score on a task in both arms, one per setting.
    pub fn scores(&self, task: &str, score: Score) -> [Vec<f64>; 2] {
        let both = |pair: &[Scored; 2]| {
            let [own, other] = pair.map(|(cell, metrics)| score(cell, metrics));
            own.zip(other)
        };
        let (own, others) = self.0.get(task).into_iter().flatten().filter_map(both).unzip();
        [own, others]
    }

    /// The differences of a score, over the settings of all tasks.
    pub fn over_cells(&self, score: Score) -> Vec<f64> {
        self.tasks().flat_map(|task| differences(&self.scores(task, score))).collect()
    }

    /// The differences of a figure (such as the median) of each task's scores.
    pub fn over_tasks(&self, score: Score, figure: fn(&[f64]) -> f64) -> Vec<f64> {
        let of_task = |task| {
            let [own, other] = self.scores(task, score).map(|scores| figure(&scores));
            difference(own, other)
        };
        self.tasks().map(of_task).collect()
    }
}

/// A difference of scores, rounded so that 0.85 - 0.80 and 0.80 - 0.75 are equal.
pub(super) fn difference(own: f64, other: f64) -> f64 {
    const DIGITS: f64 = 1e12;
    ((own - other) * DIGITS).round() / DIGITS
}

/// The differences of scores in the same settings.
pub(super) fn differences([own, others]: &[Vec<f64>; 2]) -> Vec<f64> {
    own.iter().zip(others).map(|(own, other)| difference(*own, *other)).collect()
}

/// Best - worst.
pub(super) fn spread(scores: &[f64]) -> f64 {
    quantile(scores, 1.0) - quantile(scores, 0.0)
}

/// The signed-rank test of the differences that are not NaN. A missing score and two infinite NLLs give NaN.
pub(super) fn signed_rank_test(differences: &[f64]) -> String {
    let pairs: Vec<f64> = differences.iter().copied().filter(|difference| !difference.is_nan()).collect();
    let p = |p: f64| if p < 0.001 { format!("{p:.0e}") } else { format!("{p:.3}") };
    match wilcoxon(&pairs) {
        None if pairs.is_empty() => "no pair".to_string(),
        None => format!("{} equal pairs", pairs.len()),
        Some(test) => {
            format!("p {}, n {}, {:+.4} ({})", p(test.p), test.n, median(&pairs), p(test.least_p()))
        }
    }
}

/// The section of tests of the tested arm against every other: over tasks, and over cells with the same
/// settings.
pub(super) fn signed_ranks(cells: &[CellResult], tested: &Arm) -> String {
    let mut text = format!(
        "\n## Wilcoxon signed-rank tests: {tested} against each other\n\nTwo-sided p, with the number n of \
         differences that are not zero, their median (positive: {tested} is higher), and in brackets the least p \
         that n can give. A setting counts where both are done.\n\n| against | median over tasks | NLL over \
         tasks | spread over tasks | metric over cells | NLL over cells |\n|---|---|---|---|---|---|\n"
    );
    for other in of_any_task(cells).iter().filter(|arm| *arm != tested) {
        let pairs = Pairs::new(cells, tested, other);
        let columns = [
            pairs.over_tasks(METRIC, median),
            pairs.over_tasks(NLL, median),
            pairs.over_tasks(METRIC, spread),
            pairs.over_cells(METRIC),
            pairs.over_cells(NLL),
        ];
        let columns = columns.map(|differences| signed_rank_test(&differences)).join(" | ");
        writeln!(text, "| {other} | {columns} |").ok();
    }
    text
}
