//! MonteCLoRA's Gaussian over A, of a model that is linearised in A: Gaussian logits without draws.
//!
//! A draw perturbs A by columns of the covariance `eps^2 ||pi||^2 Sigma`, whose mean over Sigma and pi is
//! diagonal and the same for all columns:
//!
//! ```text
//! A = mean + Delta,   cov Delta = diag(v) (x) 1,   f ~ N(f(mean), sum_layers J (diag(v) (x) 1) J^T)
//! ```
//!
//! with the Jacobian J of the logits in a layer's A. The variances v, `(r)` for each layer, are
//!
//! - those of the trained posterior ([`LinearisedPosterior::trained`]): `v_i = eps^2 E ||pi||^2 df V_i`;
//! - or those with the greatest evidence on the training rows ([`LinearisedPosterior::refitted`]). With the
//!   curvature H of the loss (the generalised Gauss-Newton in the Kronecker form of
//!   [`laplace`](crate::bayes::laplace)) and a prior `A ~ N(0, 1 / delta)`, the evidence bound is, up to
//!   constants,
//!
//!   ```text
//!   1/2 sum_layers { in_dim sum_i [ln v_i - (alpha g_i + delta) v_i + ln delta] - delta ||A||^2 }
//!   ```
//!
//!   where alpha is the mean square of the layer's inputs, and g_i the sum of the squared gradients of row i
//!   over tokens and over the columns of the root of the logits' Hessian. It is greatest at
//!   `v_i = 1 / (alpha g_i + delta)`, and in delta at
//!   `sum in_dim alpha g_i / (alpha g_i + delta) = delta ||A||^2`.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::predictive::Linearised;
use super::record::{each_part, scale_to, LayerRecord, Wanted};
use super::taps::{Maps, Taps};
use crate::adapter::{no_active, visit_active, AdaptableModel};
use crate::bayes::precision::most_evident;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::monteclora::MonteCLoRA;
use crate::ops;
use crate::predict::Predictor;
use crate::util::{files, json};

/// A Gaussian over the A of every tapped layer, with variances by row, and the predictions of the linearised
/// model under it.
///
/// Install [`Taps`] on the model first, and remove them at the end with a clone.
///
/// # Example
/// ```
/// use candle_core::{DType, Device};
/// use monteclora::bayes::{LinearisedPosterior, Taps};
/// use monteclora::data::encode::TextEncoder;
/// use monteclora::data::{task::Task, tokenizer};
/// use monteclora::inject::Targets;
/// use monteclora::models::hub::ModelFiles;
/// use monteclora::train::{batches, Classifier, Method, MethodInit};
/// use monteclora::{Error, MonteCLoRAConfig, Noise};
///
/// # if !std::path::Path::new("examples/assets").exists() { return Ok::<(), Error>(()) } // not in the package
/// let files = ModelFiles::locate("examples/assets/tiny-roberta", None)?;
/// let start = MethodInit::Fresh(Method::MonteCLoRA(MonteCLoRAConfig::calibrated()), Targets::default());
/// let mut classifier = Classifier::load(&files, 2, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
/// let encoder = TextEncoder::new(tokenizer::of_model(&files)?, 32, 512)?;
/// let data = Task::Sst2.load_folder("examples/assets/sst2".as_ref())?;
/// let seen = batches(&classifier, &encoder.encode(&data.train[..16])?, 8)?; // and train on them
///
/// let taps = Taps::install(classifier.model.as_mut())?;
/// let posterior = LinearisedPosterior::refitted(&classifier, taps.clone(), &seen, None)?;
/// let new = batches(&classifier, &encoder.encode(&data.dev[0].1[..8])?, 8)?;
/// let probabilities = posterior.predict(&classifier, &new)?.probabilities(1000, Noise::new(2))?;
/// taps.remove(classifier.model.as_mut())?;
/// assert_eq!((probabilities.len(), probabilities[0].len()), (8, 2));
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct LinearisedPosterior {
    taps: Taps,
    variances: Vec<Vec<f64>>,
}

/// The file of a posterior: its variances by layer, and the norms of the A and s B that it was made for.
#[derive(Serialize, Deserialize)]
struct Saved {
    variances: BTreeMap<String, Vec<f64>>,
    #[serde(default)]
    norms: BTreeMap<String, [f64; 2]>,
}

/// How far norms may be apart, relatively: an adapter may be read in a lower precision than it was written in.
const SAME_WEIGHTS: f64 = 1e-3;

impl LinearisedPosterior {
    /// The posterior that training left on the MonteCLoRA adapters of `model`, which `taps` are installed on.
    ///
    /// # Errors
    /// If a tapped adapter is not of MonteCLoRA, or as [`Posterior::row_variances`](crate::Posterior::row_variances).
    pub fn trained(model: &dyn AdaptableModel, taps: Taps) -> Result<Self> {
        let mut variances = Vec::new();
        visit_active::<MonteCLoRA>(model, |adapter| {
            variances.push(adapter.posterior().row_variances()?);
            Ok(())
        })?;
        if variances.is_empty() {
            return Err(no_active("MonteCLoRA"));
        }
        let tapped = taps.paths().len();
        if variances.len() != tapped {
            let reason = format!("{} of {tapped} layers have a posterior over A", variances.len());
            return Err(Error::config("adapter", reason));
        }
        Ok(Self { taps, variances })
    }

    /// The posterior of the same form with the greatest evidence on the training rows: the scale of every row
    /// follows from the curvature of the loss around the mean, instead of from training. Training alone hardly
    /// moves the scales, because its regulariser does not weigh them against the data.
    ///
    /// If the batches are a sample of the training rows, `of_rows` is the number of all, to which the sums are
    /// scaled up. LoRA adapters can be tapped as well.
    ///
    /// # Errors
    /// If there is no row or more than `of_rows`, the model has fewer than two outputs, the forward or backward
    /// pass fails, or a value is not finite.
    pub fn refitted(
        model: &dyn Predictor,
        taps: Taps,
        batches: &[Batch],
        of_rows: Option<usize>,
    ) -> Result<Self> {
        let scale = scale_to(of_rows, batches)?;
        let mut sums: Vec<Curvature> = Vec::new();
        let record = |part: &Batch| taps.record(model, part, Maps::A, Wanted::Curvature);
        each_part(batches, record, |_, record| {
            let roots = record.hessian_roots();
            for (i, layer) in record.layers.iter().enumerate() {
                let new = Curvature::new(layer, &roots)?;
                match sums.get_mut(i) {
                    Some(sum) => sum.add(&new),
                    None => sums.push(new),
                }
            }
            Ok(())
        })?;
        let squared_norm: f64 = taps.norms()?.iter().map(|[a, _]| a * a).sum();
        // alpha g_i of every row, with the number of its elements.
        let rows: Vec<(usize, Vec<f64>)> = sums.iter().map(|sum| (sum.in_dim, sum.rows(scale))).collect();
        if rows.iter().flat_map(|(_, rows)| rows).chain([&squared_norm]).any(|value| !value.is_finite()) {
            return Err(Error::config("posterior", "the curvature or A is not finite"));
        }
        let determined = |delta: f64| -> f64 {
            let of = |(count, rows): &(usize, Vec<f64>)| -> f64 {
                *count as f64 * rows.iter().map(|value| value / (value + delta)).sum::<f64>()
            };
            rows.iter().map(of).sum()
        };
        let delta = most_evident(determined, squared_norm);
        let variances = rows.iter().map(|(_, rows)| rows.iter().map(|value| 1.0 / (value + delta)).collect());
        Ok(Self { variances: variances.collect(), taps })
    }

    /// Reads what [`Self::save`] wrote, for the adapters of `taps`.
    ///
    /// # Errors
    /// If the file is missing or damaged, is of other layers, ranks or weights, or holds a variance that is not
    /// positive.
    pub fn read(path: &Path, taps: Taps) -> Result<Self> {
        let mut saved: Saved = json::parse(std::fs::read(path).map_err(Error::io(path))?, path)?;
        let mut variances = Vec::new();
        for ((layer, rank), norms) in taps.paths().zip(taps.ranks()).zip(taps.norms()?) {
            let of_layer = saved.variances.remove(layer).filter(|of_layer| of_layer.len() == rank);
            let valid = of_layer.filter(|of_layer| of_layer.iter().all(|v| *v > 0.0 && v.is_finite()));
            variances.push(valid.ok_or_else(|| {
                Error::format(path, format!("expected {rank} positive variances of {layer}"))
            })?);
            let near = |(then, now): (&f64, f64)| (then - now).abs() <= SAME_WEIGHTS * now;
            let Some(then) = saved.norms.get(layer) else {
                let reason =
                    format!("it does not tell the weights of {layer} that it belongs to: refit again");
                return Err(Error::format(path, reason));
            };
            if !then.iter().zip(norms).all(near) {
                let reason = format!("it was made for other weights of {layer}: refit again");
                return Err(Error::format(path, reason));
            }
        }
        match saved.variances.keys().next() {
            Some(layer) => Err(Error::format(path, format!("{layer} has no adapter in the model"))),
            None => Ok(Self { taps, variances }),
        }
    }

    /// Writes the variances of every layer as JSON, by the layers' paths, with the norms of its weights.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let layers = || self.taps.paths().map(str::to_string);
        let variances = layers().zip(self.variances.iter().cloned()).collect();
        files::write_json(path, &Saved { variances, norms: layers().zip(self.taps.norms()?).collect() })
    }

    /// The variances v of every layer, `(r)` each, in the order of the model.
    pub fn variances(&self) -> &[Vec<f64>] {
        &self.variances
    }

    /// Predicts Gaussian logits for every row: the logits of the mean, with the covariance that the posterior
    /// gives them. Takes one forward pass, and one backward pass for each class.
    ///
    /// # Errors
    /// If the forward or backward pass fails, or the model is not the one that was tapped.
    pub fn predict(&self, model: &dyn Predictor, batches: &[Batch]) -> Result<Linearised> {
        let mut all = Linearised { logits: Vec::new(), covariances: Vec::new() };
        let record = |part: &Batch| self.taps.record(model, part, Maps::A, Wanted::Jacobians);
        each_part(batches, record, |_, record| {
            let mut sum: Option<Tensor> = None;
            for (layer, variances) in record.layers.iter().zip(&self.variances) {
                sum = Some(ops::joined(sum, covariance(layer, variances)?)?);
            }
            let sum = sum.ok_or_else(|| no_active("MonteCLoRA"))?;
            all.covariances.extend(sum.flatten_from(1)?.to_vec2::<f64>()?);
            all.logits.extend(record.logits);
            Ok(())
        })?;
        Ok(all)
    }
}

/// `J (diag(v) (x) 1) J^T` of every example, `(b, c, c)`.
fn covariance(layer: &LayerRecord, variances: &[f64]) -> Result<Tensor> {
    let classes = layer.gradients.len();
    let jacobians = (0..classes).map(|k| layer.jacobian(k)).collect::<Result<Vec<_>>>()?;
    let jacobians = Tensor::stack(&jacobians, 1)?; // (b, c, r, in)
    let deviations: Vec<f64> = variances.iter().map(|v| v.sqrt()).collect();
    let deviations = Tensor::from_vec(deviations, (1, 1, variances.len(), 1), jacobians.device())?;
    let scaled = jacobians.broadcast_mul(&deviations)?.flatten_from(2)?;
    Ok(scaled.matmul(&scaled.transpose(1, 2)?.contiguous()?)?)
}

/// The sums over tokens from which a layer's curvature follows.
struct Curvature {
    in_dim: usize,
    tokens: f64,
    /// The sum of the squares of all inputs.
    inputs: f64,
    /// g, `(r)`.
    gradients: Vec<f64>,
}

impl Curvature {
    fn new(layer: &LayerRecord, roots: &[Vec<Vec<f64>>]) -> Result<Self> {
        let (_, _, in_dim) = layer.inputs.dims3()?;
        let inputs = ops::sum_of_squares(&layer.inputs)?;
        let square = layer.output_square(roots)?.to_vec2::<f64>()?;
        let gradients = square.iter().enumerate().map(|(i, row)| row[i]).collect();
        Ok(Self { in_dim, tokens: layer.tokens, inputs, gradients })
    }

    fn add(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.inputs += other.inputs;
        self.gradients.iter_mut().zip(&other.gradients).for_each(|(sum, g)| *sum += g);
    }

    /// `alpha g_i` for every row, from rows that stand for `scale` rows each.
    fn rows(&self, scale: f64) -> Vec<f64> {
        let alpha = self.inputs / (self.tokens.max(1.0) * self.in_dim as f64);
        self.gradients.iter().map(|g| alpha * scale * g).collect()
    }
}
