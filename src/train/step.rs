//! Computes the gradients of one optimiser step over its micro-batches, and clips them.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::config::TrainConfig;
use super::objective::{Loss, Objective};
use crate::adapter::{Context, Params, Pass, Probe};
use crate::error::{Error, Result};
use crate::ops::{self, Tape};
use crate::optim::{clip_grad_norm, Gradients, Optimizer};

/// The sums of one step over its micro-batches.
pub(super) struct StepGradients {
    pub grads: Gradients,
    pub loss: f64,
    pub terms: BTreeMap<&'static str, f64>,
}

/// Computes this process's part of a step's gradients, from the micro-batches that it `takes`. The loss is
/// the mean over all items of the step's micro-batches, so that a short last one only has the weight of its
/// rows.
///
/// Each micro-batch has its own draw, or with [`TrainConfig::shared_draw`] all have the first.
///
/// # Errors
/// [`Error::NonFinite`] if a loss is not finite; errors of the objective; a parameter without a gradient.
pub(super) fn group_gradients(
    objective: &dyn Objective,
    params: &Params,
    optimizer: &mut Optimizer,
    config: &TrainConfig,
    group: &[Vec<usize>],
    (step, first_draw): (usize, u64),
    takes: &dyn Fn(usize) -> bool,
) -> Result<StepGradients> {
    let whole: f64 = group.iter().map(|rows| objective.weight(rows)).sum();
    let mut sums = StepGradients { grads: Gradients::new(), loss: 0.0, terms: Default::default() };
    for (i, rows) in group.iter().enumerate().filter(|(i, _)| takes(*i)) {
        let draw = if config.shared_draw { first_draw } else { first_draw + i as u64 };
        let share = objective.weight(rows) / whole;
        let pass = Pass::Train { draw };
        let tape = Tape::default();
        let cx = Context::from(pass).with_tape(&tape);
        optimizer.before_loss(draw)?;
        let loss = objective.loss(rows, &cx)?;
        let factor = if group.len() == 1 { config.loss_scale } else { share * config.loss_scale };
        let total = if factor == 1.0 { loss.total.clone() } else { (&loss.total * factor)? };
        let gradients = sums.grads.backward(params, &total, &tape)?;
        // Only now: the host waits here for a device, which would otherwise be idle before the backward pass.
        let values = to_host(&loss)?;
        let names = loss.terms.iter().map(|(name, _)| *name).chain(["loss"]);
        for (name, &value) in names.zip(&values) {
            if !value.is_finite() {
                let probe = Probe::default();
                // Ignore an error of this pass: the loss's error is returned below.
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
        optimizer.after_backward(&gradients)?;
    }
    sums.grads.scale(1.0 / config.loss_scale);
    Ok(sums)
}

/// Copies all terms and the total from the device at once, without a cast if their dtypes agree.
fn to_host(loss: &Loss) -> Result<Vec<f64>> {
    let mut scalars: Vec<Tensor> =
        loss.terms.iter().map(|(_, term)| term).chain([&loss.total]).map(Tensor::detach).collect();
    if scalars.iter().any(|scalar| scalar.dtype() != loss.total.dtype()) {
        scalars =
            scalars.iter().map(|scalar| scalar.to_dtype(DType::F64)).collect::<candle_core::Result<_>>()?;
    }
    Ok(ops::stacked(&scalars)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1()?)
}

/// Clips the gradients of a step, unless their norm is not finite.
///
/// # Errors
/// [`Error::NonFinite`] if the norm is not finite, with the first non-finite gradient.
pub(super) fn clip(
    grads: &mut Gradients,
    max_norm: Option<f64>,
    step: usize,
    group: &[Vec<usize>],
) -> Result<f64> {
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
