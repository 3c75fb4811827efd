//! What the loop is given: an objective to train and an observer that watches.

use candle_core::Tensor;
use serde::Serialize;

use super::gradients::Gradients;
use crate::error::Result;
use crate::params::Params;
use crate::slot::Pass;

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

    /// The mean loss over some rows.
    ///
    /// # Errors
    /// If the forward pass fails.
    fn loss(&self, rows: &[usize], pass: &Pass) -> Result<Loss>;

    /// How much a micro-batch counts among those of its step: what its mean is a mean over.
    fn weight(&self, rows: &[usize]) -> f64 {
        rows.len() as f64
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
pub struct Record {
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
    pub terms: std::collections::BTreeMap<&'static str, f64>,
    /// The global gradient norm before clipping.
    pub grad_norm: f64,
}

/// What watches a run: logs, progress bars, evaluation.
pub trait Observer {
    /// Is told of the number of steps before the first.
    fn start(&mut self, _total_steps: usize) {}

    /// Is told of every step.
    ///
    /// # Errors
    /// Ends the run.
    fn step(&mut self, record: &Record) -> Result<()>;

    /// Evaluates the present parameters; a higher score is better. None, or NaN: nothing to
    /// compare.
    ///
    /// # Errors
    /// Ends the run.
    fn evaluate(&mut self, step: usize) -> Result<Option<f64>>;

    /// Is told that the present parameters, those of `step`, are the best so far, or without
    /// [`TrainConfig::keep_best`] merely the last evaluated: the moment to save them, since a run
    /// may die of what no error reports.
    ///
    /// # Errors
    /// Ends the run.
    fn kept(&mut self, _step: usize) -> Result<()> {
        Ok(())
    }
}

/// How a run went; the default is that of none.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Optimiser steps taken.
    pub steps: usize,
    /// Wall time, evaluations included.
    pub seconds: f64,
    /// The median wall time of a step, evaluations excluded.
    pub step_seconds_median: f64,
    /// The step whose parameters were kept.
    pub kept_step: usize,
}
