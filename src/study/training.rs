//! Trains a cell of any kind of model by its recipe; post-hoc recipes in two phases that share one budget.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

use candle_core::Tensor;

use super::cell::{CellCost, CellKey, CellResult, Status};
use super::recipe::Recipe;
use super::rows::CellRows;
use crate::adapter::{Context, Params};
use crate::data::batch::Batcher;
use crate::error::{Error, Result};
use crate::noise::Noise;
use crate::optim::{Gradients, Moments};
use crate::peft::{AdapterFile, AdapterMethod};
use crate::train::{
    self, Loss, MethodInit, Objective, Observer, RunFolder, Settings, StepRecord, Summary, TrainConfig,
};

/// The most points of a loss curve in a result.
const LOSS_POINTS: usize = 200;

/// A kind of model and the rows that it is trained on.
pub(super) trait Learner {
    /// A loaded model and its trained parameters.
    type Model;

    /// Loads the model with a method whose parameters are initialised from `noise`.
    ///
    /// # Errors
    /// If the files, the method and the rows do not fit together.
    fn load(&self, start: &MethodInit, noise: Noise) -> Result<Self::Model>;

    /// The trained parameters of a model.
    fn params<'m>(&self, model: &'m Self::Model) -> &'m Params;

    /// The adapter of a model, with its head if it has one.
    ///
    /// # Errors
    /// If the model has no adapter of this method.
    fn adapter(&self, model: &Self::Model, method: &AdapterMethod) -> Result<AdapterFile>;

    /// The training objective of a loaded model; called once per model.
    fn objective<'m>(&'m self, model: &'m Self::Model, batcher: Batcher) -> Box<dyn Objective + 'm>;

    /// The number of training rows.
    fn rows(&self) -> usize;

    /// The number of passes over the training rows.
    fn epochs(&self) -> usize;
}

/// A trained model.
pub(super) struct Trained<M> {
    pub model: M,
    /// The last checkpoints of the training, including its end.
    pub members: Vec<BTreeMap<String, Tensor>>,
    /// The optimiser's moments at the end.
    pub moments: BTreeMap<String, Moments>,
}

/// Runs a cell by `fill`, which fills in the result `begun`, the cost and the rows. Errors are results, too:
/// a loss, gradient or prediction that is not finite gives [`Status::Diverged`], any other error
/// [`Status::Failed`].
pub(super) fn attempt(
    begun: CellResult,
    fill: impl FnOnce(&mut CellResult, &mut CellCost, &mut CellRows) -> Result<()>,
) -> (CellResult, CellCost, CellRows) {
    let clock = Instant::now();
    let mut result = begun;
    let mut cost = CellCost { seconds: 0.0, step_seconds_median: 0.0, peak_rss_mb: None };
    let mut rows = CellRows::default();
    if let Err(error) = fill(&mut result, &mut cost, &mut rows) {
        let diverged = matches!(error, Error::NonFinite { .. });
        result.status = if diverged { Status::Diverged } else { Status::Failed };
        result.reason = Some(error.to_string());
        // Measurements from before the error do not count.
        result.forget_measurements();
        rows = CellRows::default();
        cost.seconds = clock.elapsed().as_secs_f64();
    }
    (result, cost, rows)
}

/// Trains a cell's model by its recipe and records the losses, steps and costs. Keeps the last `members` of
/// five checkpoints at equal distances.
///
/// A posterior that is added to a LoRA trained here shares its budget: the LoRA has the first half of the
/// steps and the posterior the second, as in section 6.4 of the paper (10 of 20 epochs each).
///
/// # Errors
/// As [`Learner::load`] and [`train::fit`].
pub(super) fn train<L: Learner>(
    learner: &L,
    recipe: &Recipe,
    key: &CellKey,
    members: usize,
    result: &mut CellResult,
    cost: &mut CellCost,
) -> Result<Trained<L::Model>> {
    let batcher = Batcher::new(key.batch_size, false, Noise::new(key.seed))?;
    let mut run = Run { learner, recipe, key, batcher, losses: Vec::new() };
    let trained = run.train(members, result, cost);
    result.losses = curve(&run.losses);
    let trained = trained?;
    cost.peak_rss_mb = train::peak_rss_bytes().map(|bytes| bytes as f64 / 1e6);
    Ok(trained)
}

/// The training of a cell in progress.
struct Run<'a, L: Learner> {
    learner: &'a L,
    recipe: &'a Recipe,
    key: &'a CellKey,
    batcher: Batcher,
    losses: Vec<(usize, f64)>,
}

impl<L: Learner> Run<'_, L> {
    fn train(
        &mut self,
        members: usize,
        result: &mut CellResult,
        cost: &mut CellCost,
    ) -> Result<Trained<L::Model>> {
        let Recipe { method, targets, post_hoc, adapter, .. } = self.recipe;
        let fresh = MethodInit::Fresh(method.clone(), targets.clone());
        let (trained, summary) = match (post_hoc, adapter) {
            (None, _) => self.phase(&fresh, None, members, result)?,
            (Some(config), Some(dir)) => {
                let start = MethodInit::PostHoc(
                    Box::new(AdapterFile::read(RunFolder::find_adapter(dir))?),
                    config.clone(),
                );
                self.phase(&start, None, members, result)?
            }
            (Some(config), None) => {
                let steps = self.batcher.batches(self.learner.rows()) * self.learner.epochs();
                let half = steps.div_ceil(2);
                let (lora, first) = self.phase(&fresh, Some(0..half), 0, result)?;
                let none = || Error::config("method", "post-hoc begins with LoRA");
                let file = self.learner.adapter(&lora.model, &method.adapter().ok_or_else(none)?)?;
                drop(lora);
                let start = MethodInit::PostHoc(Box::new(file), config.clone());
                let (trained, second) = self.phase(&start, Some(half..steps), members, result)?;
                // The median step time is that of the posterior's phase: the first phase is plain LoRA.
                let steps = first.steps + second.steps;
                (trained, Summary { steps, seconds: first.seconds + second.seconds, ..second })
            }
        };
        result.steps = summary.steps;
        cost.seconds = summary.seconds;
        cost.step_seconds_median = summary.step_seconds_median.unwrap_or_default();
        Ok(trained)
    }

    /// Loads a model and trains it for all steps of the cell, or for a part of them.
    fn phase(
        &mut self,
        start: &MethodInit,
        part: Option<Range<usize>>,
        members: usize,
        result: &mut CellResult,
    ) -> Result<(Trained<L::Model>, Summary)> {
        let noise = Noise::new(self.key.seed);
        let model = self.learner.load(start, noise)?;
        let params = self.learner.params(&model);
        let whole = self.learner.objective(&model, self.batcher);
        let all = self.batcher.batches(self.learner.rows()) * self.learner.epochs();
        let (steps, first) = part.as_ref().map_or((all, 0), |part| (part.len(), part.start));
        // Summed over phases, since each trains its own parameters.
        result.trainable_parameters += params.trainable_count();
        let config = TrainConfig {
            epochs: if part.is_some() { 1 } else { self.learner.epochs() },
            lr: self.key.lr,
            loraplus_ratio: self.recipe.loraplus_ratio,
            head_lr_ratio: self.recipe.head_lr_ratio,
            variational_lr_ratio: self.recipe.variational_lr_ratio,
            ivon: self.recipe.ivon.clone(),
            // IVON clips each element itself.
            clip: TrainConfig::default().clip.filter(|_| self.recipe.ivon.is_none()),
            // Keep the last parameters: choosing by the measured rows would make every method look better.
            keep_best: false,
            eval_every: Some(steps.div_ceil(5).max(1)),
            ..TrainConfig::default()
        };
        let mut history = History {
            params,
            keep: members,
            losses: Vec::new(),
            members: Vec::new(),
            moments: BTreeMap::new(),
        };
        let summary = match part {
            None => train::fit(whole.as_ref(), params, &config, &mut history),
            Some(steps) => {
                let objective = Part { whole: whole.as_ref(), steps };
                train::fit(&objective, params, &config, &mut history)
            }
        };
        self.losses.extend(history.losses.into_iter().map(|(step, loss)| (first + step, loss)));
        let (members, moments) = (history.members, history.moments);
        drop(whole);
        Ok((Trained { model, members, moments }, summary?))
    }
}

/// A range of a training's steps as one epoch, with the batches that the whole training has in these steps.
struct Part<'a> {
    whole: &'a dyn Objective,
    steps: Range<usize>,
}

impl Objective for Part<'_> {
    fn epoch(&self, _epoch: u64) -> Result<Vec<Vec<usize>>> {
        let per_epoch = self.whole.epoch(0)?.len().max(1);
        let first = self.steps.start / per_epoch;
        let mut batches = Vec::new();
        for epoch in first..self.steps.end.div_ceil(per_epoch) {
            batches.extend(self.whole.epoch(epoch as u64)?);
        }
        Ok(batches.into_iter().skip(self.steps.start - first * per_epoch).take(self.steps.len()).collect())
    }

    fn loss(&self, rows: &[usize], cx: &Context) -> Result<Loss> {
        self.whole.loss(rows, cx)
    }

    fn weight(&self, rows: &[usize]) -> f64 {
        self.whole.weight(rows)
    }

    fn settings(&self) -> Settings {
        self.whole.settings()
    }

    fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.whole.state()
    }

    fn restore(&self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.whole.restore(state)
    }

    fn before_step(&self, step: usize, total: usize) -> Result<()> {
        self.whole.before_step(step, total)
    }

    fn after_step(&self, params: &Params, gradients: &Gradients, step: usize, total: usize) -> Result<()> {
        self.whole.after_step(params, gradients, step, total)
    }
}

/// The curve of the task's loss: means over pieces of equal length, each at its last step.
fn curve(losses: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let piece = losses.len().div_ceil(LOSS_POINTS).max(1);
    let mean = |piece: &[(usize, f64)]| piece.iter().map(|(_, loss)| loss).sum::<f64>() / piece.len() as f64;
    losses.chunks(piece).filter_map(|piece| Some((piece.last()?.0, mean(piece)))).collect()
}

/// Records the losses, the last checkpoints and the moments of a run.
struct History<'a> {
    params: &'a Params,
    /// The number of checkpoints to keep.
    keep: usize,
    losses: Vec<(usize, f64)>,
    members: Vec<BTreeMap<String, Tensor>>,
    moments: BTreeMap<String, Moments>,
}

impl Observer for History<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::adapter::{Init, Role};

    /// Three batches per epoch, each with a number of its own.
    struct Counted;

    impl Objective for Counted {
        fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>> {
            Ok((0..3).map(|place| vec![3 * epoch as usize + place]).collect())
        }

        fn loss(&self, _rows: &[usize], _cx: &Context) -> Result<Loss> {
            Err(Error::config("loss", "nobody asks"))
        }
    }

    #[test]
    fn parts_of_a_training_are_its_batches_in_their_order_and_none_twice() -> Result<()> {
        for (all, half) in [(9, 5), (6, 3), (3, 2), (1, 1)] {
            let of = |steps: Range<usize>| Part { whole: &Counted, steps }.epoch(0);
            let seen: Vec<usize> =
                of(0..half)?.into_iter().chain(of(half..all)?).map(|batch| batch[0]).collect();
            assert_eq!(seen, (0..all).collect::<Vec<_>>());
            assert_eq!(of(0..half)?.len(), half);
        }
        Ok(())
    }

    #[test]
    fn the_last_checkpoints_are_kept() -> Result<()> {
        let params = Params::new(Noise::new(1), &Device::Cpu);
        params.create("w", Role::A, 1, &Init::Constant(0.0))?;
        let mut history =
            History { params: &params, keep: 3, losses: vec![], members: vec![], moments: BTreeMap::new() };
        for step in 1..=5 {
            params.set("w", &Tensor::new(&[step as f32], &Device::Cpu)?)?;
            history.evaluate(step)?;
        }
        let values = history.members.iter().map(|member| Ok(member["w"].to_vec1::<f32>()?[0]));
        assert_eq!(values.collect::<Result<Vec<_>>>()?, [3.0, 4.0, 5.0]);
        Ok(())
    }

    #[test]
    fn a_curve_has_few_points_and_the_mean_of_the_losses() {
        let losses: Vec<(usize, f64)> = (1..=1000).map(|step| (step, step as f64)).collect();
        let points = curve(&losses);
        assert_eq!((points.len(), points[0], points[199]), (200, (5, 3.0), (1000, 998.0)));
        assert_eq!(curve(&losses[..3]), losses[..3]);
        assert!(curve(&[]).is_empty());
    }
}
