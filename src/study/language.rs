//! One cell of a language model's study: trained once on instructions and measured on every task.

use std::cell::Cell;

use candle_core::{DType, Device};

use super::cell::{CellCost, CellKey, CellResult};
use super::evaluated::{EvaluatedTask, TaskArms};
use super::recipe::Recipe;
use super::rows::CellRows;
use super::training::{self, Learner, Trained};
use super::treatment;
use crate::adapter::Params;
use crate::data::batch::Batcher;
use crate::data::causal::{PromptEncoder, Tokens};
use crate::data::instruct::Prompted;
use crate::data::split::{self, Subset};
use crate::error::{Error, Result};
use crate::inject::DEFAULT_ADAPTER;
use crate::models::causal::CausalLm;
use crate::models::decoder::{DecoderConfig, DecoderForCausalLM};
use crate::models::generate::PosteriorWeights;
use crate::models::hub::ModelFiles;
use crate::noise::Noise;
use crate::peft::{AdapterFile, AdapterMetadata, AdapterMethod, TaskType};
use crate::train::{CausalTuning, MethodHooks, MethodInit, Objective};

/// The inputs that the cells of a language model's study have in common.
#[derive(Debug)]
pub struct LanguageTrial<'a> {
    /// The pre-trained model, a decoder.
    pub files: &'a ModelFiles,
    /// The available training rows.
    pub rows: &'a [Prompted],
    /// The same rows as tokens, each with its index in `rows` ([`Tokens::row`]).
    pub train: &'a [Tokens],
    /// The number of training rows of a cell, or `None` for all: a subset chosen by the seed and stratified
    /// by the right choice. Rows that the recipe holds out are among them.
    pub limit_train: Option<usize>,
    /// The measured tasks; `encoder` must have room for their rows.
    pub tasks: &'a [EvaluatedTask],
    /// The encoder of prompts.
    pub encoder: &'a PromptEncoder,
    /// The number of passes over the training rows.
    pub epochs: usize,
    /// The number of posterior draws.
    pub draws: usize,
    /// The dtype of the frozen base.
    pub base_dtype: DType,
    /// Whether training keeps only each layer's input and recomputes the rest: less memory, more time.
    pub checkpoint_layers: bool,
    /// The device of the model.
    pub device: &'a Device,
}

/// A loaded language model.
struct LanguageModel {
    model: DecoderForCausalLM,
    params: Params,
    /// Present until the training takes them.
    hooks: Cell<MethodHooks>,
    config: DecoderConfig,
}

impl LanguageTrial<'_> {
    /// Trains one cell and measures it on every task: the posterior mean; averaged draws if there is a
    /// posterior; and, if rows are held out, the mean at a temperature fitted on the likelihoods of choices.
    /// Errors are results, too: a loss, gradient or prediction that is not finite gives
    /// [`Status::Diverged`](super::Status::Diverged), any other error
    /// [`Status::Failed`](super::Status::Failed).
    pub fn run(&self, key: &CellKey) -> (CellResult, CellCost, CellRows) {
        let mut begun = CellResult::begun(key, EvaluatedTask::METRIC);
        self.tasks.iter().for_each(|task| begun.tasks.extend(task.begun()));
        training::attempt(begun, |result, cost, rows| {
            let recipe: Recipe = key.method.parse()?;
            let (train, held_out) = self.rows_of(key, &recipe)?;
            let cell = CellTrial { trial: self, train: &train };
            let Trained { model, .. } = training::train(&cell, &recipe, key, 0, result, cost)?;
            let LanguageModel { model, config, .. } = &model;
            let (encoder, stop, found) = (self.encoder, config.eos_token_ids.clone(), &mut result.tasks);
            let arms = TaskArms { model, encoder, stop, seed: key.seed, found, rows };
            self.measure(arms, &recipe, &held_out)
        })
    }

    /// The rows that a cell is trained on, and the questions with choices among the rows that its recipe
    /// holds out. For a seed, the training and held-out rows together are the same whatever the recipe.
    fn rows_of(&self, key: &CellKey, recipe: &Recipe) -> Result<(Vec<Tokens>, Vec<Prompted>)> {
        let noise = Noise::new(key.seed);
        let choices = |tokens: &Tokens| self.rows.get(tokens.row)?.choices.as_ref();
        let strata = |rows: &[Tokens]| -> Vec<u32> {
            rows.iter().map(|row| choices(row).map_or(0, |choices| choices.correct as u32)).collect()
        };
        let count = self.limit_train.unwrap_or(self.train.len());
        let own =
            split::at(self.train, &split::stratified(&strata(self.train), count, noise, Subset::Training));
        let (stay, held) = split::hold_out(&strata(&own), recipe.held_out, noise)?;
        let held = split::at(&own, &held).into_iter().filter(|row| choices(row).is_some());
        let held: Vec<Prompted> = held.map(|row| self.rows[row.row].clone()).collect();
        if recipe.held_out > 0.0 && held.is_empty() {
            let reason = "a temperature is fitted on held-out rows with choices, and there are none";
            return Err(Error::config("held-out", reason));
        }
        Ok((split::at(&own, &stay), held))
    }

    fn measure(&self, mut arms: TaskArms, recipe: &Recipe, held_out: &[Prompted]) -> Result<()> {
        arms.add(treatment::MEAN, self.tasks, PosteriorWeights::Mean)?;
        // IVON's draws are whole parameters, which are not substituted into the model here.
        if recipe.has_posterior() && recipe.ivon.is_none() && self.draws > 0 {
            let name = treatment::draws(self.draws);
            arms.add(&name, self.tasks, PosteriorWeights::Average(self.draws))?;
        }
        if !held_out.is_empty() {
            arms.add_temperature(treatment::TEMPERATURE, self.tasks, held_out)?;
        }
        Ok(())
    }
}

/// A trial with the training rows of one cell.
struct CellTrial<'a> {
    trial: &'a LanguageTrial<'a>,
    train: &'a [Tokens],
}

impl Learner for CellTrial<'_> {
    type Model = LanguageModel;

    fn load(&self, start: &MethodInit, noise: Noise) -> Result<LanguageModel> {
        let LanguageTrial { files, tasks, encoder, base_dtype, checkpoint_layers, device, .. } = self.trial;
        let config = DecoderConfig::from_files(files)?;
        let params = Params::new(noise, device);
        let checkpoint = files.open_weights(*base_dtype, device)?;
        let base = start.base(checkpoint, &params)?;
        let mut model = DecoderForCausalLM::load(base, &config, noise)?;
        model.set_checkpoint_layers(*checkpoint_layers);
        let hooks = Cell::new(start.inject(&mut model, &params)?);
        // Report a row that cannot be measured before the training, not after it.
        tasks.iter().try_for_each(|task| task.check(&model, encoder))?;
        Ok(LanguageModel { model, params, hooks, config })
    }

    fn params<'m>(&self, model: &'m LanguageModel) -> &'m Params {
        &model.params
    }

    fn adapter(&self, model: &LanguageModel, method: &AdapterMethod) -> Result<AdapterFile> {
        let metadata = AdapterMetadata { task: Some(TaskType::CausalLm), ..AdapterMetadata::default() };
        AdapterFile::from_model(&model.model, DEFAULT_ADAPTER, &model.params, method, &metadata)
    }

    fn objective<'m>(&'m self, model: &'m LanguageModel, batcher: Batcher) -> Box<dyn Objective + 'm> {
        let (hooks, pad_id) = (model.hooks.take(), model.config.pad_id());
        Box::new(CausalTuning::new(&model.model, hooks, self.train, batcher, pad_id))
    }

    fn rows(&self) -> usize {
        self.train.len()
    }

    fn epochs(&self) -> usize {
        self.trial.epochs
    }
}
