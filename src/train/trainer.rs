//! The one training loop: every method and every model runs through [`fit`].

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::checkpoint::{Checkpoints, Found, RunState, State};
use super::config::{OnNonFinite, TrainConfig};
use super::objective::{Loss, Objective, Observer, Record, Summary};
use super::settings::Settings;
use crate::adapter::{Context, Params, Pass, Probe};
use crate::error::{Error, Result};
use crate::metrics::median;
use crate::ops::Tape;
use crate::optim::{clip_grad_norm, Gradients, Optimizer};
use crate::util::files;

/// Steps in a row that may be skipped.
const MOST_SKIPPED: usize = 10;

/// Trains `params` on `objective`. The draw index counts micro-batches from zero.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Linear;
/// use monteclora::train::{fit, Loss, Objective, Observer, Record, TrainConfig};
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
///     fn step(&mut self, record: &Record) -> Result<()> {
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
/// [`Error::NonFinite`] when a loss or gradient is not finite: it names the step, the term and the
/// rows; [`Error::Interrupted`] when the observer asks to stop. Besides, what the objective, the
/// observer or the optimiser report. On any of them the parameters of the best evaluation, if there was
/// one, are put back. Before the first step, an option outside its domain is named.
pub fn fit(
    objective: &dyn Objective,
    params: &Params,
    config: &TrainConfig,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    run(objective, params, config, observer, None)
}

/// [`fit`] with checkpoints: a run that was killed, or stopped, goes on from the newest of them and
/// ends, on the CPU, with the same bits as one that was not.
///
/// # Errors
/// As [`fit`]; besides, if a checkpoint cannot be written, or the run cannot go on from those that there
/// are: they are damaged, of other parameters, or of other settings (those of `config` and
/// [`Objective::settings`]) in what [`Checkpoints::changes`] does not name.
pub fn fit_with_checkpoints(
    objective: &dyn Objective,
    params: &Params,
    config: &TrainConfig,
    observer: &mut dyn Observer,
    checkpoints: &Checkpoints,
) -> Result<Summary> {
    run(objective, params, config, observer, Some(checkpoints))
}

fn run(
    objective: &dyn Objective,
    params: &Params,
    config: &TrainConfig,
    observer: &mut dyn Observer,
    checkpoints: Option<&Checkpoints>,
) -> Result<Summary> {
    config.validate()?;
    params.check_finite()?;
    let optimizer = config.optimizer(params)?;
    let per_epoch = objective.epoch(0)?.len().div_ceil(config.accumulation);
    if per_epoch == 0 {
        return Err(Error::config("data", "there is no batch to train on"));
    }
    let total = per_epoch.checked_mul(config.epochs).ok_or_else(|| {
        let reason = format!("{} of {per_epoch} steps are more than can be counted", config.epochs);
        Error::config("epochs", reason)
    })?;
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
    };
    let lock = checkpoints.map(|checkpoints| files::lock(&checkpoints.dir)).transpose()?;
    if let Some(None) = lock {
        observer.warned("this file system has no locks: see that no other process trains into the folder");
    }
    let found = checkpoints.map(|checkpoints| checkpoints.begin(&run.settings)).transpose()?.flatten();
    if let Some(Found { state, warnings }) = found {
        warnings.iter().for_each(|what| observer.warned(what));
        run.resume(state)?;
    }
    observer.start(total, run.at.step)?;
    let outcome = run.steps(observer);
    let keep_best = config.keep_best || outcome.is_err();
    let kept_step = match run.best.take().filter(|_| keep_best) {
        Some(best) => {
            params.restore(&best.values)?;
            best.step
        }
        None => run.at.step,
    };
    outcome?;
    observer.trained(run.optimizer.remembered())?;
    Ok(Summary {
        steps: run.at.step,
        seconds: run.seconds_so_far(),
        step_seconds_median: (!run.seconds.is_empty()).then(|| median(&run.seconds)),
        kept_step,
        skipped: run.at.skipped,
        stopped_early: run.at.step < total,
    })
}

/// A run on its way.
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
    /// Where it is. Of the seconds those before the last start; settings, moments and best are filled
    /// in for a checkpoint alone.
    at: RunState,
    clock: Instant,
    seconds: Vec<f64>,
}

struct Best {
    score: f64,
    step: usize,
    values: BTreeMap<String, Tensor>,
}

impl Run<'_> {
    /// All steps of all epochs that are left, with their evaluations, or those until patience ends.
    fn steps(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let (config, per_epoch) = (self.config, self.per_epoch);
        if self.is_out_of_patience() {
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
                let evaluates = match config.eval_every {
                    Some(every) => step.is_multiple_of(every) || step == self.total,
                    None => step.is_multiple_of(per_epoch),
                };
                if evaluates {
                    self.evaluate(observer)?;
                }
                let stops = observer.stop();
                let ends = step == self.total || self.is_out_of_patience();
                if let Some(checkpoints) = self.checkpoints {
                    let due = checkpoints.every.map_or(evaluates, |every| step.is_multiple_of(every.max(1)));
                    if due || stops || ends {
                        if let Some(what) = checkpoints.save(&self.state()?)? {
                            observer.warned(&what);
                        }
                    }
                }
                if ends {
                    return Ok(());
                }
                if stops {
                    return Err(Error::Interrupted { step });
                }
            }
        }
        Ok(())
    }

    /// One optimiser step.
    fn step(&mut self, group: &[Vec<usize>], observer: &mut dyn Observer) -> Result<()> {
        let (config, total, clock) = (self.config, self.total, Instant::now());
        let warmup = (config.warmup_ratio * total as f64).ceil() as usize;
        let (step, draw) = (self.at.step + 1, self.at.draw);
        let lr = config.lr * config.schedule.factor(step - 1, warmup, total);
        self.objective.before_step(step, total)?;
        let max_norm = config.clip.filter(|_| config.ivon.is_none());
        let done = group_gradients(self.objective, self.params, &mut self.optimizer, group, draw, step)
            .and_then(|mut done| Ok((clip(&mut done.grads, max_norm, step, group)?, done)));
        (self.at.step, self.at.draw) = (step, draw + group.len() as u64);
        if done.is_err() {
            self.optimizer.skip()?;
        }
        let (grad_norm, done) = match done {
            Err(why @ Error::NonFinite { .. }) if config.on_nonfinite == OnNonFinite::Skip => {
                self.at.skipped += 1;
                self.at.skipped_in_a_row += 1;
                observer.skipped(step, &why)?;
                return if self.at.skipped_in_a_row < MOST_SKIPPED { Ok(()) } else { Err(why) };
            }
            done => done?,
        };
        self.optimizer.step(&done.grads, lr)?;
        self.objective.after_step(self.params, &done.grads, step, total)?;
        self.at.skipped_in_a_row = 0;
        self.seconds.push(clock.elapsed().as_secs_f64());
        let epoch = step as f64 / self.per_epoch as f64;
        observer.step(&Record { step, epoch, lr, loss: done.loss, terms: done.terms, grad_norm })
    }

    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let step = self.at.step;
        // NaN compares with nothing, and infinity would stay the best for ever.
        let given = observer.evaluate(step)?;
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
            observer.kept(step)
        } else {
            Ok(())
        }
    }

    /// Whether evaluations have been no better than the best for as long as they may.
    fn is_out_of_patience(&self) -> bool {
        self.config.patience.is_some_and(|patience| self.at.waited >= patience)
    }

    fn seconds_so_far(&self) -> f64 {
        self.at.seconds + self.clock.elapsed().as_secs_f64()
    }

    /// What a checkpoint keeps: the tensors themselves, since it is written before the next step.
    fn state(&self) -> Result<State> {
        let params: BTreeMap<String, Tensor> = self
            .params
            .all()
            .into_iter()
            .map(|(name, param)| (name, param.var.as_detached_tensor()))
            .collect();
        let moments = self.optimizer.remembered().clone();
        let best = self.best.as_ref();
        Ok(State {
            run_state: RunState {
                seconds: self.seconds_so_far(),
                best: best.map(|best| (best.score, best.step)),
                moments: moments.iter().map(|(name, of)| (name.clone(), of.steps)).collect(),
                settings: self.settings.clone(),
                ..self.at.clone()
            },
            params,
            moments,
            // Of this very step, they are the parameters.
            best: best
                .filter(|best| best.step < self.at.step)
                .map(|best| best.values.clone())
                .unwrap_or_default(),
            method: self.objective.state()?,
        })
    }

    /// Goes on from a checkpoint.
    fn resume(&mut self, state: State) -> Result<()> {
        let State { run_state, params, moments, best, method } = state;
        if run_state.step > self.total {
            let reason =
                format!("the checkpoint is of step {}, the run ends with {}", run_state.step, self.total);
            return Err(Error::config("epochs", reason));
        }
        let present = self.params.all();
        if let Some((name, _)) = present.iter().find(|(name, _)| !params.contains_key(name)) {
            return Err(Error::tensor(name, "the checkpoint does not hold this parameter"));
        }
        if let Some(name) = params.keys().find(|name| self.params.get(name).is_none()) {
            return Err(Error::tensor(name, "the checkpoint holds this parameter, the model does not"));
        }
        self.params.restore(&params)?;
        if !moments.is_empty() {
            self.optimizer.restore(&moments)?;
        }
        self.objective.restore(&method)?;
        self.best = run_state.best.map(|(score, step)| {
            let values = if step == run_state.step { params } else { best };
            Best { score, step, values }
        });
        self.at = run_state;
        Ok(())
    }
}

struct Group {
    grads: Gradients,
    loss: f64,
    terms: BTreeMap<&'static str, f64>,
}

/// The gradients of one step: the mean over all that its micro-batches are means over, so that a
/// short last micro-batch weighs no more than its rows.
fn group_gradients(
    objective: &dyn Objective,
    params: &Params,
    optimizer: &mut Optimizer,
    group: &[Vec<usize>],
    first_draw: u64,
    step: usize,
) -> Result<Group> {
    let whole: f64 = group.iter().map(|rows| objective.weight(rows)).sum();
    let mut sums = Group { grads: Gradients::new(), loss: 0.0, terms: Default::default() };
    for (i, rows) in group.iter().enumerate() {
        let share = objective.weight(rows) / whole;
        let pass = Pass::Train { draw: first_draw + i as u64 };
        let tape = Tape::default();
        let cx = Context::from(pass).with_tape(&tape);
        optimizer.before_loss(first_draw + i as u64)?;
        let loss = objective.loss(rows, &cx)?;
        let values = to_host(&loss)?;
        let names = loss.terms.iter().map(|(name, _)| *name).chain(["loss"]);
        for (name, &value) in names.zip(&values) {
            if !value.is_finite() {
                let probe = Probe::default();
                // Whether this pass fails as well is of no interest: the error is known.
                objective.loss(rows, &cx.with_probe(&probe)).ok();
                let layer = probe.first_non_finite();
                return Err(Error::NonFinite {
                    step,
                    term: name.to_string(),
                    value,
                    layer,
                    rows: rows.clone(),
                });
            }
            match name {
                "loss" => sums.loss += share * value,
                name => *sums.terms.entry(name).or_default() += share * value,
            }
        }
        let total = if group.len() == 1 { loss.total } else { (loss.total * share)? };
        let gradients = sums.grads.backward(params, &total, &tape)?;
        optimizer.after_backward(&gradients)?;
    }
    Ok(sums)
}

/// All terms and the total in one copy from the device; those of one dtype are not cast there one by one.
fn to_host(loss: &Loss) -> Result<Vec<f64>> {
    let mut scalars: Vec<Tensor> =
        loss.terms.iter().map(|(_, term)| term).chain([&loss.total]).map(Tensor::detach).collect();
    if scalars.iter().any(|scalar| scalar.dtype() != loss.total.dtype()) {
        scalars =
            scalars.iter().map(|scalar| scalar.to_dtype(DType::F64)).collect::<candle_core::Result<_>>()?;
    }
    Ok(Tensor::stack(&scalars, 0)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1()?)
}

fn clip(grads: &mut Gradients, max_norm: Option<f64>, step: usize, group: &[Vec<usize>]) -> Result<f64> {
    let norm = match max_norm {
        Some(max_norm) => clip_grad_norm(grads, max_norm)?,
        None => grads.norm()?,
    };
    if norm.is_finite() {
        return Ok(norm);
    }
    let name = grads.first_non_finite()?.unwrap_or("all parameters together");
    let (term, rows) = (format!("gradient of {name}"), group.concat());
    Err(Error::NonFinite { step, term, value: norm, layer: None, rows })
}

#[cfg(test)]
mod tests;
