//! What the loop is given: an objective to train and an observer that watches.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::Serialize;

use super::settings::Settings;
use crate::adapter::{Context, Params};
use crate::error::{Error, Result};
use crate::optim::{Gradients, Moments};

/// The loss of one micro-batch: scalar tensors.
#[derive(Debug)]
pub struct Loss {
    /// What is differentiated.
    pub total: Tensor,
    /// The parts to log and to name when they are not finite, by their names.
    pub terms: Vec<(&'static str, Tensor)>,
}

/// What is trained: it knows its data and its model.
pub trait Objective {
    /// The micro-batches of an epoch, as rows of the data: a pure function of the epoch, as many in
    /// each.
    ///
    /// # Errors
    /// If there is no data.
    fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>>;

    /// The mean loss over some rows, in the context that the loop gives: its pass, and where a loss was
    /// not finite a probe. What the method adds to it is the objective's business.
    ///
    /// # Errors
    /// If the forward pass fails.
    fn loss(&self, rows: &[usize], cx: &Context) -> Result<Loss>;

    /// How much a micro-batch counts among those of its step: what its mean is a mean over.
    fn weight(&self, rows: &[usize]) -> f64 {
        rows.len() as f64
    }

    /// What a run must find unchanged to go on from a checkpoint, by name: its data, its method.
    fn settings(&self) -> Settings {
        Settings::new()
    }

    /// What the method remembers from step to step, beside its parameters.
    ///
    /// # Errors
    /// If candle cannot copy.
    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(BTreeMap::new())
    }

    /// Puts back what [`Self::state`] gave.
    ///
    /// # Errors
    /// If it is not the state of this method on this model.
    fn restore(&self, _state: &BTreeMap<String, Tensor>) -> Result<()> {
        Ok(())
    }

    /// What the method does before optimiser step `step` (1-based) of `total`.
    ///
    /// # Errors
    /// Ends the run.
    fn before_step(&self, _step: usize, _total: usize) -> Result<()> {
        Ok(())
    }

    /// What the method does after optimiser step `step` (1-based) of `total`.
    ///
    /// # Errors
    /// Ends the run.
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

/// One optimiser step, as it is logged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRecord {
    /// The number of this step (1-based).
    pub step: usize,
    /// The epochs done, with the fraction of the present one.
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

/// What watches a run: logs, progress bars, evaluation.
pub trait Observer {
    /// Called before the first step with the number of all steps and of those that are done already: more than
    /// none where a run goes on from a checkpoint. Records of later steps should be dropped: they come again.
    ///
    /// # Errors
    /// Ends the run.
    fn start(&mut self, _total_steps: usize, _done: usize) -> Result<()> {
        Ok(())
    }

    /// Called for a fault that does not end the run: a damaged checkpoint, before an older one is
    /// taken, or an old one that cannot be removed.
    fn warned(&mut self, _what: &str) {}

    /// Whether the run should stop; asked after every step.
    fn stop(&self) -> bool {
        false
    }

    /// Called where a step was left out because its loss or gradient was not finite
    /// ([`OnNonFinite::Skip`](super::OnNonFinite::Skip)).
    ///
    /// # Errors
    /// Ends the run.
    fn skipped(&mut self, _step: usize, _why: &Error) -> Result<()> {
        Ok(())
    }

    /// Called after every step that was taken.
    ///
    /// # Errors
    /// Ends the run.
    fn step(&mut self, record: &StepRecord) -> Result<()>;

    /// Evaluates the present parameters; a higher score is better. None, or what is not
    /// finite: nothing to compare.
    ///
    /// # Errors
    /// Ends the run.
    fn evaluate(&mut self, step: usize) -> Result<Option<f64>>;

    /// Is told what the optimiser remembers of each parameter at the end of a run: of IVON the posterior
    /// ([`IvonPosterior`](crate::optim::IvonPosterior)), around the last step's parameters, which are the present ones: a
    /// better evaluation's are put back after this.
    ///
    /// # Errors
    /// The run is done; its caller gets the error.
    fn trained(&mut self, _moments: &BTreeMap<String, Moments>) -> Result<()> {
        Ok(())
    }

    /// Is told that the present parameters, those of `step`, are the best so far, or without
    /// [`keep_best`](super::TrainConfig::keep_best) merely the last evaluated: the moment to save them, since a run
    /// may die of what no error reports.
    ///
    /// # Errors
    /// Ends the run.
    fn kept(&mut self, _step: usize) -> Result<()> {
        Ok(())
    }
}

/// Watches nothing: a run that keeps its last parameters.
impl Observer for () {
    fn step(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn evaluate(&mut self, _: usize) -> Result<Option<f64>> {
        Ok(None)
    }
}

/// How a run went; the default is that of none.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Optimiser steps, skipped ones among them.
    pub steps: usize,
    /// Wall time, evaluations included, of all parts of a run that was resumed.
    pub seconds: f64,
    /// The median wall time of a step since the last start, evaluations excluded; none where a run that
    /// was at its end was resumed.
    pub step_seconds_median: Option<f64>,
    /// The step whose parameters were kept.
    pub kept_step: usize,
    /// Steps that were left out because something was not finite.
    pub skipped: usize,
    /// Whether it ended before its last step because evaluations got no better
    /// ([`patience`](super::TrainConfig::patience)).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stopped_early: bool,
}
