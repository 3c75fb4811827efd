//! Checks gradients against finite differences of the loss, which detects gradients that exist but are wrong.
//!
//! ```text
//! <g, d>  against  (L(theta + h d) - L(theta - h d)) / 2h
//! ```
//!
//! for a direction d of random signs. An operation without a backward pass leaves the parameters before it
//! without a gradient, which [`check_gradients`](super::check_gradients) detects. Around a residual
//! connection they still get the gradient of the other branch, which is finite, plausible and wrong.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use crate::adapter::Params;
use crate::error::{Error, Result};
use crate::noise::Purpose;

/// The largest difference of the slopes, as a share of the gradient's size.
const TOLERANCE: f64 = 0.005;
/// The maximum number of times the step is halved.
const HALVINGS: usize = 10;
/// Directions to test: with only one, a wrong gradient would sometimes pass.
const DIRECTIONS: u64 = 3;

/// The result of [`check_gradients_numerically`]. The slopes are the loss's along a direction of random
/// signs, namely the one of three directions in which they differ most.
#[derive(Debug, Clone, PartialEq)]
pub struct NumericalReport {
    /// The slope from the gradients.
    pub analytic: f64,
    /// The slope from differences of the loss.
    pub numeric: f64,
    /// The possible error of the differences, from rounding and from the step size.
    pub uncertainty: f64,
    /// The Euclidean norm of all gradients: the typical size of a slope along random signs.
    pub grad_norm: f64,
    /// If the slopes disagree: the parameters whose own slopes disagree. The loss depends on them through an
    /// operation that cuts gradients. Empty if no single parameter stands out.
    pub wrong: Vec<String>,
}

impl NumericalReport {
    /// Whether the slopes agree within half a percent of the gradients' norm plus [`Self::uncertainty`].
    pub fn is_clean(&self) -> bool {
        self.excess() <= 0.0
    }

    /// By how much the difference of the slopes exceeds that tolerance.
    fn excess(&self) -> f64 {
        let size = self.grad_norm.max(self.numeric.abs());
        (self.analytic - self.numeric).abs() - TOLERANCE * size - self.uncertainty
    }
}

/// Compares the gradients of all trainable parameters with finite differences of `loss` along three
/// directions, in some twenty forward passes, and if they disagree, the same for each parameter alone. On a
/// small batch this takes seconds, once, before a long run. The parameters are restored afterwards.
///
/// `loss` is called repeatedly and must be the same function each time, so with a fixed draw:
/// `forward_with(&xs, &Pass::Train { draw: 0 }.into())`, not `forward_t(&xs, true)`, which takes a new one.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Module;
/// use monteclora::ops::RmsNorm;
/// use monteclora::optim::{check_gradients, check_gradients_numerically};
/// use monteclora::{Init, Noise, Params, Role};
///
/// let params = Params::new(Noise::new(1), &Device::Cpu);
/// let w = params.create("w", Role::Head, (4, 8), &Init::Normal(1.0))?;
/// let (ones, targets) = (Tensor::ones(8, w.dtype(), w.device())?, Tensor::arange(0f32, 8., w.device())?);
/// // w + norm(w), by candle-nn's norm: a gradient reaches w around it and seems well.
/// let theirs = candle_nn::RmsNorm::new(ones.clone(), 1e-5);
/// let wrong = || -> monteclora::Result<Tensor> {
///     Ok((&w + theirs.forward(&w)?)?.broadcast_sub(&targets)?.sqr()?.sum_all()?)
/// };
/// assert!(check_gradients(&params, &wrong()?)?.is_clean());
/// assert_eq!(check_gradients_numerically(&params, wrong)?.wrong, ["w"]);
///
/// let ours = RmsNorm::new(ones, 1e-5);
/// let right = || -> monteclora::Result<Tensor> {
///     Ok((&w + ours.forward(&w)?)?.broadcast_sub(&targets)?.sqr()?.sum_all()?)
/// };
/// assert!(check_gradients_numerically(&params, right)?.is_clean());
/// # Ok::<(), monteclora::Error>(())
/// ```
///
/// # Errors
/// If `loss` fails, is not a finite scalar, differs at a second call, or is too coarse for differences (half
/// precision). The parameters are restored in every case.
pub fn check_gradients_numerically(
    params: &Params,
    mut loss: impl FnMut() -> Result<Tensor>,
) -> Result<NumericalReport> {
    let before = params.snapshot()?;
    let report = compare(params, &before, &mut loss);
    params.restore(&before)?;
    report
}

fn compare(
    params: &Params,
    before: &BTreeMap<String, Tensor>,
    loss: &mut dyn FnMut() -> Result<Tensor>,
) -> Result<NumericalReport> {
    let first = loss()?;
    let store = first.backward()?;
    let mut parts = Vec::new();
    for (name, param) in params.trainable() {
        let start = wide(&before[&name])?;
        let stream = params.noise().stream(&name, Purpose::Resample);
        let signs = |direction| {
            let mut signs = vec![0.0; param.var.elem_count()];
            stream.fill_uniform(direction, &mut signs);
            signs.iter_mut().for_each(|sign| *sign = if *sign < 0.5 { -1.0 } else { 1.0 });
            Tensor::from_vec(signs, param.var.shape(), &Device::Cpu)
        };
        let signs = (0..DIRECTIONS).map(signs).collect::<candle_core::Result<_>>()?;
        // A missing gradient counts as zero, which is right for a parameter that the loss does not depend on.
        let grad = store.get(&param.var).map_or_else(|| start.zeros_like(), wide)?;
        parts.push(Part { name, start, signs, grad });
    }
    if parts.is_empty() {
        return Err(Error::config("params", "there is no trainable parameter to check"));
    }
    let mut differences = Differences::new(params, loss, scalar(&first)?, first.dtype())?;
    let all: Vec<&Part> = parts.iter().collect();
    let mut report = differences.of(&all)?;
    if report.grad_norm > 0.0 && report.uncertainty > 0.25 * report.grad_norm {
        let NumericalReport { numeric, uncertainty, grad_norm, .. } = report;
        let reason = format!(
            "finite differences give a slope of {numeric} +- {uncertainty}, too inexact for gradients of \
             norm {grad_norm}: compute the loss in f64, or on fewer rows"
        );
        return Err(Error::config("loss", reason));
    }
    if !report.is_clean() {
        for part in &parts {
            if !differences.of(&[part])?.is_clean() {
                report.wrong.push(part.name.clone());
            }
        }
    }
    Ok(report)
}

/// One parameter in f64 on the host: its value, its part of each direction and its gradient.
struct Part {
    name: String,
    start: Tensor,
    signs: Vec<Tensor>,
    grad: Tensor,
}

/// Computes finite differences of a loss.
struct Differences<'a> {
    params: &'a Params,
    loss: &'a mut dyn FnMut() -> Result<Tensor>,
    /// The rounding noise of the loss: how far two evaluations at one point may differ.
    noise: f64,
}

impl<'a> Differences<'a> {
    fn new(
        params: &'a Params,
        loss: &'a mut dyn FnMut() -> Result<Tensor>,
        first: f64,
        dtype: DType,
    ) -> Result<Self> {
        let epsilon = match dtype {
            DType::F64 => f64::EPSILON,
            DType::F32 => f64::from(f32::EPSILON),
            other => {
                let reason =
                    format!("{} is too inexact for finite differences: expected f32 or f64", other.as_str());
                return Err(Error::config("loss", reason));
            }
        };
        let second = scalar(&loss()?)?;
        if (first - second).abs() > 64.0 * epsilon * first.abs() {
            let reason = format!(
                "two calls give {first} and {second}: fix what differs between them, the draw of the posterior or of \
                 dropout (forward_with with a Pass of a fixed draw)"
            );
            return Err(Error::config("loss", reason));
        }
        // The sums within a loss also round.
        Ok(Self { params, loss, noise: (8.0 * epsilon * first.abs()).max((first - second).abs()) })
    }

    /// Compares the slopes along all directions of `parts`, with the other parameters fixed, and returns the
    /// report of the largest disagreement. Restores the parameters.
    fn of(&mut self, parts: &[&Part]) -> Result<NumericalReport> {
        let mut worst = self.along(parts, 0)?;
        for direction in 1..DIRECTIONS as usize {
            let next = self.along(parts, direction)?;
            if next.excess() > worst.excess() {
                worst = next;
            }
        }
        Ok(worst)
    }

    fn along(&mut self, parts: &[&Part], direction: usize) -> Result<NumericalReport> {
        let sum = |f: &dyn Fn(&Part) -> candle_core::Result<Tensor>| -> Result<f64> {
            let sums = parts.iter().map(|part| f(part)?.sum_all()?.to_scalar::<f64>());
            Ok(sums.sum::<candle_core::Result<f64>>()?)
        };
        let analytic = sum(&|part| &part.grad * &part.signs[direction])?;
        let grad_norm = sum(&|part| part.grad.sqr())?.sqrt();
        let size = sum(&|part| part.start.sqr())?.sqrt();
        let count: usize = parts.iter().map(|part| part.start.elem_count()).sum();
        // The first perturbation has a tenth of the parameters' norm, or 0.01 where that norm is below 0.1.
        let mut step = 0.1 * size.max(0.1) / (count as f64).sqrt();
        let (mut coarse, mut best) = (self.slope(parts, direction, step)?, (0.0, f64::INFINITY));
        for _ in 0..HALVINGS {
            step /= 2.0;
            let fine = self.slope(parts, direction, step)?;
            let uncertainty = (fine - coarse).abs() + self.noise / step;
            if uncertainty < best.1 {
                best = ((4.0 * fine - coarse) / 3.0, uncertainty); // Richardson extrapolation
            }
            // Accurate enough, or noise dominates smaller steps.
            if best.1 < 0.25 * TOLERANCE * grad_norm.max(fine.abs()) || self.noise / step > best.1 {
                break;
            }
            coarse = fine;
        }
        let (numeric, uncertainty) = best;
        for part in parts {
            self.params.set(&part.name, &part.start)?;
        }
        Ok(NumericalReport { analytic, numeric, uncertainty, grad_norm, wrong: Vec::new() })
    }

    /// Returns the central difference with step size `step`.
    fn slope(&mut self, parts: &[&Part], direction: usize, step: f64) -> Result<f64> {
        let mut at = |step: f64| -> Result<f64> {
            for part in parts {
                self.params.set(&part.name, &(&part.start + (&part.signs[direction] * step)?)?)?;
            }
            scalar(&(self.loss)()?)
        };
        Ok((at(step)? - at(-step)?) / (2.0 * step))
    }
}

fn wide(tensor: &Tensor) -> candle_core::Result<Tensor> {
    tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)
}

fn scalar(loss: &Tensor) -> Result<f64> {
    if loss.rank() != 0 {
        return Err(Error::config("loss", format!("expected a scalar, got shape {:?}", loss.dims())));
    }
    let value = wide(loss)?.to_scalar::<f64>()?;
    if value.is_finite() {
        Ok(value)
    } else {
        Err(Error::config("loss", format!("expected a finite value, got {value}")))
    }
}
