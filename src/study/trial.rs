//! One cell of a study: a model is loaded, trained, and measured in every way its method allows.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::cell::{CellCost, CellKey, CellResult, Status};
use super::recipe::Recipe;
use super::treatments::{self, TrainedModel};
use crate::adapter::Params;
use crate::data::batch::Batcher;
use crate::data::encode::Encoded;
use crate::data::task::Task;
use crate::error::{Error, Result};
use crate::inject::DEFAULT_ADAPTER;
use crate::models::hub::ModelFiles;
use crate::noise::Noise;
use crate::optim::{IvonPosterior, Moments};
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
    /// What is trained on.
    pub train: &'a [Encoded],
    /// What temperatures and prior precisions are fitted on: rows that are neither trained on nor
    /// measured.
    pub held_out: &'a [Encoded],
    /// What is measured.
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
    pub fn run(&self, key: &CellKey) -> (CellResult, CellCost) {
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
        if let Err(error) = self.fill(key, &mut result, &mut cost) {
            let diverged = matches!(error, Error::NonFinite { .. });
            result.status = if diverged { Status::Diverged } else { Status::Failed };
            result.reason = Some(error.to_string());
            // What was measured before it went wrong is no result.
            result.arms.clear();
            result.reliability.clear();
            result.ood.clear();
            cost.seconds = clock.elapsed().as_secs_f64();
        }
        (result, cost)
    }

    fn fill(&self, key: &CellKey, result: &mut CellResult, cost: &mut CellCost) -> Result<()> {
        let recipe: Recipe = key.method.parse()?;
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
        let summary = self.fit(&classifier, &recipe, key, &mut history);
        result.losses = history.losses();
        result.trainable_parameters = classifier.params.trainable_count();
        let members = std::mem::take(&mut history.members);
        let of_ivon = |config| IvonPosterior::new(&classifier.params, &history.moments, config);
        let ivon = recipe.ivon.as_ref().map(of_ivon).transpose()?;
        let mut summary = summary?;
        if let (None, Some(config)) = (&recipe.adapter, &recipe.post_hoc) {
            let adapter = adapter(&classifier, &recipe)?;
            classifier = self.load(&MethodInit::PostHoc(Box::new(adapter), config.clone()), key)?;
            let mut history = TrainingHistory::new(&classifier.params, 0);
            let second = self.fit(&classifier, &recipe, key, &mut history)?;
            summary.steps += second.steps;
            summary.seconds += second.seconds;
        }
        result.steps = summary.steps;
        cost.seconds = summary.seconds;
        cost.step_seconds_median = summary.step_seconds_median.unwrap_or_default();
        cost.peak_rss_mb = train::peak_rss_bytes().map(|bytes| bytes as f64 / 1e6);
        let trained = TrainedModel {
            classifier,
            train: self.train,
            held_out: self.held_out,
            dev: self.dev,
            foreign: self.foreign,
            draws: self.draws,
            members,
            ivon,
            noise: Noise::new(key.seed),
        };
        treatments::measure(trained, &recipe, result)
    }

    fn load(&self, start: &MethodInit, key: &CellKey) -> Result<Classifier> {
        let (labels, noise) = (self.task.num_labels(), Noise::new(key.seed));
        Classifier::load(self.files, labels, start, noise, DType::F32, self.device)
    }

    fn fit(
        &self,
        classifier: &Classifier,
        recipe: &Recipe,
        key: &CellKey,
        history: &mut TrainingHistory,
    ) -> Result<Summary> {
        let batcher = Batcher::new(key.batch_size, false, Noise::new(key.seed))?;
        let steps = batcher.batches(self.train.len()) * self.epochs;
        let config = TrainConfig {
            epochs: self.epochs,
            lr: key.lr,
            loraplus_ratio: recipe.loraplus_ratio,
            ivon: recipe.ivon.clone(),
            // IVON clips each element.
            clip: TrainConfig::default().clip.filter(|_| recipe.ivon.is_none()),
            // The last parameters: to choose by the rows that measure would flatter every method.
            keep_best: false,
            eval_every: Some(steps.div_ceil(5).max(1)),
            ..TrainConfig::default()
        };
        let objective = Classification { classifier, rows: self.train, batcher };
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
    members: Vec<BTreeMap<String, Tensor>>,
    /// What the optimiser remembered at the end.
    moments: BTreeMap<String, Moments>,
}

impl<'a> TrainingHistory<'a> {
    fn new(params: &'a Params, keep: usize) -> Self {
        Self { params, keep, losses: Vec::new(), members: Vec::new(), moments: BTreeMap::new() }
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

    fn trained(&mut self, moments: &BTreeMap<String, Moments>) -> Result<()> {
        self.moments.clone_from(moments);
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
