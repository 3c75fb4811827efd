//! One cell of a study: a model is loaded, trained, and measured in every way its method allows.

use std::time::Instant;

use candle_core::{DType, Device};

use super::cell::{CellCost, CellKey, CellResult, Status};
use super::recipe::Recipe;
use super::rows::CellRows;
use super::treatments::{self, TrainedModel};
use crate::adapter::Params;
use crate::data::batch::Batcher;
use crate::data::encode::Encoded;
use crate::data::split::{self, Draw};
use crate::data::task::Task;
use crate::error::{Error, Result};
use crate::inject::DEFAULT_ADAPTER;
use crate::models::hub::ModelFiles;
use crate::noise::Noise;
use crate::peft::{AdapterFile, AdapterMetadata};
use crate::train::{self, Classification, Classifier, MethodInit, Observer, Record, Summary, TrainConfig};

/// The most points of a loss curve that a result keeps.
const LOSS_POINTS: usize = 200;
/// The checkpoints of an ensemble: at 60, 80 and 100 % of training.
const MEMBERS: usize = 3;

/// What the cells of a task have in common.
#[derive(Debug)]
pub struct Trial<'a> {
    /// The pre-trained model.
    pub files: &'a ModelFiles,
    /// The task.
    pub task: Task,
    /// The rows that there are to train on.
    pub train: &'a [Encoded],
    /// How many of them a cell has: a subset by its seed, stratified by label. None for all. What its
    /// recipe holds out comes out of these.
    pub limit_train: Option<usize>,
    /// What is measured: the same rows in every cell.
    pub dev: &'a [Encoded],
    /// Rows of another task, to be told from those of `dev`; empty for none.
    pub foreign: &'a [Encoded],
    /// Passes over the training rows.
    pub epochs: usize,
    /// Posterior draws, and passes of MC dropout.
    pub draws: usize,
    /// Where it runs.
    pub device: &'a Device,
}

impl Trial<'_> {
    /// Trains and measures one cell. What goes wrong in it is its result, too: a loss, gradient or
    /// prediction that is not finite is [`Status::Diverged`], anything else [`Status::Failed`].
    pub fn run(&self, key: &CellKey) -> (CellResult, CellCost, CellRows) {
        let clock = Instant::now();
        let mut result = CellResult {
            key: key.clone(),
            status: Status::Done,
            reason: None,
            metric: self.task.primary_metric().to_string(),
            arms: Default::default(),
            losses: Vec::new(),
            reliability: Default::default(),
            ood: Default::default(),
            trainable_parameters: 0,
            steps: 0,
        };
        let mut cost = CellCost { seconds: 0.0, step_seconds_median: 0.0, peak_rss_mb: None };
        let mut rows = CellRows::default();
        if let Err(error) = self.fill(key, &mut result, &mut cost, &mut rows) {
            let diverged = matches!(error, Error::NonFinite { .. });
            result.status = if diverged { Status::Diverged } else { Status::Failed };
            result.reason = Some(error.to_string());
            // What was measured before it went wrong is no result.
            result.arms.clear();
            result.reliability.clear();
            result.ood.clear();
            rows = CellRows::default();
            cost.seconds = clock.elapsed().as_secs_f64();
        }
        (result, cost, rows)
    }

    fn fill(
        &self,
        key: &CellKey,
        result: &mut CellResult,
        cost: &mut CellCost,
        rows: &mut CellRows,
    ) -> Result<()> {
        let recipe: Recipe = key.method.parse()?;
        let (train, held_out) = self.rows_of(key, &recipe)?;
        let start = match (&recipe.adapter, &recipe.post_hoc) {
            (Some(dir), Some(config)) => {
                MethodInit::PostHoc(Box::new(AdapterFile::read(dir)?), config.clone())
            }
            _ => MethodInit::Fresh(recipe.method.clone(), recipe.targets.clone()),
        };
        let mut classifier = self.load(&start, key)?;
        // Of the others nobody asks, and copies of all weights would count as memory of `full`.
        let members = if recipe.is_lora() { MEMBERS } else { 0 };
        let mut history = TrainingHistory::new(&classifier.params, members);
        let summary = self.fit(&classifier, &train, &recipe, key, &mut history);
        result.losses = history.losses();
        result.trainable_parameters = classifier.params.trainable_count();
        let members = std::mem::take(&mut history.members);
        let mut summary = summary?;
        if let (None, Some(config)) = (&recipe.adapter, &recipe.post_hoc) {
            let adapter = adapter(&classifier, &recipe)?;
            classifier = self.load(&MethodInit::PostHoc(Box::new(adapter), config.clone()), key)?;
            let mut history = TrainingHistory::new(&classifier.params, 0);
            let second = self.fit(&classifier, &train, &recipe, key, &mut history)?;
            summary.steps += second.steps;
            summary.seconds += second.seconds;
        }
        result.steps = summary.steps;
        cost.seconds = summary.seconds;
        cost.step_seconds_median = summary.step_seconds_median.unwrap_or_default();
        cost.peak_rss_mb = train::peak_rss_bytes().map(|bytes| bytes as f64 / 1e6);
        let trained = TrainedModel {
            classifier,
            train: &train,
            held_out: &held_out,
            dev: self.dev,
            foreign: self.foreign,
            draws: self.draws,
            members,
            noise: Noise::new(key.seed),
        };
        treatments::measure(trained, &recipe, result, rows)
    }

    /// What a cell is trained on, and what its recipe holds out: of the same seed, the same rows together
    /// whatever the recipe.
    fn rows_of(&self, key: &CellKey, recipe: &Recipe) -> Result<(Vec<Encoded>, Vec<Encoded>)> {
        let noise = Noise::new(key.seed);
        let count = self.limit_train.unwrap_or(self.train.len());
        let own = split::stratified(&split::strata(self.train), count, noise, Draw::Training);
        let own = split::at(self.train, &own);
        let (stay, held) = split::hold_out(&split::strata(&own), recipe.held_out, noise)?;
        Ok((split::at(&own, &stay), split::at(&own, &held)))
    }

    fn load(&self, start: &MethodInit, key: &CellKey) -> Result<Classifier> {
        let (labels, noise) = (self.task.num_labels(), Noise::new(key.seed));
        Classifier::load(self.files, labels, start, noise, DType::F32, self.device)
    }

    fn fit(
        &self,
        classifier: &Classifier,
        rows: &[Encoded],
        recipe: &Recipe,
        key: &CellKey,
        history: &mut TrainingHistory,
    ) -> Result<Summary> {
        let batcher = Batcher::new(key.batch_size, false, Noise::new(key.seed))?;
        let steps = batcher.batches(rows.len()) * self.epochs;
        let config = TrainConfig {
            epochs: self.epochs,
            lr: key.lr,
            loraplus_ratio: recipe.loraplus_ratio,
            head_lr_ratio: recipe.head_lr_ratio,
            variational_lr_ratio: recipe.variational_lr_ratio,
            // The last parameters: to choose by the rows that measure would flatter every method.
            keep_best: false,
            eval_every: Some(steps.div_ceil(5).max(1)),
            ..TrainConfig::default()
        };
        let objective = Classification { classifier, rows, batcher };
        train::fit(&objective, &classifier.params, &config, history)
    }
}

/// The LoRA adapter of a classifier, with its head.
fn adapter(classifier: &Classifier, recipe: &Recipe) -> Result<AdapterFile> {
    let method = recipe.method.adapter();
    let method = method.ok_or_else(|| Error::config("method", "post-hoc begins with LoRA"))?;
    let metadata = AdapterMetadata { task: Some("SEQ_CLS".to_string()), ..AdapterMetadata::default() };
    AdapterFile::from_model(
        classifier.model.as_ref(),
        DEFAULT_ADAPTER,
        &classifier.params,
        &method,
        &metadata,
    )
}

/// Keeps the losses of a run and its last checkpoints.
struct TrainingHistory<'a> {
    params: &'a Params,
    /// The number of checkpoints to keep.
    keep: usize,
    losses: Vec<(usize, f64)>,
    members: Vec<std::collections::BTreeMap<String, candle_core::Tensor>>,
}

impl<'a> TrainingHistory<'a> {
    fn new(params: &'a Params, keep: usize) -> Self {
        Self { params, keep, losses: Vec::new(), members: Vec::new() }
    }

    /// The curve of the task's loss: means over pieces of equal length, at their last steps.
    fn losses(&self) -> Vec<(usize, f64)> {
        let piece = self.losses.len().div_ceil(LOSS_POINTS).max(1);
        let mean =
            |piece: &[(usize, f64)]| piece.iter().map(|(_, loss)| loss).sum::<f64>() / piece.len() as f64;
        self.losses.chunks(piece).filter_map(|piece| Some((piece.last()?.0, mean(piece)))).collect()
    }
}

impl Observer for TrainingHistory<'_> {
    fn step(&mut self, record: &Record) -> Result<()> {
        let loss = record.terms.get("task").copied().unwrap_or(record.loss);
        self.losses.push((record.step, loss));
        Ok(())
    }

    fn evaluate(&mut self, _step: usize) -> Result<Option<f64>> {
        if self.keep > 0 {
            if self.members.len() == self.keep {
                self.members.remove(0);
            }
            self.members.push(self.params.snapshot()?);
        }
        Ok(None)
    }
}
