//! Training-free Bayesianisation of a trained LoRA (Shi et al. 2024, "Training-free Bayesianization for
//! low-rank adapters of large language models"): adds as much noise to A as the loss tolerates.
//!
//! ```text
//! B = U diag(d) V^T,   B' = U diag(d),   A' = V^T A,   A'_ij ~ N((V^T A)_ij, (sigma / d_i)^2)
//! ```
//!
//! B' A' equals B A, and its noise is sigma U Z with Z standard normal. Whatever the factors are, the update
//! s B A is perturbed equally in every direction of B's column space:
//!
//! ```text
//! s B A_draw = s B A + s sigma U Z
//! ```
//!
//! Rotated back by V, this is a draw of A itself, `A + sigma V diag(1 / d) Z`, and B is unchanged. Draws are
//! parameters that replace A one after the other, like the members of an ensemble. Directions with d_i below
//! 1e-6 of the largest get no noise; the authors' code adds 1e-6 to d instead. Draw k uses the same Z at
//! every sigma, so the loss is a smooth function of sigma during the search.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::eigen::Eigen;
use super::parameter_draws::ParameterDraws;
use crate::adapter::{no_active, other_method, AdaptableModel, Params, Pass};
use crate::adapters::Lora;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::metrics::{argmax, nll};
use crate::noise::{Noise, Purpose, Stream};
use crate::predict::{posterior_probabilities, Predictor};
use crate::util::check::{at_least_one, positive};
use crate::util::dtype::to_dtype_device;

/// Singular values of B below this fraction of the largest are treated as rounding errors.
const MIN_SINGULAR_RATIO: f64 = 1e-6;

/// The search range and effort for sigma.
#[derive(Debug, Clone, PartialEq)]
pub struct Search {
    /// The smallest sigma, also the result if no sigma is tolerated.
    pub low: f64,
    /// The largest sigma.
    pub high: f64,
    /// The number of bisection steps in [`Tfb::tolerated`], or of values in [`Tfb::best`].
    pub steps: usize,
    /// The number of draws that a prediction averages.
    pub draws: usize,
}

impl Default for Search {
    /// The authors search between 1e-3 and 0.015 for large decoders; a small encoder tolerates more.
    fn default() -> Self {
        Self { low: 1e-3, high: 1.0, steps: 10, draws: 10 }
    }
}

/// The relative change of the loss on `rows` anchor rows that the authors' code tolerates: 0.003 per row.
pub fn released_tolerance(rows: usize) -> f64 {
    0.003 * rows as f64
}

/// A family of posteriors around the active LoRA adapters of a model, one for each sigma.
#[derive(Debug)]
pub struct Tfb {
    layers: Vec<TfbLayer>,
}

#[derive(Debug)]
struct TfbLayer {
    /// The parameter that is drawn, `{path}.{adapter}.a`.
    name: String,
    mean: Tensor,       // A, (r, in), f64 on the host
    directions: Tensor, // V diag(1 / d), (r, k) for the k directions that B has
    stream: Stream,
}

impl Tfb {
    /// Builds the family around the current A and B of every active LoRA adapter, with draws from `noise`.
    ///
    /// # Errors
    /// If the model has no active LoRA adapter, an active adapter is of another method, a layer is merged, or
    /// B is not finite.
    pub fn new(model: &dyn AdaptableModel, noise: Noise) -> Result<Self> {
        let mut layers = Vec::new();
        model.visit_linears(&mut |layer| {
            let Some((adapter, active)) = layer.active() else { return Ok(()) };
            let Some(lora) = active.as_any().downcast_ref::<Lora>() else {
                return Err(other_method(layer, adapter, "LoRA"));
            };
            layer.check_unmerged()?;
            let name = format!("{}.{adapter}", layer.path());
            let host = |t: &Tensor| to_dtype_device(&t.detach(), DType::F64, &Device::Cpu);
            let (mean, b) = (host(lora.low_rank().a())?, host(lora.low_rank().b())?);
            layers.push(TfbLayer {
                directions: directions(&name, &b)?,
                stream: noise.stream(&name, Purpose::Gaussian),
                name: format!("{name}.a"),
                mean,
            });
            Ok(())
        })?;
        if layers.is_empty() {
            return Err(no_active("LoRA"));
        }
        Ok(Self { layers })
    }

    /// Returns draw number `draw` at this sigma: the A of every layer by parameter name, for
    /// [`Params::restore`]. Draws come in pairs with opposite noise ([`Pass::sign`]).
    ///
    /// # Errors
    /// If `draw` is 2^62 or more.
    pub fn draw(&self, sigma: f64, draw: u64) -> Result<BTreeMap<String, Tensor>> {
        let (index, sign) = Pass::predictive(draw)?;
        let of = |layer: &TfbLayer| -> Result<(String, Tensor)> {
            let (k, in_dim) = (layer.directions.dim(1)?, layer.mean.dim(1)?);
            if k == 0 {
                return Ok((layer.name.clone(), layer.mean.clone()));
            }
            let mut z = vec![0.0; k * in_dim];
            layer.stream.fill_normal(index, &mut z);
            let z = Tensor::from_vec(z, (k, in_dim), &Device::Cpu)?;
            let a = (&layer.mean + (layer.directions.matmul(&z)? * (sigma * sign))?)?;
            Ok((layer.name.clone(), a))
        };
        self.layers.iter().map(of).collect()
    }

    /// Returns class probabilities, one row per example, averaged over `draws` draws after the softmax.
    /// `params` are the parameters of `model`; they are unchanged afterwards, also on error.
    ///
    /// # Errors
    /// If `draws` is 0, a draw does not fit the parameters, or the forward pass fails.
    pub fn probabilities(
        &self,
        model: &dyn Predictor,
        params: &Params,
        batches: &[Batch],
        sigma: f64,
        draws: usize,
    ) -> Result<Vec<Vec<f64>>> {
        let drawn = (0..draws as u64).map(|draw| self.draw(sigma, draw)).collect::<Result<Vec<_>>>()?;
        posterior_probabilities(&ParameterDraws::new(model, params, drawn), batches, draws)
    }

    /// Finds the largest sigma whose loss on the anchor rows is close enough to the loss without noise, by
    /// bisection over ln sigma:
    ///
    /// ```text
    /// |l(sigma) - l(0)| <= tolerance l(0),   l the NLL of the labels
    /// ```
    ///
    /// The authors use the model's own predictions as labels ([`predicted`]), so that anchor rows need no
    /// labels.
    ///
    /// # Errors
    /// As [`Self::probabilities`]; if a bound is not positive, there is no step, or rows and labels do not fit.
    pub fn tolerated(
        &self,
        model: &dyn Predictor,
        params: &Params,
        (anchor, labels): (&[Batch], &[u32]),
        tolerance: f64,
        search: &Search,
    ) -> Result<f64> {
        let (low, high) = search.logs()?;
        let loss = |sigma: f64| nll(&self.probabilities(model, params, anchor, sigma, search.draws)?, labels);
        let without = loss(0.0)?;
        let tolerates = |sigma: f64| Ok::<_, Error>((loss(sigma)? - without).abs() <= tolerance * without);
        if tolerates(search.high)? {
            return Ok(search.high);
        }
        let (mut tolerated, mut too_large) = (low, high);
        for _ in 0..search.steps {
            let middle = 0.5 * (tolerated + too_large);
            if tolerates(middle.exp())? {
                tolerated = middle;
            } else {
                too_large = middle;
            }
        }
        Ok(tolerated.exp())
    }

    /// Finds the sigma with the lowest loss on held-out rows, among `steps` values in geometric progression
    /// from the smallest to the largest sigma.
    ///
    /// # Errors
    /// As [`Self::tolerated`].
    pub fn best(
        &self,
        model: &dyn Predictor,
        params: &Params,
        (held_out, labels): (&[Batch], &[u32]),
        search: &Search,
    ) -> Result<f64> {
        let (low, high) = search.logs()?;
        let last = search.steps.saturating_sub(1).max(1) as f64;
        let mut best = (f64::INFINITY, search.low);
        for step in 0..search.steps {
            let sigma = (low + (high - low) * step as f64 / last).exp();
            let loss = nll(&self.probabilities(model, params, held_out, sigma, search.draws)?, labels)?;
            if loss < best.0 {
                best = (loss, sigma);
            }
        }
        Ok(best.1)
    }
}

impl Search {
    /// The logarithms of the bounds.
    fn logs(&self) -> Result<(f64, f64)> {
        positive("low", self.low)?;
        positive("high", self.high)?;
        if self.low >= self.high {
            return Err(Error::config("low", format!("expected less than {}, got {}", self.high, self.low)));
        }
        at_least_one("steps", self.steps)?;
        Ok((self.low.ln(), self.high.ln()))
    }
}

/// The most likely class of every row; the first, if several are equal.
pub fn predicted(probabilities: &[Vec<f64>]) -> Vec<u32> {
    probabilities.iter().map(|row| argmax(row) as u32).collect()
}

/// `V diag(1 / d)`, `(r, k)`, of `b` `(out, r)`, for its k non-zero singular values d. V are the eigenvectors
/// of `B^T B`, whose eigenvalues are d^2.
fn directions(name: &str, b: &Tensor) -> Result<Tensor> {
    let r = b.dim(1)?;
    let Eigen { values, vectors } = Eigen::new(name, &b.t()?.contiguous()?.matmul(b)?)?;
    let vectors = vectors.to_vec2::<f64>()?;
    let largest = values.iter().fold(0f64, |most, value| most.max(*value));
    let rows: Vec<Vec<f64>> = values
        .iter()
        .zip(vectors)
        .filter(|(value, _)| **value > MIN_SINGULAR_RATIO * MIN_SINGULAR_RATIO * largest)
        .map(|(value, v)| v.into_iter().map(|x| x / value.sqrt()).collect())
        .collect();
    let k = rows.len();
    Ok(Tensor::from_vec(rows.concat(), (k, r), &Device::Cpu)?.t()?.contiguous()?)
}

#[cfg(test)]
mod tests;
