//! The inputs of the training loop: an objective to train, and an observer.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::Serialize;

use super::settings::Settings;
use crate::adapter::{Context, Params};
use crate::error::{Error, Result};
use crate::optim::{Gradients, Moments};

/// The loss of one micro-batch, as scalar tensors.
#[derive(Debug)]
pub struct Loss {
    /// The loss to differentiate.
    pub total: Tensor,
    /// The named parts of the loss, for logs and for errors about non-finite values.
    pub terms: Vec<(&'static str, Tensor)>,
}

/// A training objective with its data and its model.
pub trait Objective {
    /// Returns the micro-batches of an epoch, as row numbers: a pure function of the epoch, with the same
    /// number of micro-batches in each.
    ///
    /// # Errors
    /// If there is no data.
    fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>>;

    /// Returns the mean loss over some rows, including what the method adds. `cx` has the pass and, after a
    /// loss that was not finite, a probe.
    ///
    /// # Errors
    /// If the forward pass fails.
    fn loss(&self, rows: &[usize], cx: &Context) -> Result<Loss>;

    /// Returns the weight of a micro-batch within its step: the number of items that its loss is a mean over.
    fn weight(&self, rows: &[usize]) -> f64 {
        rows.len() as f64
    }

    /// Returns the settings that must agree to resume from a checkpoint, by name: the data, the method.
    fn settings(&self) -> Settings {
        Settings::new()
    }

    /// Returns the method's state between steps besides its parameters.
    ///
    /// # Errors
    /// If candle cannot copy.
    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(BTreeMap::new())
    }

    /// Restores a state from [`Self::state`].
    ///
    /// # Errors
    /// If it is not a state of this method on this model.
    fn restore(&self, _state: &BTreeMap<String, Tensor>) -> Result<()> {
        Ok(())
    }

    /// Called before optimiser step `step` (1-based) of `total`.
    ///
    /// # Errors
    /// An error ends the run.
    fn before_step(&self, _step: usize, _total: usize) -> Result<()> {
        Ok(())
    }

    /// Called after optimiser step `step` (1-based) of `total`.
    ///
    /// # Errors
    /// An error ends the run.
    fn after_step(
        &self,
        _params: &Params,
        _gradients: &Gradients,
        _step: usize,
        _total: usize,
    ) -> Result<()> {
        Ok(())
    }
}

/// The log record of one optimiser step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRecord {
    /// The number of this step (1-based).
    pub step: usize,
    /// The number of epochs so far, including the fraction of the present one.
    pub epoch: f64,
    /// The learning rate of this step.
    pub lr: f64,
    /// The total loss.
    pub loss: f64,
    /// The parts of the loss.
    #[serde(flatten)]
    pub terms: BTreeMap<&'static str, f64>,
    /// The global gradient norm before clipping.
    pub grad_norm: f64,
}

/// Observes a run: logs, progress bars, evaluation.
pub trait Observer {
    /// Called before the first step with the total number of steps and the number already done, which is
    /// above 0 if the run resumes from a checkpoint. Records of later steps should be dropped, as these steps
    /// are repeated.
    ///
    /// # Errors
    /// An error ends the run.
    fn start(&mut self, _total_steps: usize, _done: usize) -> Result<()> {
        Ok(())
    }

    /// Called for a problem that does not end the run: a damaged checkpoint that is skipped for an older one,
    /// an old checkpoint that cannot be removed, or scores that no longer compare.
    fn warned(&mut self, _what: &str) {}

    /// Whether the run should stop; called after every step.
    fn stop(&self) -> bool {
        false
    }

    /// Called if a step is skipped because its loss or gradient was not finite
    /// ([`OnNonFinite::Skip`](super::OnNonFinite::Skip)).
    ///
    /// # Errors
    /// An error ends the run.
    fn skipped(&mut self, _step: usize, _why: &Error) -> Result<()> {
        Ok(())
    }

    /// Called after every step that was not skipped.
    ///
    /// # Errors
    /// An error ends the run.
    fn step(&mut self, record: &StepRecord) -> Result<()>;

    /// Evaluates the present parameters and returns a score; higher is better. `None` and scores that are not
    /// finite are not compared.
    ///
    /// # Errors
    /// An error ends the run.
    fn evaluate(&mut self, step: usize) -> Result<Option<f64>>;

    /// Called at the end of a run with the optimiser state of each parameter: for IVON, the posterior
    /// ([`IvonPosterior`](crate::optim::IvonPosterior)). The present parameters are still those of the last
    /// step; the best evaluation's are restored afterwards.
    ///
    /// # Errors
    /// The run is over; the error is returned to its caller.
    fn trained(&mut self, _moments: &BTreeMap<String, Moments>) -> Result<()> {
        Ok(())
    }

    /// Called when the present parameters, those of `step`, are the best so far, or without
    /// [`keep_best`](super::TrainConfig::keep_best) the last evaluated. Save them here, as a run may die
    /// without an error.
    ///
    /// # Errors
    /// An error ends the run.
    fn kept(&mut self, _step: usize) -> Result<()> {
        Ok(())
    }
}

/// Observes nothing: the run keeps its last parameters.
impl Observer for () {
    fn step(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn evaluate(&mut self, _: usize) -> Result<Option<f64>> {
        Ok(None)
    }
}

/// The summary of a run; the default is of no run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Optimiser steps, including skipped ones.
    pub steps: usize,
    /// Wall time in seconds, including evaluations and all earlier parts of a resumed run.
    pub seconds: f64,
    /// The median wall time of a step since the last start, in seconds, without evaluations; `None` if the
    /// run had already ended when it was resumed.
    pub step_seconds_median: Option<f64>,
    /// The step whose parameters were kept.
    pub kept_step: usize,
    /// The number of steps skipped because a value was not finite.
    pub skipped: usize,
    /// Whether the run ended before its last step because evaluations did not improve
    /// ([`patience`](super::TrainConfig::patience)).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stopped_early: bool,
}
