//! The figures of every arm on every task, over the cells that are done.

use std::collections::BTreeMap;

use super::super::cell::{CellResult, Status};
use super::arm::{arms, Arm};
use super::pairs::spread;
use crate::metrics::{median, quantile};

/// The cells of one arm on one task.
#[derive(Debug, Default)]
pub(super) struct ArmFigures {
    pub metric: String,
    scores: Vec<f64>,
    nll: Vec<f64>,
    ece: Vec<f64>,
    brier: Vec<f64>,
    pub done: usize,
    pub diverged: usize,
    pub failed: usize,
}

/// The figures by task and arm.
pub(super) fn rows(cells: &[CellResult]) -> BTreeMap<(String, Arm), ArmFigures> {
    let mut rows: BTreeMap<(String, Arm), ArmFigures> =
        arms(cells).into_iter().map(|key| (key, ArmFigures::default())).collect();
    for ((task, Arm { method, treatment }), row) in &mut rows {
        for cell in cells.iter().filter(|cell| cell.key.task == *task && cell.key.method == *method) {
            row.add(cell, treatment);
        }
    }
    rows
}

impl ArmFigures {
    fn add(&mut self, cell: &CellResult, treatment: &str) {
        self.metric.clone_from(&cell.metric);
        match cell.status {
            Status::Done => self.done += 1,
            Status::Diverged => self.diverged += 1,
            Status::Failed => self.failed += 1,
        }
        let metrics = cell.arms.get(treatment).filter(|_| cell.status == Status::Done);
        let Some(metrics) = metrics else { return };
        self.scores.extend(metrics.get(&cell.metric));
        self.nll.extend(metrics.nll);
        self.ece.extend(metrics.ece);
        self.brier.extend(metrics.brier);
    }

    fn best(&self) -> f64 {
        quantile(&self.scores, 1.0)
    }

    fn quartile_range(&self) -> f64 {
        quantile(&self.scores, 0.75) - quantile(&self.scores, 0.25)
    }

    /// Best, median (the paper's extrinsic robustness), spread, inter-quartile range, intrinsic
    /// robustness (1 / median NLL), and the medians of NLL, ECE and Brier.
    pub fn figures(&self) -> [f64; 8] {
        let nll = median(&self.nll);
        [
            self.best(),
            median(&self.scores),
            spread(&self.scores),
            self.quartile_range(),
            nll.recip(),
            nll,
            median(&self.ece),
            median(&self.brier),
        ]
    }
}

/// The names of [`ArmFigures::figures`].
pub(super) const FIGURES: [&str; 8] = ["best", "median", "spread", "IQR", "1/NLL", "NLL", "ECE", "Brier"];
