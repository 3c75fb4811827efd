//! A study written down before it is run: what is trained, which comparisons are tested together, and what
//! counts as success.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::cell::{Arm, CellKey};
use super::grid::Grid;
use super::paired::RowScore;
use super::per_task::PerTask;
use super::recipe::Recipe;
use super::treatments;
use crate::data::task::Task;
use crate::error::{Error, Result};
use crate::util::json;

/// A study as a JSON file says it. It may leave out `limit_train` and `limit_dev` (all rows), `max_length` (128),
/// `foreign_task`, `families` and `success` (none); every other field is required, and an unknown one is an error.
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
    /// What the report calls it.
    pub name: String,
    /// The last part of the model's folder or repository.
    pub model: String,
    /// The tasks by name.
    pub tasks: Vec<String>,
    /// Which methods run at which learning rates.
    pub methods: Vec<Methods>,
    /// Batch sizes.
    pub batch_sizes: Vec<usize>,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// Training rows of a seed; all where it is absent.
    #[serde(default)]
    pub limit_train: PerTask<usize>,
    /// Measured rows; all where it is absent.
    #[serde(default)]
    pub limit_dev: Option<usize>,
    /// Passes over the training rows; every task needs a number.
    pub epochs: PerTask<usize>,
    /// The most tokens of a row.
    #[serde(default = "max_length")]
    pub max_length: usize,
    /// Posterior draws, and passes of MC dropout.
    pub draws: usize,
    /// For a task another one, whose rows the uncertainty of its predictions should recognise as foreign.
    #[serde(default)]
    pub foreign_task: PerTask<Task>,
    /// Families of tests by name: each is corrected by Holm's procedure for itself.
    #[serde(default)]
    pub families: BTreeMap<String, Vec<Comparison>>,
    /// What must hold, all of it.
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

/// A comparison of two arms: a test for each score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// The arm that should be better, as `lora (mean)`.
    pub arm: String,
    /// The arm that it is compared with.
    pub against: String,
    /// The scores.
    pub scores: Vec<RowScore>,
}

/// A condition of success.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Criterion {
    /// Every test of a family finds its arm better, with a corrected p below the given one.
    Better {
        /// The family's name.
        family: String,
        /// The p that must not be reached.
        p: f64,
    },
    /// The NLL depends on the learning rate at most this much as strongly.
    Sensitivity {
        /// The arm that must not depend on it.
        arm: String,
        /// The arm that it is compared with.
        against: String,
        /// The largest ratio of the two.
        most: f64,
        /// What it is a ratio of.
        of: Variation,
    },
    /// A score, at one learning rate or at all, is at most so much worse, the mean over tasks.
    NotWorse {
        /// The arm.
        arm: String,
        /// The arm that it is compared with.
        against: String,
        /// The score.
        score: RowScore,
        /// The learning rate; all where it is left out.
        #[serde(default)]
        lr: Option<f64>,
        /// How much worse it may be.
        by: f64,
    },
}

/// What a ratio of sensitivities is one of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variation {
    /// Variances within task and seed.
    Variance,
    /// Their square roots.
    Deviation,
}

impl Plan {
    /// Reads a plan, and its checksum: the CRC-32 of the file, in hexadecimal.
    ///
    /// # Errors
    /// If the file cannot be read, is no plan, or does not fit together: a task, recipe, arm or family that
    /// there is not, a task without epochs, a method twice at one rate, or a list that is empty.
    pub fn read(path: &Path) -> Result<(Self, String)> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let crc = format!("{:08x}", crc32fast::hash(text.as_bytes()));
        let plan: Self = json::parse(text, path)?;
        plan.check().map_err(|error| Error::format(path, error.to_string()))?;
        Ok((plan, crc))
    }

    /// What [`Plan::read`] gave, from the settings of a study that it is the plan of.
    ///
    /// # Errors
    /// As [`Plan::read`].
    pub(super) fn of_settings(settings: &Value, path: &Path) -> Result<Option<(Self, String)>> {
        let (Some(plan), Some(crc)) = (settings.get("plan"), settings.get("plan_crc32")) else {
            return Ok(None);
        };
        let plan: Self =
            serde_json::from_value(plan.clone()).map_err(|e| Error::format(path, format!("plan: {e}")))?;
        plan.check().map_err(|error| Error::format(path, error.to_string()))?;
        Ok(Some((plan, crc.as_str().unwrap_or_default().to_string())))
    }

    /// What all of its cells depend on: the settings of the study.
    pub fn settings(&self, crc: &str) -> Result<Value> {
        let plan = serde_json::to_value(self).map_err(|e| Error::config("plan", e.to_string()))?;
        Ok(serde_json::json!({ "plan": plan, "plan_crc32": crc }))
    }

    /// The tasks.
    ///
    /// # Errors
    /// If there is no such task.
    pub fn tasks(&self) -> Result<Vec<Task>> {
        self.tasks.iter().map(|name| name.parse()).collect()
    }

    /// The cells, in the order of a grid of all methods and rates: those that the plan has.
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
        // However they are spelt.
        let tasks = self.tasks()?.into_iter().map(|task| task.name().to_string()).collect();
        let mut cells = Grid { tasks, methods, lrs, batch_sizes, seeds }.cells()?;
        cells.retain(|key| self.runs(&key.method, key.lr) > 0);
        Ok(cells)
    }

    /// How often a method runs at a rate.
    fn runs(&self, method: &str, lr: f64) -> usize {
        let has =
            |group: &&Methods| group.recipes.iter().any(|name| name == method) && group.lrs.contains(&lr);
        self.methods.iter().filter(has).count()
    }

    fn check(&self) -> Result<()> {
        let wrong = |reason: String| Err(Error::config("plan", reason));
        if self.draws == 0 {
            return wrong("draws: expected at least 1, got 0".to_string());
        }
        for task in self.tasks()? {
            if task.is_regression() {
                return wrong(format!("tasks: {task} has no classes, whose probabilities are compared"));
            }
            if self.epochs.get(task).is_none_or(|epochs| *epochs == 0) {
                return wrong(format!("epochs: there is no number for {task}"));
            }
        }
        let cells = self.cells()?;
        if let Some(key) = cells.iter().find(|key| self.runs(&key.method, key.lr) > 1) {
            return wrong(format!("methods: {} comes twice at {}", key.method, key.lr));
        }
        let arms = self.arms()?;
        let known = |text: &String| -> Result<()> {
            if arms.contains(&arm(text)?) {
                return Ok(());
            }
            let names: Vec<String> = arms.iter().map(|(method, arm)| format!("{method} ({arm})")).collect();
            Err(Error::config("plan", format!("{text:?} is none of its arms: {}", names.join(", "))))
        };
        if let Some((name, _)) = self.families.iter().find(|(_, family)| family.is_empty()) {
            return wrong(format!("families: {name} has no comparison"));
        }
        for Comparison { arm, against, scores } in self.families.values().flatten() {
            known(arm)?;
            known(against)?;
            if arm == against {
                return wrong(format!("families: {arm} is compared with itself"));
            }
            self.check_shared("families", arm, against)?;
            if scores.is_empty() {
                return wrong(format!("families: {arm} against {against} has no score"));
            }
        }
        for criterion in &self.success {
            match criterion {
                Criterion::Better { family, .. } if !self.families.contains_key(family) => {
                    return wrong(format!("success: there is no family {family:?}"));
                }
                Criterion::Better { p, .. } if !(*p > 0.0 && *p < 1.0) => {
                    return wrong(format!("success: expected a p between 0 and 1, got {p}"));
                }
                Criterion::Sensitivity { most, .. } if !(*most > 0.0 && most.is_finite()) => {
                    return wrong(format!("success: expected a positive ratio, got {most}"));
                }
                Criterion::NotWorse { by, .. } if !by.is_finite() => {
                    return wrong(format!("success: expected a number to be worse by, got {by}"));
                }
                Criterion::Better { .. } => {}
                Criterion::Sensitivity { arm, against, .. } => {
                    [arm, against].into_iter().try_for_each(known)?;
                    self.check_shared("success", arm, against)?;
                    // Of each task, seed and batch size a mean is taken away, and one more for the two arms.
                    let rates = self.shared(arm, against)?.len();
                    let groups = cells.iter().map(|key| (&key.task, key.seed, key.batch_size));
                    let groups = groups.collect::<BTreeSet<_>>().len();
                    if rates < 2 || groups * (rates - 1) < 2 {
                        let too_few =
                            format!("{rates} rates in common, {groups} tasks, seeds and batch sizes");
                        return wrong(format!(
                            "success: {arm} and {against}: too little to compare: {too_few}"
                        ));
                    }
                }
                Criterion::NotWorse { arm, against, lr, .. } => {
                    [arm, against].into_iter().try_for_each(known)?;
                    self.check_shared("success", arm, against)?;
                    let shared = self.shared(arm, against)?;
                    if lr.is_some_and(|lr| !shared.contains(&lr)) {
                        return wrong(format!("success: {arm} and {against} do not both run at {lr:?}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Checks that the methods of two arms run at a rate in common: there is no other pair of cells.
    fn check_shared(&self, place: &str, own: &str, other: &str) -> Result<()> {
        if !self.shared(own, other)?.is_empty() {
            return Ok(());
        }
        let reason = format!("{place}: {own} and {other} run at no learning rate in common");
        Err(Error::config("plan", reason))
    }

    /// The learning rates at which the methods of two arms both run, each once.
    fn shared(&self, own: &str, other: &str) -> Result<Vec<f64>> {
        let (first, second) = (arm(own)?.0, arm(other)?.0);
        let mut shared: Vec<f64> = Vec::new();
        for lr in self.methods.iter().flat_map(|group| &group.lrs) {
            if !shared.contains(lr) && self.runs(&first, *lr) > 0 && self.runs(&second, *lr) > 0 {
                shared.push(*lr);
            }
        }
        Ok(shared)
    }

    /// The arm that it is about: of the first comparison of the first family that has to be better; None
    /// where there is no such condition.
    pub(super) fn tested(&self) -> Option<Arm> {
        let family = self.success.iter().find_map(|criterion| match criterion {
            Criterion::Better { family, .. } => self.families.get(family),
            _ => None,
        })?;
        arm(&family.first()?.arm).ok()
    }

    /// Every arm of its methods.
    fn arms(&self) -> Result<BTreeSet<Arm>> {
        let mut arms = BTreeSet::new();
        for method in self.methods.iter().flat_map(|group| &group.recipes) {
            let recipe: Recipe = method.parse()?;
            arms.extend(treatments::arms(&recipe, self.draws).into_iter().map(|arm| (method.clone(), arm)));
        }
        Ok(arms)
    }
}

/// An arm as it is written: `lora:rank=4 (mean)`.
///
/// # Errors
/// Unless it is a method and a way to predict in brackets.
pub(super) fn arm(text: &str) -> Result<Arm> {
    let parts = text.strip_suffix(')').and_then(|text| text.split_once(" ("));
    let (method, arm) = parts
        .ok_or_else(|| Error::config("plan", format!("expected an arm as \"lora (mean)\", got {text:?}")))?;
    Ok((method.to_string(), arm.to_string()))
}

#[cfg(test)]
mod tests;
