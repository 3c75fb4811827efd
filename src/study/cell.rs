//! One cell of a grid: what it runs, what it found, and what it cost.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::metrics::Metrics;

/// A method and a way to predict with it; in a plan `lora (mean)`, as tables call it.
pub(super) type Arm = (String, String);

/// What a cell runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellKey {
    /// The task's name; that of the training data where several tasks are measured.
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
    /// What was found on each task, where one training is measured on several: then `arms` and
    /// `reliability` are empty.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<String, TaskResult>,
    /// AUROC of telling rows of another task from those of this one, by arm and score.
    pub ood: BTreeMap<String, f64>,
    /// Scalars that were trained.
    pub trainable_parameters: usize,
    /// Optimiser steps.
    pub steps: usize,
}

/// What a cell found on one of the tasks that it was measured on.
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
    /// That of a cell which nothing is known of yet.
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

    /// Forgets what was measured, but not on which tasks: there, too, the cell went wrong.
    pub(super) fn forget_measurements(&mut self) {
        self.arms.clear();
        self.reliability.clear();
        self.ood.clear();
        for task in self.tasks.values_mut() {
            task.arms.clear();
            task.reliability.clear();
        }
    }

    /// The result as one of each task that it was measured on: what tables and pictures compare. One of
    /// a single task is its own.
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
