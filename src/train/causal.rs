//! Training of a language model with any of the methods, and its loss on held-out text.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::distributed::{in_turns, Communicator, SingleProcess};
use super::hooks::{MethodHooks, StepDone};
use super::objective::{Loss, Objective};
use super::settings::{self, Settings};
use crate::adapter::{Context, DrawCache, Params, Pass};
use crate::data::batch::{in_order, Batcher};
use crate::data::causal::{CausalBatch, Tokens};
use crate::error::{Error, Result};
use crate::models::causal::CausalLm;
use crate::optim::Gradients;
use crate::predict::token_log_probabilities;
use crate::util::check::at_least_one;

/// Returns the mean cross-entropy over the target tokens of a batch, in nats, as a scalar: f32 if the base is
/// half precision. The head only runs on positions that predict a target, so that prompt tokens cost no
/// logits.
///
/// # Errors
/// If the sequence is longer than the model's, or candle fails.
pub fn causal_loss(model: &dyn CausalLm, batch: &CausalBatch, cx: &Context) -> candle_core::Result<Tensor> {
    let hidden = model.hidden(&batch.input_ids, &batch.attention_mask, None, cx)?;
    let predicting = batch.positions.take(&hidden, cx.path)?; // (n, d)
    model.token_loss(&predicting, &batch.targets, cx)
}

/// Returns the mean cross-entropy over all target tokens of some rows, in nats; its exponential is the
/// perplexity. Over several passes, the probabilities of the target tokens are averaged first.
///
/// # Errors
/// If there is no row or no pass, or a forward pass fails.
pub fn held_out_loss(
    model: &dyn CausalLm,
    rows: &[Tokens],
    batch_size: usize,
    passes: &[Pass],
) -> Result<f64> {
    held_out_loss_in_turns(model, rows, batch_size, passes, &SingleProcess)
}

/// [`held_out_loss`] divided among several processes, which take the batches in turns and all get the same
/// result.
///
/// # Errors
/// As [`held_out_loss`]; an error of one process is returned on all.
pub fn held_out_loss_in_turns(
    model: &dyn CausalLm,
    rows: &[Tokens],
    batch_size: usize,
    passes: &[Pass],
    communicator: &dyn Communicator,
) -> Result<f64> {
    if rows.is_empty() {
        let reason = "there is no row to measure: none was given, or max_length left no room for an answer";
        return Err(Error::config("held-out data", reason));
    }
    at_least_one("passes", passes.len())?;
    let draws = DrawCache::default();
    let contexts: Vec<_> = passes.iter().map(|pass| Context::from(*pass).with_draws(&draws)).collect();
    let plan = in_order(rows.len(), batch_size)?;
    let sums = in_turns(communicator, plan.len(), &mut |i| {
        let chosen: Vec<&Tokens> = plan[i].iter().map(|row| &rows[*row]).collect();
        let batch = CausalBatch::collate(&chosen, 0, model.device())?;
        let logs = token_log_probabilities(model, &batch, &contexts)?;
        Ok(vec![logs.iter().sum(), logs.len() as f64])
    })?;
    let (mut sum, mut count) = (0.0, 0.0);
    for of_batch in sums {
        sum -= of_batch[0];
        count += of_batch[1];
    }
    Ok(sum / count)
}

/// The training objective of a language model on encoded rows.
pub struct CausalTuning<'a> {
    model: &'a dyn CausalLm,
    hooks: MethodHooks,
    rows: &'a [Tokens],
    batcher: Batcher,
    pad_id: u32,
    /// The number of target tokens in all rows, over which the loss of an epoch is a mean.
    targets: usize,
}

impl std::fmt::Debug for CausalTuning<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CausalTuning").field("rows", &self.rows.len()).finish_non_exhaustive()
    }
}

impl<'a> CausalTuning<'a> {
    /// The training of `model` with its adapters on `rows`, in batches of `batcher` that are padded with the
    /// token `pad_id`. `hooks` are what the method adds to the task's loss.
    pub fn new(
        model: &'a dyn CausalLm,
        hooks: MethodHooks,
        rows: &'a [Tokens],
        batcher: Batcher,
        pad_id: u32,
    ) -> Self {
        let targets = rows.iter().map(Tokens::targets).sum();
        Self { model, hooks, rows, batcher, pad_id, targets }
    }

    fn chosen(&self, rows: &[usize]) -> Result<Vec<&Tokens>> {
        let chosen: Option<Vec<&Tokens>> = rows.iter().map(|row| self.rows.get(*row)).collect();
        chosen.ok_or_else(|| Error::config("rows", format!("{rows:?} are not all in the data")))
    }
}

impl Objective for CausalTuning<'_> {
    fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>> {
        let lengths: Vec<usize> = self.rows.iter().map(|row| row.ids.len()).collect();
        Ok(self.batcher.epoch(&lengths, epoch))
    }

    fn loss(&self, rows: &[usize], cx: &Context) -> Result<Loss> {
        let cx = self.hooks.context(cx)?;
        let batch = CausalBatch::collate(&self.chosen(rows)?, self.pad_id, self.model.device())?;
        let task = causal_loss(self.model, &batch, &cx)?;
        self.hooks.loss(task, self.model, &cx, Some(self.targets))
    }

    fn weight(&self, rows: &[usize]) -> f64 {
        rows.iter().filter_map(|row| self.rows.get(*row)).map(|row| row.targets() as f64).sum()
    }

    fn settings(&self) -> Settings {
        let numbers = self.rows.iter().flat_map(Tokens::numbers);
        settings::of_run(&self.batcher, self.hooks.settings(), self.model, numbers)
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.hooks.state()
    }

    fn restore(&self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.hooks.restore(self.model, state)
    }

    fn before_step(&self, step: usize, total: usize) -> Result<()> {
        self.hooks.before_step(step, total)
    }

    fn after_step(&self, params: &Params, gradients: &Gradients, step: usize, total: usize) -> Result<()> {
        let (rows, batch_size) = (self.rows.len(), self.batcher.batch_size());
        let model = self.model;
        self.hooks.after_step(&StepDone { model, params, gradients, step, total, rows, batch_size })
    }
}
