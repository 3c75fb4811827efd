//! The training loop of all methods and models: [`fit`].

mod resume;

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::Tensor;

use super::checkpoint::{Checkpoints, Found, RunState};
use super::config::{OnNonFinite, TrainConfig};
use super::distributed::{Communicator, Ranks, SingleProcess};
use super::objective::{Objective, Observer, StepRecord, Summary};
use super::settings::Settings;
use super::step::{clip, group_gradients};
use crate::adapter::Params;
use crate::error::{Error, Result};
use crate::metrics::median;
use crate::optim::Optimizer;
use crate::util::files::{self, Lock};

/// The number of consecutive skipped steps at which a run ends.
const MAX_SKIPPED: usize = 10;

/// Trains `params` on `objective`. Draws are numbered from 0: one per micro-batch, or one per step with
/// [`TrainConfig::shared_draw`].
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Linear;
/// use monteclora::train::{fit, Loss, Objective, Observer, StepRecord, TrainConfig};
/// use monteclora::{Context, MonteCLoRAConfig, MonteCLoRALinear, Noise, Params, Regularizer, Result};
///
/// /// A layer that learns to give one, on eight rows in batches of four.
/// struct Ones(MonteCLoRALinear, Regularizer);
///
/// impl Objective for Ones {
///     fn epoch(&self, _epoch: u64) -> Result<Vec<Vec<usize>>> {
///         Ok(vec![(0..4).collect(), (4..8).collect()])
///     }
///     fn loss(&self, rows: &[usize], cx: &Context) -> Result<Loss> {
///         let xs = Tensor::ones((rows.len(), 4), DType::F32, &Device::Cpu)?;
///         let task = (self.0.forward_with(&xs, cx)? - 1.0)?.sqr()?.mean_all()?;
///         let total = (&task + self.1.for_layers(&[self.0.adapter()], cx)?.total)?;
///         Ok(Loss { total, terms: vec![("task", task)] })
///     }
/// }
///
/// #[derive(Default)]
/// struct Losses(Vec<f64>);
///
/// impl Observer for Losses {
///     fn step(&mut self, record: &StepRecord) -> Result<()> {
///         self.0.push(record.terms["task"]);
///         Ok(())
///     }
///     fn evaluate(&mut self, _step: usize) -> Result<Option<f64>> {
///         Ok(None) // nothing to compare: the last parameters stay
///     }
/// }
///
/// let params = Params::new(Noise::new(3), &Device::Cpu);
/// let base = Linear::new(Tensor::zeros((6, 4), DType::F32, &Device::Cpu)?, None);
/// let config = MonteCLoRAConfig { rank: 2, ..Default::default() };
/// let layer = MonteCLoRALinear::new(base, &params, "proj", &config)?;
/// let objective = Ones(layer, Regularizer::new(&config));
/// let mut losses = Losses::default();
/// let summary = fit(&objective, &params, &TrainConfig { epochs: 20, lr: 0.05, ..Default::default() }, &mut losses)?;
/// assert_eq!((summary.steps, losses.0[0]), (40, 1.0)); // B is zero at the start
/// assert!(losses.0[39] < 0.1, "{:?}", losses.0);
/// # Ok::<(), monteclora::Error>(())
/// ```
///
/// # Errors
/// [`Error::NonFinite`] if a loss or gradient is not finite: it names the step, the term and the rows;
/// [`Error::Interrupted`] if the observer asks to stop; errors of the objective, the observer or the
/// optimiser. In each case the parameters of the best evaluation so far, if any, are restored. An option
/// outside its domain is an error before the first step.
pub fn fit(
    objective: &dyn Objective,
    params: &Params,
    config: &TrainConfig,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    run(objective, params, config, observer, None, &SingleProcess)
}

/// [`fit`] with checkpoints: a run that was killed or stopped resumes from the newest one and, on the CPU,
/// ends with the same bits as an uninterrupted run.
///
/// # Errors
/// As [`fit`]; if a checkpoint cannot be written; or if the run cannot resume from the existing checkpoints:
/// they are damaged, of other parameters, or of other settings (of `config` and [`Objective::settings`]) in
/// more than [`Checkpoints::changes`] allows.
pub fn fit_with_checkpoints(
    objective: &dyn Objective,
    params: &Params,
    config: &TrainConfig,
    observer: &mut dyn Observer,
    checkpoints: &Checkpoints,
) -> Result<Summary> {
    run(objective, params, config, observer, Some(checkpoints), &SingleProcess)
}

/// [`fit`] in each of several processes, which share the micro-batches of a step
/// ([`distributed`](super::distributed)), with or without checkpoints. All processes pass the same objective,
/// parameters and settings, and return the same result. Each has an observer; only the scores of rank 0
/// count. Only rank 0 reads and writes checkpoints; the other ranks need the checkpoints' settings.
///
/// # Errors
/// As [`fit_with_checkpoints`]. An error in a step, an evaluation or a checkpoint is returned on all
/// processes, as [`Error::Distributed`] on those where it did not occur. An error of a single process before
/// its first step, in an epoch's order or after its last step is only returned there: the caller must then
/// call [`Communicator::abort`], or the others wait until their patience ends. Also if a step has fewer
/// micro-batches ([`TrainConfig::accumulation`]) than there are processes, if their parameters or settings
/// differ, or if the optimiser is IVON, whose draws are not summed over processes.
pub fn fit_distributed(
    objective: &dyn Objective,
    params: &Params,
    config: &TrainConfig,
    observer: &mut dyn Observer,
    checkpoints: Option<&Checkpoints>,
    communicator: &dyn Communicator,
) -> Result<Summary> {
    run(objective, params, config, observer, checkpoints, communicator)
}

fn run(
    objective: &dyn Objective,
    params: &Params,
    config: &TrainConfig,
    observer: &mut dyn Observer,
    checkpoints: Option<&Checkpoints>,
    communicator: &dyn Communicator,
) -> Result<Summary> {
    config.validate()?;
    config.validate_for(communicator.world())?;
    params.check_finite()?;
    if params.trainable().is_empty() {
        return Err(Error::config("params", "no parameter is trainable"));
    }
    let optimizer = config.optimizer(params)?;
    let per_epoch = objective.epoch(0)?.len().div_ceil(config.accumulation);
    if per_epoch == 0 {
        return Err(Error::config("data", "there is no batch to train on"));
    }
    let total = per_epoch.checked_mul(config.epochs).ok_or_else(|| {
        let reason = format!("{} of {per_epoch} steps are more than can be counted", config.epochs);
        Error::config("epochs", reason)
    })?;
    let total = total.min(config.max_steps.unwrap_or(usize::MAX));
    let mut settings = objective.settings();
    settings.extend(config.settings());
    settings.extend(checkpoints.map(|checkpoints| checkpoints.settings.clone()).unwrap_or_default());
    let mut run = Run {
        objective,
        params,
        config,
        checkpoints,
        settings,
        per_epoch,
        total,
        optimizer,
        best: None,
        at: RunState::default(),
        clock: Instant::now(),
        seconds: Vec::new(),
        ranks: Ranks::new(communicator),
        stops: false,
    };
    let _lock = run.begin(observer)?;
    run.ranks.check_same(&run.settings, params)?;
    // A run that ended early has no more steps, whatever its schedule says.
    let total_left = if run.is_out_of_patience() { run.at.step } else { total };
    run.ranks.hold(observer.start(total_left, run.at.step))?;
    let outcome = run.steps(observer).and_then(|()| run.ranks.finish(params));
    // Before the best parameters are restored: the optimiser state belongs to the present ones.
    let outcome = outcome.and_then(|()| observer.trained(run.optimizer.remembered()));
    let keep_best = config.keep_best || outcome.is_err();
    let kept_step = match run.best.take().filter(|_| keep_best) {
        Some(best) => {
            params.restore(&best.values)?;
            best.step
        }
        None => run.at.step,
    };
    outcome?;
    Ok(Summary {
        steps: run.at.step,
        seconds: run.seconds_so_far(),
        step_seconds_median: (!run.seconds.is_empty()).then(|| median(&run.seconds)),
        kept_step,
        skipped: run.at.skipped,
        stopped_early: run.at.step < total,
    })
}

/// A run in progress.
struct Run<'a> {
    objective: &'a dyn Objective,
    params: &'a Params,
    config: &'a TrainConfig,
    checkpoints: Option<&'a Checkpoints>,
    settings: Settings,
    per_epoch: usize,
    total: usize,
    optimizer: Optimizer,
    best: Option<Best>,
    /// The position of the run. Its seconds are those before the last start; settings, moments and best are
    /// only filled in for a checkpoint.
    at: RunState,
    clock: Instant,
    seconds: Vec<f64>,
    ranks: Ranks<'a>,
    /// With several processes: whether any of them was asked to stop before this step.
    stops: bool,
}

struct Best {
    score: f64,
    step: usize,
    values: BTreeMap<String, Tensor>,
}

impl Run<'_> {
    /// Locks the folder of the checkpoints and resumes from the newest one, which rank 0 reads for all.
    fn begin(&mut self, observer: &mut dyn Observer) -> Result<Option<Lock>> {
        let Some(checkpoints) = self.checkpoints else { return Ok(None) };
        let mut lock = None;
        let found = if self.ranks.is_first() {
            let locked = files::lock(&checkpoints.dir).map(|locked| {
                if locked.is_none() {
                    let what =
                        "this file system has no locks: see that no other process trains into the folder";
                    observer.warned(what);
                }
                lock = locked;
            });
            locked.and_then(|()| checkpoints.begin(&self.settings))
        } else {
            Ok(None)
        };
        let found = found.map(|found| {
            found.map(|Found { state, warnings }| {
                warnings.iter().for_each(|what| observer.warned(what));
                state
            })
        });
        if let Some(state) = self.ranks.state_of_first(found)? {
            let forgotten = self.resume(state)?;
            forgotten.iter().filter(|_| self.ranks.is_first()).for_each(|what| observer.warned(what));
        }
        Ok(lock)
    }

    /// Takes the remaining steps of all epochs, with their evaluations, or until patience ends.
    fn steps(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let (config, per_epoch) = (self.config, self.per_epoch);
        if self.at.step >= self.total || self.is_out_of_patience() {
            return Ok(()); // resumed after its end
        }
        for epoch in self.at.step / per_epoch..config.epochs {
            let micro_batches = self.objective.epoch(epoch as u64)?;
            let steps = micro_batches.len().div_ceil(config.accumulation);
            if steps != per_epoch {
                let reason = format!("epoch {epoch} has {steps} steps, the first had {per_epoch}");
                return Err(Error::config("data", reason));
            }
            let done = self.at.step - epoch * per_epoch;
            for group in micro_batches.chunks(config.accumulation).skip(done) {
                self.step(group, observer)?;
                let step = self.at.step;
                let every = config.eval_every.unwrap_or(per_epoch);
                let evaluates = step.is_multiple_of(every) || step == self.total;
                if evaluates {
                    self.evaluate(observer)?;
                }
                let stops = if self.ranks.are_several() { self.stops } else { observer.stop() };
                let ends = step == self.total || self.is_out_of_patience();
                if let Some(checkpoints) = self.checkpoints {
                    let due = checkpoints.every.map_or(evaluates, |every| step.is_multiple_of(every));
                    // A step that failed here is no state to resume from.
                    if (due || stops || ends) && self.ranks.is_first() && self.ranks.is_well() {
                        let saved = self.state().and_then(|state| checkpoints.save(&state));
                        let told = saved.map(|warning| warning.iter().for_each(|what| observer.warned(what)));
                        self.ranks.hold(told)?;
                    }
                }
                if ends {
                    return Ok(());
                }
                if stops {
                    self.ranks.finish(self.params)?;
                    return Err(Error::Interrupted { step });
                }
            }
        }
        Ok(())
    }

    /// Takes one optimiser step.
    fn step(&mut self, group: &[Vec<usize>], observer: &mut dyn Observer) -> Result<()> {
        let (config, total, clock) = (self.config, self.total, Instant::now());
        let warmup = (config.warmup_ratio * total as f64).ceil() as usize;
        let (step, draw) = (self.at.step + 1, self.at.draw);
        let lr = config.lr * config.schedule.factor(step - 1, warmup, total);
        self.ranks.hold(self.objective.before_step(step, total))?;
        let max_norm = config.clip.filter(|_| config.ivon.is_none());
        let (optimizer, ranks) = (&mut self.optimizer, &mut self.ranks);
        let own = ranks.held().and_then(|()| {
            let takes = |i| ranks.takes(i);
            group_gradients(self.objective, self.params, optimizer, config, group, (step, draw), &takes)
        });
        let stop = ranks.are_several() && observer.stop();
        let done = ranks.sum(self.params, own, stop).and_then(|(mut done, stops)| {
            self.stops = stops;
            Ok((clip(&mut done.grads, max_norm, step, group)?, done))
        });
        self.at.step = step;
        self.at.draw = draw + if config.shared_draw { 1 } else { group.len() as u64 };
        if done.is_err() {
            self.optimizer.skip()?;
        }
        let (grad_norm, done) = match done {
            Err(why @ Error::NonFinite { .. }) if config.on_nonfinite == OnNonFinite::Skip => {
                self.at.skipped += 1;
                self.at.skipped_in_a_row += 1;
                self.ranks.hold(observer.skipped(step, &why))?;
                return if self.at.skipped_in_a_row < MAX_SKIPPED { Ok(()) } else { Err(why) };
            }
            done => done?,
        };
        let stepped = self.optimizer.step(&done.grads, lr);
        let after = stepped.and_then(|()| self.objective.after_step(self.params, &done.grads, step, total));
        let done_well = after.is_ok();
        self.ranks.hold(after)?;
        self.at.skipped_in_a_row = 0;
        self.seconds.push(clock.elapsed().as_secs_f64());
        let epoch = step as f64 / self.per_epoch as f64;
        let record = StepRecord { step, epoch, lr, loss: done.loss, terms: done.terms, grad_norm };
        match done_well {
            true => self.ranks.hold(observer.step(&record)),
            false => Ok(()), // the other processes must learn of the error first
        }
    }

    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let step = self.at.step;
        // Evaluate even if an error is pending, as other processes may wait for this one's share. Scores that
        // are not finite are ignored: NaN does not compare, and infinity would stay the best for ever.
        let given = observer.evaluate(step);
        let given = self.ranks.held().and(given).map(|given| given.map(f64::to_bits));
        let given = self.ranks.of_first(given)?.map(f64::from_bits);
        let score = given.filter(|score| score.is_finite());
        let better = |score: &f64| self.best.as_ref().is_none_or(|best| *score > best.score);
        let improved = score.filter(better);
        match (given, improved) {
            (Some(_), None) if self.config.patience.is_some() => self.at.waited += 1,
            (Some(_), _) => self.at.waited = 0,
            (None, _) => {} // nothing to compare
        }
        if let Some(score) = improved {
            self.best = Some(Best { score, step, values: self.params.snapshot()? });
        }
        if improved.is_some() || !self.config.keep_best {
            self.ranks.hold(observer.kept(step))
        } else {
            Ok(())
        }
    }

    /// Whether evaluations have not improved for as long as `patience` allows.
    fn is_out_of_patience(&self) -> bool {
        self.config.patience.is_some_and(|patience| self.at.waited >= patience)
    }

    fn seconds_so_far(&self) -> f64 {
        self.at.seconds + self.clock.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod option_tests;
#[cfg(test)]
mod tests;
