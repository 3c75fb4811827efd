//! One cell of a grid: its key, its result and its cost.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::metrics::Metrics;

/// The task, method and hyperparameters of a cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellKey {
    /// The task's name, or the training data's name if several tasks are measured.
    pub task: String,
    /// The recipe's text.
    pub method: String,
    /// The peak learning rate.
    pub lr: f64,
    /// The number of rows per batch.
    pub batch_size: usize,
    /// The seed of all random numbers.
    pub seed: u64,
}

impl CellKey {
    /// The name of the cell's folder within the study's folder: `mrpc-lora-lr0.0003-bs32-s1`.
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
    /// All measurements are complete.
    Done,
    /// A loss, gradient or prediction was not finite.
    Diverged,
    /// Another error, described by the reason.
    Failed,
}

/// A bin of a reliability diagram: the rows whose highest probability lies in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// The number of rows.
    pub count: usize,
    /// Their mean highest probability.
    pub confidence: f64,
    /// The fraction of correct rows.
    pub accuracy: f64,
}

/// The result of a cell. Repeated runs on the same machine give the same bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellResult {
    /// The cell's key.
    pub key: CellKey,
    /// How the cell ended.
    pub status: Status,
    /// The error, unless the cell is done.
    pub reason: Option<String>,
    /// The task's primary metric.
    pub metric: String,
    /// The scores of every way to predict with the trained model, by treatment (`mean`, `10 draws`,
    /// `temperature` ...).
    pub arms: BTreeMap<String, Metrics>,
    /// The training loss of the task by step, at most 200 points.
    pub losses: Vec<(usize, f64)>,
    /// Reliability diagrams, by treatment.
    pub reliability: BTreeMap<String, Vec<Bin>>,
    /// The result on each task, if one training is measured on several; `arms` and `reliability` are then
    /// empty.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, TaskResult>,
    /// The AUROC of telling rows of another task from rows of this task, by treatment and score.
    pub ood: BTreeMap<String, f64>,
    /// The number of trained scalars.
    pub trainable_parameters: usize,
    /// The number of optimiser steps.
    pub steps: usize,
}

/// The result of a cell on one of several measured tasks.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// The task's primary metric.
    pub metric: String,
    /// As [`CellResult::arms`].
    pub arms: BTreeMap<String, Metrics>,
    /// As [`CellResult::reliability`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub reliability: BTreeMap<String, Vec<Bin>>,
}

impl CellResult {
    /// The result of a cell before anything is measured.
    pub(super) fn begun(key: &CellKey, metric: &str) -> Self {
        Self {
            key: key.clone(),
            status: Status::Done,
            reason: None,
            metric: metric.to_string(),
            arms: BTreeMap::new(),
            losses: Vec::new(),
            reliability: BTreeMap::new(),
            tasks: BTreeMap::new(),
            ood: BTreeMap::new(),
            trainable_parameters: 0,
            steps: 0,
        }
    }

    /// Removes all measurements but keeps the names of the tasks, on all of which the cell failed.
    pub(super) fn forget_measurements(&mut self) {
        self.arms.clear();
        self.reliability.clear();
        self.ood.clear();
        for task in self.tasks.values_mut() {
            task.arms.clear();
            task.reliability.clear();
        }
    }

    /// Splits the result into one per measured task, as tables and plots compare them. A result on a single
    /// task stays as it is.
    pub fn by_task(&self) -> Vec<Self> {
        if self.tasks.is_empty() {
            return vec![self.clone()];
        }
        let of_task = |(name, found): (&String, &TaskResult)| Self {
            key: CellKey { task: name.clone(), ..self.key.clone() },
            metric: found.metric.clone(),
            arms: found.arms.clone(),
            reliability: found.reliability.clone(),
            tasks: BTreeMap::new(),
            ..self.clone()
        };
        self.tasks.iter().map(of_task).collect()
    }
}

/// The cost of a cell. It differs from run to run and is therefore stored in its own file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellCost {
    /// The wall time of training, in seconds.
    pub seconds: f64,
    /// The median wall time of a step, in seconds.
    pub step_seconds_median: f64,
    /// The peak resident memory of the process so far, in megabytes.
    pub peak_rss_mb: Option<f64>,
}
