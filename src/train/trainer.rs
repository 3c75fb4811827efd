//! The one training loop: every method and every model runs through [`fit`].

use std::time::Instant;

use candle_core::{DType, Tensor};

use super::config::TrainConfig;
use super::gradients::{clip_grad_norm, Gradients};
use super::objective::{Loss, Objective, Observer, Record, Summary};
use super::optim::AdamW;
use crate::error::{Error, Result};
use crate::params::Params;
use crate::slot::Pass;

/// Trains `params` on `objective`. The draw index counts micro-batches from zero.
///
/// # Errors
/// [`Error::NonFinite`] when a loss or gradient is not finite: it names the step, the term and the
/// rows. Besides, what the objective, the observer or the optimiser report. On any of them the
/// parameters of the best evaluation, if there was one, are put back. Before the first step, an
/// option outside its domain is named.
pub fn fit(
    objective: &dyn Objective,
    params: &Params,
    config: &TrainConfig,
    observer: &mut dyn Observer,
) -> Result<Summary> {
    config.validate()?;
    params.check_finite()?;
    let optimizer = AdamW::new(params, config.optimizer())?;
    let per_epoch = objective.epoch(0)?.len().div_ceil(config.accumulation);
    if per_epoch == 0 {
        return Err(Error::config("data", "there is no batch to train on"));
    }
    let total = per_epoch.checked_mul(config.epochs).ok_or_else(|| {
        let reason = format!("{} of {per_epoch} steps are more than can be counted", config.epochs);
        Error::config("epochs", reason)
    })?;
    observer.start(total);

    let start = Instant::now();
    let mut run = Run { config, per_epoch, total, optimizer, best: None, seconds: Vec::new() };
    let outcome = run.steps(objective, params, observer);
    let keep_best = config.keep_best || outcome.is_err();
    let kept_step = match run.best.filter(|_| keep_best) {
        Some(best) => {
            params.restore(&best.values)?;
            best.step
        }
        None => total,
    };
    outcome?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(Summary { steps: total, seconds, step_seconds_median: median(run.seconds), kept_step })
}

/// A run on its way.
struct Run<'a> {
    config: &'a TrainConfig,
    per_epoch: usize,
    total: usize,
    optimizer: AdamW,
    best: Option<Best>,
    seconds: Vec<f64>,
}

struct Best {
    score: f64,
    step: usize,
    values: std::collections::BTreeMap<String, Tensor>,
}

impl Run<'_> {
    /// All steps of all epochs, with their evaluations.
    fn steps(
        &mut self,
        objective: &dyn Objective,
        params: &Params,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let (config, per_epoch, total) = (self.config, self.per_epoch, self.total);
        let warmup = (config.warmup_ratio * total as f64).ceil() as usize;
        let mut draw = 0;
        for epoch in 0..config.epochs {
            let micro_batches = objective.epoch(epoch as u64)?;
            let steps = micro_batches.len().div_ceil(config.accumulation);
            if steps != per_epoch {
                let reason = format!("epoch {epoch} has {steps} steps, the first had {per_epoch}");
                return Err(Error::config("data", reason));
            }
            for (i, group) in micro_batches.chunks(config.accumulation).enumerate() {
                let clock = Instant::now();
                let step = epoch * per_epoch + i + 1;
                let lr = config.lr * config.schedule.factor(step - 1, warmup, total);
                objective.before_step(step, total)?;
                let mut done = group_gradients(objective, params, group, draw, step)?;
                let grad_norm = clip(&mut done.grads, config.clip, step, group)?;
                self.optimizer.step(&done.grads, lr)?;
                objective.after_step(params, &done.grads, step, total)?;
                draw += group.len() as u64;
                self.seconds.push(clock.elapsed().as_secs_f64());
                let epoch = epoch as f64 + (i + 1) as f64 / per_epoch as f64;
                observer.step(&Record { step, epoch, lr, loss: done.loss, terms: done.terms, grad_norm })?;
                let due = match config.eval_every {
                    Some(every) => step % every == 0 || step == total,
                    None => i + 1 == per_epoch,
                };
                if due {
                    self.evaluate(step, params, observer)?;
                }
            }
        }
        Ok(())
    }

    fn evaluate(&mut self, step: usize, params: &Params, observer: &mut dyn Observer) -> Result<()> {
        // NaN compares with nothing: as the first score it would stay the best for ever.
        let score = observer.evaluate(step)?.filter(|score| !score.is_nan());
        let better = |score: &f64| self.best.as_ref().is_none_or(|best| *score > best.score);
        let improved = score.filter(better);
        if let Some(score) = improved {
            self.best = Some(Best { score, step, values: params.snapshot()? });
        }
        match improved.is_some() || !self.config.keep_best {
            true => observer.kept(step),
            false => Ok(()),
        }
    }
}

struct Group {
    grads: Gradients,
    loss: f64,
    terms: std::collections::BTreeMap<&'static str, f64>,
}

/// The gradients of one step: the mean over all that its micro-batches are means over, so that a
/// short last micro-batch weighs no more than its rows.
fn group_gradients(
    objective: &dyn Objective,
    params: &Params,
    group: &[Vec<usize>],
    first_draw: u64,
    step: usize,
) -> Result<Group> {
    let whole: f64 = group.iter().map(|rows| objective.weight(rows)).sum();
    let mut sums = Group { grads: Gradients::new(), loss: 0.0, terms: Default::default() };
    for (i, rows) in group.iter().enumerate() {
        let share = objective.weight(rows) / whole;
        let loss = objective.loss(rows, &Pass::Train { draw: first_draw + i as u64 })?;
        let values = to_host(&loss)?;
        let names = loss.terms.iter().map(|(name, _)| *name).chain(["loss"]);
        for (name, &value) in names.zip(&values) {
            if !value.is_finite() {
                return Err(Error::NonFinite { step, term: name.to_string(), value, rows: rows.clone() });
            }
            match name {
                "loss" => sums.loss += share * value,
                name => *sums.terms.entry(name).or_default() += share * value,
            }
        }
        let total = if group.len() == 1 { loss.total } else { (loss.total * share)? };
        sums.grads.accumulate(params, &total.backward()?)?;
    }
    Ok(sums)
}

/// All terms and the total in one copy from the device.
fn to_host(loss: &Loss) -> Result<Vec<f64>> {
    let scalars: Vec<Tensor> = loss
        .terms
        .iter()
        .map(|(_, term)| term)
        .chain([&loss.total])
        .map(|term| term.detach().to_dtype(DType::F64))
        .collect::<candle_core::Result<_>>()?;
    Ok(Tensor::stack(&scalars, 0)?.to_vec1()?)
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
    Err(Error::NonFinite { step, term: format!("gradient of {name}"), value: norm, rows: group.concat() })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests;
