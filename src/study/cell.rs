//! One cell of a grid: what it runs, what it found, and what it cost.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::metrics::Metrics;

/// What a cell runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellKey {
    /// The task's name.
    pub task: String,
    /// The recipe.
    pub method: String,
    /// The highest learning rate.
    pub lr: f64,
    /// Rows of a batch.
    pub batch_size: usize,
    /// The seed of everything random.
    pub seed: u64,
}

impl CellKey {
    /// The cell's folder below that of its study: `mrpc-lora-lr0.0003-bs32-s1`.
    pub fn folder_name(&self) -> String {
        let plain = |text: &str| -> String {
            let fits = |c: char| c.is_ascii_alphanumeric() || "-_.=,".contains(c);
            text.chars().map(|c| if fits(c) { c } else { '_' }).collect()
        };
        let (task, method) = (plain(&self.task), plain(&self.method));
        format!("{task}-{method}-lr{}-bs{}-s{}", self.lr, self.batch_size, self.seed)
    }
}

/// How a cell ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// With every measurement.
    Done,
    /// A loss, gradient or prediction was not finite.
    Diverged,
    /// Otherwise: the reason says how.
    Failed,
}

/// A bin of a reliability diagram: rows whose highest probability lies in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// How many rows.
    pub count: usize,
    /// Their mean highest probability.
    pub confidence: f64,
    /// The share of them that is right.
    pub accuracy: f64,
}

/// What a cell found: the same bytes whenever it runs on the same machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellResult {
    /// What was run.
    pub key: CellKey,
    /// How it ended.
    pub status: Status,
    /// Why it did not end well.
    pub reason: Option<String>,
    /// The task's primary metric.
    pub metric: String,
    /// Every way to predict with what was trained (`mean`, `10 draws`, `temperature` ...) and its scores.
    pub arms: BTreeMap<String, Metrics>,
    /// The training loss of the task by step, 200 points at most.
    pub losses: Vec<(usize, f64)>,
    /// Reliability diagrams, by arm.
    pub reliability: BTreeMap<String, Vec<Bin>>,
    /// AUROC of telling rows of another task from those of this one, by arm and score.
    pub ood: BTreeMap<String, f64>,
    /// Scalars that were trained.
    pub trainable_parameters: usize,
    /// Optimiser steps.
    pub steps: usize,
}

/// What a cell cost: another figure each time, and so a file of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellCost {
    /// Wall time of training.
    pub seconds: f64,
    /// The median wall time of a step.
    pub step_seconds_median: f64,
    /// Peak resident memory of the process so far, in megabytes.
    pub peak_rss_mb: Option<f64>,
}
