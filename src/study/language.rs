//! One cell of a language model's study: trained once on instructions, measured on every task.

use std::cell::Cell;

use candle_core::{DType, Device};

use super::cell::{CellCost, CellKey, CellResult};
use super::evaluated::{Arms, EvaluatedTask};
use super::recipe::Recipe;
use super::training::{self, Learner, Trained};
use crate::adapter::{Params, Role};
use crate::data::batch::Batcher;
use crate::data::causal::{PromptEncoder, Tokens};
use crate::data::instruct::Prompted;
use crate::error::Result;
use crate::inject::DEFAULT_ADAPTER;
use crate::models::causal::CausalLm;
use crate::models::generate::Weights;
use crate::models::hub::ModelFiles;
use crate::models::llama::{LlamaConfig, LlamaForCausalLM};
use crate::noise::Noise;
use crate::peft::{AdapterFile, AdapterMetadata, AdapterMethod};
use crate::train::{CausalTuning, Method, MethodHooks, MethodInit, Objective};

/// What the cells of a language model's study have in common.
#[derive(Debug)]
pub struct LanguageTrial<'a> {
    /// The pre-trained model, a LLaMA.
    pub files: &'a ModelFiles,
    /// What is trained on.
    pub train: &'a [Tokens],
    /// Multiple-choice questions that temperatures are fitted on, neither trained on nor measured;
    /// empty for none.
    pub held_out: &'a [Prompted],
    /// What is measured, by an encoder with room for its rows.
    pub tasks: &'a [EvaluatedTask],
    /// That encoder.
    pub encoder: &'a PromptEncoder,
    /// Passes over the training rows.
    pub epochs: usize,
    /// Posterior draws.
    pub draws: usize,
    /// The dtype of the frozen base.
    pub base_dtype: DType,
    /// Whether training keeps each layer's input alone: less memory, more time.
    pub checkpoint_layers: bool,
    /// Where it runs.
    pub device: &'a Device,
}

/// A loaded language model.
pub(super) struct LanguageModel {
    model: LlamaForCausalLM,
    params: Params,
    /// Until the training takes them.
    hooks: Cell<MethodHooks>,
    config: LlamaConfig,
}

impl LanguageTrial<'_> {
    /// Trains one cell and measures it on every task: the posterior mean, averaged draws where there is a
    /// posterior and, of LoRA where rows are held out, a temperature on the likelihoods of choices. What
    /// goes wrong in it is its result, too: a loss, gradient or prediction that is not finite is
    /// [`Status::Diverged`](super::Status::Diverged), anything else
    /// [`Status::Failed`](super::Status::Failed).
    pub fn run(&self, key: &CellKey) -> (CellResult, CellCost) {
        let mut begun = CellResult::begun(key, EvaluatedTask::METRIC);
        self.tasks.iter().for_each(|task| begun.tasks.extend(task.begun()));
        training::attempt(begun, |result, cost| {
            let recipe: Recipe = key.method.parse()?;
            let Trained { model, .. } = training::train(self, &recipe, key, 0, result, cost)?;
            self.measure(&model, &recipe, key.seed, result)
        })
    }

    fn measure(
        &self,
        trained: &LanguageModel,
        recipe: &Recipe,
        seed: u64,
        result: &mut CellResult,
    ) -> Result<()> {
        let LanguageModel { model, config, .. } = trained;
        let (encoder, stop) = (self.encoder, config.eos_token_ids());
        let mut arms = Arms { model, encoder, stop, seed, found: &mut result.tasks };
        arms.add("mean", self.tasks, Weights::Mean)?;
        if recipe.has_posterior() && self.draws > 0 {
            arms.add(&format!("{} draws", self.draws), self.tasks, Weights::Average(self.draws))?;
        }
        if recipe.is_lora() && !self.held_out.is_empty() {
            arms.add_temperature("temperature", self.tasks, self.held_out)?;
        }
        Ok(())
    }
}

impl Learner for LanguageTrial<'_> {
    type Model = LanguageModel;

    fn load(&self, start: &MethodInit, noise: Noise) -> Result<LanguageModel> {
        let config = LlamaConfig::from_file(self.files.config_path())?;
        let params = Params::new(noise, self.device);
        let checkpoint = self.files.var_builder(self.base_dtype, self.device)?;
        let base = match start.method() {
            Method::Full => params.var_builder(Some(checkpoint), Role::Base),
            _ => checkpoint,
        };
        let mut model = LlamaForCausalLM::load(base, &config, noise)?;
        model.set_checkpoint_layers(self.checkpoint_layers);
        let hooks = Cell::new(start.inject(&mut model, &params)?);
        // A row that cannot be measured is told before the training, not after it.
        self.tasks.iter().try_for_each(|task| task.check(&model, self.encoder))?;
        Ok(LanguageModel { model, params, hooks, config })
    }

    fn params<'m>(&self, model: &'m LanguageModel) -> &'m Params {
        &model.params
    }

    fn adapter(&self, model: &LanguageModel, method: &AdapterMethod) -> Result<AdapterFile> {
        let metadata = AdapterMetadata { task: Some("CAUSAL_LM".to_string()), ..AdapterMetadata::default() };
        AdapterFile::from_model(&model.model, DEFAULT_ADAPTER, &model.params, method, &metadata)
    }

    fn objective<'m>(&'m self, model: &'m LanguageModel, batcher: Batcher) -> Box<dyn Objective + 'm> {
        let (hooks, pad_id) = (model.hooks.take(), model.config.pad_id());
        Box::new(CausalTuning { model: &model.model, hooks, rows: self.train, batcher, pad_id })
    }

    fn rows(&self) -> usize {
        self.train.len()
    }

    fn epochs(&self) -> usize {
        self.epochs
    }
}
