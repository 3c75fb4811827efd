//! The ways to predict with a trained model that a study compares.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::cell::{Bin, CellResult};
use super::recipe::Recipe;
use super::tfb;
use crate::adapter::Pass;
use crate::bayes::laplace::{Laplace, LastLayer, Scope, Taps};
use crate::bayes::{auroc, entropy, uncertainty, Ensemble, McDropout, Replaced, Temperature, Uncertainty};
use crate::data::batch::Batch;
use crate::data::encode::Encoded;
use crate::data::task::Label;
use crate::error::{Error, Result};
use crate::inject::merge;
use crate::metrics::{softmax, Metrics, ECE_BINS};
use crate::noise::Noise;
use crate::optim::IvonPosterior;
use crate::predict::{logits, posterior_draws, posterior_probabilities, Predictor, RunningMean};
use crate::train::{batches, Classifier, Predictions};

/// Rows of an evaluation batch.
const BATCH: usize = 64;

/// Rows that a Laplace approximation takes its curvature from, at most.
const LAPLACE_ROWS: usize = 512;
/// Samples of its logits.
const LAPLACE_SAMPLES: usize = 1000;

/// A trained model and the rows it is measured on.
pub(super) struct TrainedModel<'a> {
    pub classifier: Classifier,
    pub train: &'a [Encoded],
    pub held_out: &'a [Encoded],
    pub dev: &'a [Encoded],
    pub foreign: &'a [Encoded],
    pub draws: usize,
    /// Earlier parameters of the same training.
    pub members: Vec<BTreeMap<String, Tensor>>,
    /// What IVON ended in, where it was the optimiser.
    pub ivon: Option<IvonPosterior>,
    pub noise: Noise,
}

impl TrainedModel<'_> {
    /// The model with IVON's draws for those of an adapter.
    fn replaced(&self) -> Result<Option<Replaced<'_>>> {
        let Some(ivon) = &self.ivon else { return Ok(None) };
        let draws = (0..self.draws as u64).map(|draw| ivon.draw(draw)).collect::<Result<_>>()?;
        Ok(Some(Replaced::new(&self.classifier, &self.classifier.params, draws)))
    }
}

/// Fills in the arms of a result.
pub(super) fn measure(trained: TrainedModel, recipe: &Recipe, result: &mut CellResult) -> Result<()> {
    let classifier = &trained.classifier;
    let dev = batches(classifier, trained.dev, BATCH)?;
    let mean = Predictions::new(classifier, trained.dev, &dev, 0)?;
    if classifier.is_regression() {
        result.arms.insert("mean".to_string(), mean.evaluate().map_err(not_finite)?.mean);
        return Ok(());
    }
    let labels = classes(trained.dev)?;
    let mut arms = Arms { labels: &labels, result };
    arms.add("mean", &mean.mean)?;
    out_of_domain(&trained, recipe, &dev, &mean.mean, &mut arms)?;
    if recipe.is_lora() {
        of_trained_lora(trained, &dev, &mean.logits, &mut arms)?;
    }
    Ok(())
}

/// Posterior draws, and how well uncertainty tells foreign rows.
fn out_of_domain(
    trained: &TrainedModel,
    recipe: &Recipe,
    dev: &[Batch],
    mean: &[Vec<f64>],
    arms: &mut Arms,
) -> Result<()> {
    let classifier = &trained.classifier;
    let foreign = match trained.foreign {
        [] => Vec::new(),
        rows => batches(classifier, rows, BATCH)?,
    };
    let mut told = |name: &str, own: &[f64], other: &[f64]| -> Result<()> {
        if !other.is_empty() {
            arms.result.ood.insert(name.to_string(), auroc(own, other)?);
        }
        Ok(())
    };
    let entropies = |rows: &[Vec<f64>]| -> Vec<f64> { rows.iter().map(|row| entropy(row)).collect() };
    let others = logits(classifier, &foreign, &Pass::Mean.into())?;
    let others: Vec<Vec<f64>> = others.iter().map(|row| softmax(row)).collect();
    told("mean: entropy", &entropies(mean), &entropies(&others))?;
    if recipe.has_posterior() {
        let replaced = trained.replaced()?;
        let model = replaced.as_ref().map_or(classifier as &dyn Predictor, |replaced| replaced);
        let draws = posterior_draws(model, dev, trained.draws)?;
        if !foreign.is_empty() {
            let others = uncertainty(&posterior_draws(model, &foreign, trained.draws)?)?;
            let own = uncertainty(&draws).map_err(not_finite)?;
            let total = |rows: &[Uncertainty]| rows.iter().map(|row| row.total).collect::<Vec<_>>();
            let epistemic = |rows: &[Uncertainty]| rows.iter().map(|row| row.epistemic).collect::<Vec<_>>();
            told(&format!("{} draws: entropy", trained.draws), &total(&own), &total(&others))?;
            let name = format!("{} draws: mutual information", trained.draws);
            told(&name, &epistemic(&own), &epistemic(&others))?;
        }
        let mut average = RunningMean::default();
        draws.into_iter().for_each(|rows| average.add(rows.into_iter()));
        arms.add(&format!("{} draws", trained.draws), &average.finish())?;
    }
    Ok(())
}

/// The Bayesian treatments of a LoRA that was trained without a posterior.
fn of_trained_lora(
    mut trained: TrainedModel,
    dev: &[Batch],
    mean: &[Vec<f64>],
    arms: &mut Arms,
) -> Result<()> {
    let classifier = &trained.classifier;
    if !trained.held_out.is_empty() {
        let rows = batches(classifier, trained.held_out, BATCH)?;
        let logits = logits(classifier, &rows, &Pass::Mean.into())?;
        let temperature = Temperature::fit(&logits, &classes(trained.held_out)?).map_err(not_finite)?;
        arms.add("temperature", &temperature.probabilities(mean))?;
        for (arm, rows) in tfb::arms(classifier, (&rows, &classes(trained.held_out)?), dev, trained.draws)? {
            arms.add(arm, &rows)?;
        }
    }
    arms.add("mc dropout", &posterior_probabilities(&McDropout(classifier), dev, trained.draws)?)?;
    let mut ensemble = Ensemble::new();
    trained.members.into_iter().for_each(|member| ensemble.push_snapshot(member));
    if !ensemble.is_empty() {
        arms.add("checkpoints", &ensemble.probabilities(classifier, &classifier.params, dev)?)?;
    }
    let train = batches(classifier, trained.train, BATCH)?;
    // Merged, a backward pass ends at the head.
    merge::merge(trained.classifier.model.as_mut())?;
    let scope = Scope::LastLayer(LastLayer::of_head(&trained.classifier.params)?);
    let predicted = laplace(&trained.classifier, scope, &train, dev, trained.noise);
    merge::unmerge(trained.classifier.model.as_mut())?;
    arms.add("last-layer laplace", &predicted?)?;
    let taps = Taps::install(trained.classifier.model.as_mut())?;
    let scope = Scope::Adapters(taps.clone());
    let predicted = laplace(&trained.classifier, scope, &train, dev, trained.noise);
    taps.remove(trained.classifier.model.as_mut())?;
    arms.add("laplace", &predicted?)
}

/// Probabilities under a Laplace approximation whose prior precision maximises the evidence.
fn laplace(
    classifier: &Classifier,
    scope: Scope,
    train: &[Batch],
    dev: &[Batch],
    noise: Noise,
) -> Result<Vec<Vec<f64>>> {
    let mut laplace = Laplace::fit(classifier, scope, train, Some(LAPLACE_ROWS))?;
    laplace.maximise_evidence();
    laplace.predict(classifier, dev)?.probabilities(LAPLACE_SAMPLES, noise)
}

/// Where the ways to predict are written down.
struct Arms<'a> {
    labels: &'a [u32],
    result: &'a mut CellResult,
}

impl Arms<'_> {
    fn add(&mut self, arm: &str, probabilities: &[Vec<f64>]) -> Result<()> {
        let metrics = Metrics::classification(probabilities, self.labels).map_err(not_finite)?;
        self.result.arms.insert(arm.to_string(), metrics);
        self.result.reliability.insert(arm.to_string(), reliability(probabilities, self.labels));
        Ok(())
    }
}

/// The labels of classes.
fn classes(rows: &[Encoded]) -> Result<Vec<u32>> {
    let class = |row: &Encoded| match row.label {
        Label::Class(class) => Ok(class),
        Label::Score(_) => Err(Error::config("labels", format!("row {} has a score", row.row))),
    };
    rows.iter().map(class).collect()
}

/// Predictions that are no probabilities are those of a model that diverged.
fn not_finite(error: Error) -> Error {
    Error::NonFinite {
        step: 0,
        term: format!("predictions ({error})"),
        value: f64::NAN,
        layer: None,
        rows: Vec::new(),
    }
}

/// The reliability diagram, in the bins of the expected calibration error: (low, high], of equal width.
fn reliability(probabilities: &[Vec<f64>], labels: &[u32]) -> Vec<Bin> {
    let mut bins = vec![Bin::default(); ECE_BINS];
    for (row, label) in probabilities.iter().zip(labels) {
        let (best, highest) =
            row.iter().enumerate().fold((0, f64::MIN), |top, (i, p)| if *p > top.1 { (i, *p) } else { top });
        let bin = &mut bins[((highest * ECE_BINS as f64).ceil() as usize).clamp(1, ECE_BINS) - 1];
        bin.count += 1;
        bin.confidence += highest;
        bin.accuracy += f64::from(u8::from(best == *label as usize));
    }
    for bin in bins.iter_mut().filter(|bin| bin.count > 0) {
        bin.confidence /= bin.count as f64;
        bin.accuracy /= bin.count as f64;
    }
    bins
}
