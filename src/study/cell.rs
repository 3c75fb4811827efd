//! One cell of a grid and what it leaves: `result.json` and `cost.json` in a folder of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::util::{files, json};

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

impl CellResult {
    /// The result of a cell below `dir`, if it has one.
    ///
    /// # Errors
    /// If it cannot be read, or is not that cell's.
    pub fn read(dir: &Path, key: &CellKey) -> Result<Option<Self>> {
        let path = dir.join(key.folder_name()).join("result.json");
        let found: Option<Self> = read(&path)?;
        match found {
            Some(result) if result.key != *key => {
                Err(Error::format(path, format!("expected the result of {key:?}, got {:?}", result.key)))
            }
            found => Ok(found),
        }
    }

    /// Writes `result.json` into the cell's folder below `dir`, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        write(&folder(dir, &self.key)?.join("result.json"), self)
    }
}

impl CellCost {
    /// The cost of a cell below `dir`, if it is known.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(dir: &Path, key: &CellKey) -> Result<Option<Self>> {
        read(&dir.join(key.folder_name()).join("cost.json"))
    }

    /// Writes `cost.json` into the cell's folder below `dir`, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, dir: &Path, key: &CellKey) -> Result<()> {
        write(&folder(dir, key)?.join("cost.json"), self)
    }
}

/// The results below `dir`, in the order of their folders' names.
///
/// # Errors
/// If the folder or a result cannot be read.
pub fn read_all(dir: &Path) -> Result<Vec<CellResult>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        paths.push(entry.map_err(Error::io(dir))?.path().join("result.json"));
    }
    paths.sort();
    paths.iter().filter_map(|path| read(path).transpose()).collect()
}

fn folder(dir: &Path, key: &CellKey) -> Result<PathBuf> {
    let folder = dir.join(key.folder_name());
    std::fs::create_dir_all(&folder).map_err(Error::io(&*folder))?;
    Ok(folder)
}

fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|e| Error::format(path, e.to_string()))?;
    files::write(path, format!("{text}\n").as_bytes())
}

/// A file's value; None where there is no file.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match std::fs::read_to_string(path) {
        Ok(text) => json::parse(text, path).map(Some),
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        Err(error) => Err(Error::io(path)(error)),
    }
}
