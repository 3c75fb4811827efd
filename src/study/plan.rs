//! The plan of a study, written before it is run: what is trained, which comparisons are tested together, and
//! what counts as success.

mod check;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::arm::Arm;
use super::cell::CellKey;
use super::grid::Grid;
use super::paired::RowScore;
use super::per_task::PerTask;
use super::recipe::Recipe;
use super::treatments;
use crate::data::task::Task;
use crate::error::{Error, Result};
use crate::util::json;

/// A study as a JSON file. Optional are `limit_train` and `limit_dev` (default: all rows), `max_length`
/// (128), `foreign_task`, `families` and `success` (none). Every other field is required, and an unknown
/// field is an error.
///
/// ```json
/// {
///   "name": "few rows", "model": "all-minilm-l6-v2", "tasks": ["sst2", "mrpc"],
///   "methods": [
///     {"recipes": ["lora", "lora:held-out=0.15", "monteclora"], "lrs": [3e-4, 1e-3]},
///     {"recipes": ["dora"], "lrs": [1e-3]}
///   ],
///   "batch_sizes": [32], "seeds": [1, 2, 3], "limit_train": 400, "epochs": "20,mrpc=15", "draws": 5,
///   "families": {
///     "primary": [{"arm": "monteclora (5 draws)", "against": "lora (mean)", "scores": ["nll", "ece"]}]
///   },
///   "success": [
///     {"better": {"family": "primary", "p": 0.05}},
///     {"sensitivity": {"arm": "monteclora (mean)", "against": "lora (mean)", "most": 0.5, "of": "variance"}},
///     {"not_worse": {"arm": "monteclora (mean)", "against": "lora (mean)", "score": "accuracy", "lr": 3e-4, "by": 0.02}}
///   ]
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The study's name in the report.
    pub name: String,
    /// The last part of the model's folder or repository.
    pub model: String,
    /// The names of the tasks.
    pub tasks: Vec<String>,
    /// The methods, with the learning rates at which they run.
    pub methods: Vec<Methods>,
    /// The batch sizes.
    pub batch_sizes: Vec<usize>,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// The number of training rows per seed; all if absent.
    #[serde(default)]
    pub limit_train: PerTask<usize>,
    /// The number of measured rows; all if absent.
    #[serde(default)]
    pub limit_dev: Option<usize>,
    /// The number of passes over the training rows, required for every task.
    pub epochs: PerTask<usize>,
    /// The maximum number of tokens per row.
    #[serde(default = "max_length")]
    pub max_length: usize,
    /// The number of posterior draws and of MC dropout passes.
    pub draws: usize,
    /// For a task, another task whose rows its uncertainty should recognise as out of domain.
    #[serde(default)]
    pub foreign_task: PerTask<Task>,
    /// Families of tests by name. Holm's correction applies within each family.
    #[serde(default)]
    pub families: BTreeMap<String, Vec<Comparison>>,
    /// The criteria of success, all of which must hold.
    #[serde(default)]
    pub success: Vec<Criterion>,
}

fn max_length() -> usize {
    128
}

/// Recipes that run at the same learning rates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Methods {
    /// The recipes.
    pub recipes: Vec<String>,
    /// The learning rates.
    pub lrs: Vec<f64>,
}

/// A comparison of two arms, with one test per score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// The arm that should be better, such as `lora (mean)`.
    pub arm: Arm,
    /// The arm that it is compared with.
    pub against: Arm,
    /// The scores to test.
    pub scores: Vec<RowScore>,
}

/// A criterion of success.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Criterion {
    /// Every test of a family finds its arm better, with a corrected p-value below `p`.
    Better {
        /// The family's name.
        family: String,
        /// The significance level, which the corrected p-values must be below.
        p: f64,
    },
    /// The NLL of `arm` varies over learning rates at most `most` times as much as that of `against`.
    Sensitivity {
        /// The arm that should depend less on the learning rate.
        arm: Arm,
        /// The arm that it is compared with.
        against: Arm,
        /// The largest allowed ratio.
        most: f64,
        /// The quantity that the ratio compares.
        of: Variation,
    },
    /// A score, at one learning rate or at all, is at most `by` worse in the mean over tasks: with its whole
    /// 95 % interval, and undecided if only the estimate is.
    NotWorse {
        /// The arm.
        arm: Arm,
        /// The arm that it is compared with.
        against: Arm,
        /// The score.
        score: RowScore,
        /// The learning rate; all if left out.
        #[serde(default)]
        lr: Option<f64>,
        /// How much worse the score may be.
        by: f64,
    },
}

/// The quantity that a ratio of sensitivities compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variation {
    /// Variances within task, seed and batch size.
    Variance,
    /// The square roots of these variances.
    Deviation,
}

impl Plan {
    /// Reads a plan and its checksum, the CRC-32 of the file in hexadecimal.
    ///
    /// # Errors
    /// If the file cannot be read, is not a plan, or is inconsistent: an unknown task, recipe, arm or family,
    /// a task without epochs, a method twice at one rate, or an empty list.
    pub fn read(path: &Path) -> Result<(Self, String)> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let crc = format!("{:08x}", crc32fast::hash(text.as_bytes()));
        let plan: Self = json::parse(text, path)?;
        plan.check().map_err(|error| Error::format(path, error.to_string()))?;
        Ok((plan, crc))
    }

    /// The result of [`Plan::read`] from the settings of a study; `None` if the study has no plan.
    ///
    /// # Errors
    /// If the plan in the settings is invalid, as for [`Plan::read`].
    pub(super) fn of_settings(settings: &Value, path: &Path) -> Result<Option<(Self, String)>> {
        let (Some(plan), Some(crc)) = (settings.get("plan"), settings.get("plan_crc32")) else {
            return Ok(None);
        };
        let plan: Self =
            serde_json::from_value(plan.clone()).map_err(|e| Error::format(path, format!("plan: {e}")))?;
        plan.check().map_err(|error| Error::format(path, error.to_string()))?;
        Ok(Some((plan, crc.as_str().unwrap_or_default().to_string())))
    }

    /// The settings of the study, on which all of its cells depend: the plan and its checksum.
    pub fn settings(&self, crc: &str) -> Result<Value> {
        let plan = serde_json::to_value(self).map_err(|e| Error::config("plan", e.to_string()))?;
        Ok(serde_json::json!({ "plan": plan, "plan_crc32": crc }))
    }

    /// The tasks.
    ///
    /// # Errors
    /// If a task is unknown.
    pub fn tasks(&self) -> Result<Vec<Task>> {
        self.tasks.iter().map(|name| name.parse()).collect()
    }

    /// The cells of the plan, in the order of the grid of all methods and rates.
    ///
    /// # Errors
    /// As [`Grid::cells`].
    pub fn cells(&self) -> Result<Vec<CellKey>> {
        let (mut methods, mut lrs): (Vec<String>, Vec<f64>) = (Vec::new(), Vec::new());
        for group in &self.methods {
            methods.extend(
                group.recipes.iter().filter(|name| !methods.contains(name)).cloned().collect::<Vec<_>>(),
            );
            lrs.extend(group.lrs.iter().filter(|lr| !lrs.contains(lr)).copied().collect::<Vec<_>>());
        }
        let Self { batch_sizes, seeds, .. } = self.clone();
        // Use the canonical names, however the plan spells them.
        let tasks = self.tasks()?.into_iter().map(|task| task.name().to_string()).collect();
        let mut cells = Grid { tasks, methods, lrs, batch_sizes, seeds }.cells()?;
        cells.retain(|key| self.runs(&key.method, key.lr) > 0);
        Ok(cells)
    }

    /// How often the plan has a method at a learning rate.
    fn runs(&self, method: &str, lr: f64) -> usize {
        let has =
            |group: &&Methods| group.recipes.iter().any(|name| name == method) && group.lrs.contains(&lr);
        self.methods.iter().filter(has).count()
    }

    /// The learning rates at which the methods of two arms both run, each once.
    fn shared(&self, own: &Arm, other: &Arm) -> Vec<f64> {
        let mut shared: Vec<f64> = Vec::new();
        for lr in self.methods.iter().flat_map(|group| &group.lrs) {
            let both = [own, other].iter().all(|arm| self.runs(&arm.method, *lr) > 0);
            if both && !shared.contains(lr) {
                shared.push(*lr);
            }
        }
        shared
    }

    /// The tested arm: that of the first comparison of the first family named by a [`Criterion::Better`];
    /// `None` if there is no such criterion.
    pub(super) fn tested(&self) -> Option<Arm> {
        let family = self.success.iter().find_map(|criterion| match criterion {
            Criterion::Better { family, .. } => self.families.get(family),
            _ => None,
        })?;
        Some(family.first()?.arm.clone())
    }

    /// Every arm of the plan's methods.
    fn arms(&self) -> Result<BTreeSet<Arm>> {
        let mut arms = BTreeSet::new();
        for method in self.methods.iter().flat_map(|group| &group.recipes) {
            let recipe: Recipe = method.parse()?;
            let treatments = treatments::of_recipe(&recipe, self.draws).into_iter();
            arms.extend(treatments.map(|treatment| Arm::new(method, treatment)));
        }
        Ok(arms)
    }
}

#[cfg(test)]
mod tests;
