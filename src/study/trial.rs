//! One cell of a study of classifiers: a model is loaded, trained, and measured in every way its method
//! allows.

use candle_core::{DType, Device};

use super::cell::{CellCost, CellKey, CellResult};
use super::recipe::Recipe;
use super::rows::CellRows;
use super::training::{self, Learner, Trained};
use super::treatments::{self, TrainedModel};
use crate::adapter::Params;
use crate::data::batch::Batcher;
use crate::data::encode::Encoded;
use crate::data::split::{self, Subset};
use crate::data::task::Task;
use crate::error::Result;
use crate::models::hub::ModelFiles;
use crate::noise::Noise;
use crate::optim::IvonPosterior;
use crate::peft::{AdapterFile, AdapterMethod};
use crate::train::{Classification, Classifier, MethodInit, Objective};

/// The number of checkpoints in an ensemble: at 60, 80 and 100 % of training.
const MEMBERS: usize = 3;

/// The inputs that the cells of a task have in common.
#[derive(Debug)]
pub struct Trial<'a> {
    /// The pre-trained model.
    pub files: &'a ModelFiles,
    /// The task.
    pub task: Task,
    /// The available training rows.
    pub train: &'a [Encoded],
    /// The number of training rows of a cell, or `None` for all: a subset chosen by the seed and stratified
    /// by label. Rows that the recipe holds out are among them.
    pub limit_train: Option<usize>,
    /// The measured rows, the same in every cell.
    pub dev: &'a [Encoded],
    /// Rows of another task, to be told apart from those of `dev`; empty for none.
    pub foreign: &'a [Encoded],
    /// The number of passes over the training rows.
    pub epochs: usize,
    /// The number of posterior draws and of MC dropout passes.
    pub draws: usize,
    /// The device of the model.
    pub device: &'a Device,
}

impl Trial<'_> {
    /// Trains and measures one cell. Errors are results, too: a loss, gradient or prediction that is not
    /// finite gives [`Status::Diverged`](super::Status::Diverged), any other error
    /// [`Status::Failed`](super::Status::Failed).
    pub fn run(&self, key: &CellKey) -> (CellResult, CellCost, CellRows) {
        let begun = CellResult::begun(key, self.task.primary_metric());
        training::attempt(begun, |result, cost, rows| self.fill(key, result, cost, rows))
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
        // Other recipes do not use checkpoints, and copies of all weights would count as memory of `full`.
        let members = if recipe.is_lora() { MEMBERS } else { 0 };
        let cell = CellTrial { trial: self, train: &train };
        let Trained { model, members, moments } =
            training::train(&cell, &recipe, key, members, result, cost)?;
        let of_ivon = |config| IvonPosterior::new(&model.params, &moments, config);
        let ivon = recipe.ivon.as_ref().map(of_ivon).transpose()?;
        let trained = TrainedModel {
            classifier: model,
            train: &train,
            held_out: &held_out,
            dev: self.dev,
            foreign: self.foreign,
            draws: self.draws,
            members,
            ivon,
            noise: Noise::new(key.seed),
        };
        treatments::measure(trained, &recipe, result, rows)
    }

    /// The rows that a cell is trained on and those that its recipe holds out. For a seed, both together are
    /// the same rows whatever the recipe.
    fn rows_of(&self, key: &CellKey, recipe: &Recipe) -> Result<(Vec<Encoded>, Vec<Encoded>)> {
        let noise = Noise::new(key.seed);
        let count = self.limit_train.unwrap_or(self.train.len());
        let own = split::stratified(&split::strata(self.train), count, noise, Subset::Training);
        let own = split::at(self.train, &own);
        let (stay, held) = split::hold_out(&split::strata(&own), recipe.held_out, noise)?;
        Ok((split::at(&own, &stay), split::at(&own, &held)))
    }
}

/// A trial with the training rows of one cell.
struct CellTrial<'a> {
    trial: &'a Trial<'a>,
    train: &'a [Encoded],
}

impl Learner for CellTrial<'_> {
    type Model = Classifier;

    fn load(&self, start: &MethodInit, noise: Noise) -> Result<Classifier> {
        let Trial { files, task, device, .. } = self.trial;
        Classifier::load(files, *task, start, noise, DType::F32, device)
    }

    fn params<'m>(&self, model: &'m Classifier) -> &'m Params {
        &model.params
    }

    fn adapter(&self, model: &Classifier, method: &AdapterMethod) -> Result<AdapterFile> {
        model.adapter_file(method, None)
    }

    fn objective<'m>(&'m self, model: &'m Classifier, batcher: Batcher) -> Box<dyn Objective + 'm> {
        Box::new(Classification::new(model, self.train, batcher))
    }

    fn rows(&self) -> usize {
        self.train.len()
    }

    fn epochs(&self) -> usize {
        self.trial.epochs
    }
}
