//! What a method adds to training besides the task's loss: a penalty, and work between steps.

mod adalora;
mod blob;
mod hook;
mod monteclora;
mod prior;
mod released;

use std::collections::BTreeMap;

use candle_core::Tensor;

use self::adalora::AdaLoraHook;
use self::blob::BlobHook;
use self::hook::Hook;
use self::monteclora::PosteriorHook;
use self::prior::PriorHook;
use self::released::ReleasedHook;
use super::objective::Loss;
use super::settings::Settings;
use crate::adapter::{AdaptableModel, Context, Params, Prior};
use crate::adapters::{AdaLoraConfig, BlobConfig};
use crate::error::Result;
use crate::monteclora::{MonteCLoRAConfig, ReleasedWalk};

pub use self::hook::StepDone;

/// A method's part in training; by default nothing.
#[derive(Debug)]
pub struct MethodHooks {
    hook: Box<dyn Hook>,
    settings: Settings,
}

/// A method that adds nothing.
#[derive(Debug)]
struct Plain;

impl Hook for Plain {}

impl Default for MethodHooks {
    fn default() -> Self {
        Self::of(Plain)
    }
}

impl MethodHooks {
    fn of(hook: impl Hook + 'static) -> Self {
        Self { hook: Box::new(hook), settings: Settings::new() }
    }

    /// The hooks of MonteCLoRA: its regulariser and the schedule of its sample scaler. Training starts at the
    /// present values of `params`.
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn of_monteclora(config: &MonteCLoRAConfig, params: &Params) -> Result<Self> {
        Ok(Self::of(PosteriorHook::new(config, params)?))
    }

    /// The hooks of LoRA with a prior. Training starts at the present values of `params`.
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn of_prior(prior: &Prior, params: &Params) -> Result<Self> {
        Ok(Self::of(PriorHook::new(prior, params)?))
    }

    /// The hooks of the authors' released code, whose adapters are on `model`: a random walk of A and a
    /// regulariser.
    ///
    /// # Errors
    /// As [`ReleasedWalk::new`].
    pub fn of_released(
        model: &dyn AdaptableModel,
        config: &MonteCLoRAConfig,
        params: &Params,
    ) -> Result<Self> {
        Ok(Self::of(ReleasedHook(ReleasedWalk::new(model, config, params)?)))
    }

    /// The hooks of BLoB: descent steps on its divergence, in turns with the optimiser.
    pub fn of_blob(config: &BlobConfig) -> Self {
        Self::of(BlobHook(config.clone()))
    }

    /// The hooks of AdaLoRA, whose adapters are on `model`.
    ///
    /// # Errors
    /// As [`RankAllocator::new`](crate::adapters::RankAllocator::new).
    pub fn of_adalora(model: &dyn AdaptableModel, config: &AdaLoraConfig) -> Result<Self> {
        Ok(Self::of(AdaLoraHook::new(model, config)?))
    }

    /// Sets the settings returned by [`Self::settings`].
    pub fn with_settings(self, settings: Settings) -> Self {
        Self { settings, ..self }
    }

    /// Returns the settings that must agree to resume from a checkpoint: the method and its targets, as set
    /// by [`MethodInit::inject`](super::MethodInit::inject), else none.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns the task's loss with the method's penalty. `rows` is the number of training rows (of target
    /// tokens for a language model), by which a prior and the evidence bound are weighed.
    ///
    /// # Errors
    /// If candle fails, the model has no layer of the method, or `rows` are needed but missing.
    pub fn loss(
        &self,
        task: Tensor,
        model: &dyn AdaptableModel,
        cx: &Context,
        rows: Option<usize>,
    ) -> Result<Loss> {
        self.hook.loss(task, model, cx, rows.map(|rows| rows as f64))
    }

    /// Adds to the context of a forward pass what the method needs: the present factors of eps, which replace
    /// the context's. A custom objective must run its forward passes in this context for a schedule to take
    /// effect.
    ///
    /// # Errors
    /// If an earlier step panicked.
    pub fn context(&self, cx: &Context) -> Result<Context> {
        self.hook.context(cx)
    }

    /// Called before optimiser step `step` (1-based) of `total`.
    ///
    /// # Errors
    /// As [`SampleScaler::before_step`](crate::SampleScaler::before_step) and [`ReleasedWalk::before_step`].
    pub fn before_step(&self, step: usize, total: usize) -> Result<()> {
        self.hook.before_step(step, total)
    }

    /// Called after an optimiser step.
    ///
    /// # Errors
    /// As [`RankAllocator::after_step`](crate::adapters::RankAllocator::after_step) and
    /// [`SampleScaler::after_step`](crate::SampleScaler::after_step). For BLoB, if its parameters would not be
    /// finite.
    pub fn after_step(&self, done: &StepDone) -> Result<()> {
        self.hook.after_step(done)
    }

    /// Returns the method's state between steps besides its parameters.
    ///
    /// # Errors
    /// If candle fails.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.hook.state()
    }

    /// Restores a state from [`Self::state`].
    ///
    /// # Errors
    /// If it is not a state of this method on this model.
    pub fn restore(&self, model: &dyn AdaptableModel, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.hook.restore(model, state)
    }
}

#[cfg(test)]
mod tests;
