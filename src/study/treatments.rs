//! The ways to predict with a trained classifier that a study compares.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::cell::{Bin, CellResult};
use super::recipe::Recipe;
use super::rows::CellRows;
use super::{tfb, treatment};
use crate::adapter::Pass;
use crate::bayes::{
    Ensemble, Laplace, LastLayer, LinearisedPosterior, McDropout, ParameterDraws, Scope, Taps, Temperature,
};
use crate::data::batch::Batch;
use crate::data::encode::Encoded;
use crate::data::split::{self, Subset};
use crate::data::task::Label;
use crate::error::{Error, Result};
use crate::inject::merge;
use crate::metrics::{
    argmax, auroc, confidence_bin, entropy, softmax, uncertainty, Metrics, Uncertainty, ECE_BINS,
};
use crate::monteclora::MonteCLoRAConfig;
use crate::noise::Noise;
use crate::optim::IvonPosterior;
use crate::predict::{logits, posterior_draws, posterior_probabilities, Predictor, RunningMean};
use crate::train::{batches, Classifier, Predictions};

/// The number of rows per evaluation batch.
const BATCH: usize = 64;

/// The most rows from which a Laplace approximation computes its curvature: a stratified draw by the seed.
const LAPLACE_ROWS: usize = 512;
/// The number of samples of the Laplace approximation's logits.
const LAPLACE_SAMPLES: usize = 1000;

/// A trained model and the rows it is measured on.
pub(super) struct TrainedModel<'a> {
    pub classifier: Classifier,
    pub train: &'a [Encoded],
    pub held_out: &'a [Encoded],
    pub dev: &'a [Encoded],
    pub foreign: &'a [Encoded],
    pub draws: usize,
    /// The last checkpoints of the training, including its end.
    pub members: Vec<BTreeMap<String, Tensor>>,
    /// IVON's posterior, if it was the optimiser.
    pub ivon: Option<IvonPosterior>,
    pub noise: Noise,
}

impl TrainedModel<'_> {
    /// The model with IVON's draws as its posterior draws; `None` without IVON.
    fn parameter_draws(&self) -> Result<Option<ParameterDraws<'_>>> {
        let Some(ivon) = &self.ivon else { return Ok(None) };
        let draws = (0..self.draws as u64).map(|draw| ivon.draw(draw)).collect::<Result<_>>()?;
        Ok(Some(ParameterDraws::new(&self.classifier, &self.classifier.params, draws)))
    }
}

/// The treatments of a recipe that [`measure`] fills in for a classification task, which a plan may name.
pub(super) fn of_recipe(recipe: &Recipe, draws: usize) -> Vec<String> {
    let mut found = vec![treatment::MEAN.to_string()];
    if recipe.has_posterior() {
        found.push(treatment::draws(draws));
    }
    if recipe.held_out > 0.0 {
        found.push(treatment::TEMPERATURE.to_string());
        found.extend(recipe.has_posterior().then(|| treatment::tempered_draws(draws)));
    }
    let others: &[&str] = match (recipe.is_lora(), recipe.held_out > 0.0) {
        (false, false) if recipe.is_monteclora() => match has_linearised(recipe) {
            true => &[treatment::LINEARISED, treatment::REFITTED, treatment::LAPLACE],
            false => &[treatment::REFITTED, treatment::LAPLACE],
        },
        (false, _) => &[],
        (true, true) => &[treatment::TFB, treatment::TFB_HELD_OUT],
        (true, false) => &[
            treatment::MC_DROPOUT,
            treatment::CHECKPOINTS,
            treatment::LAST_LAYER_LAPLACE,
            treatment::LAPLACE,
        ],
    };
    found.extend(others.iter().map(ToString::to_string));
    found
}

/// Whether the trained posterior of a recipe can be linearised.
fn has_linearised(recipe: &Recipe) -> bool {
    recipe.posterior().is_some_and(MonteCLoRAConfig::has_row_variances)
}

/// Fills in the arms of a result and their predictions of every row.
pub(super) fn measure(
    trained: TrainedModel,
    recipe: &Recipe,
    result: &mut CellResult,
    rows: &mut CellRows,
) -> Result<()> {
    let classifier = &trained.classifier;
    let dev = batches(classifier, trained.dev, BATCH)?;
    let mean = Predictions::new(classifier, trained.dev, &dev, 0)?;
    if classifier.is_regression() {
        result.arms.insert(treatment::MEAN.to_string(), mean.evaluate().map_err(not_finite)?.mean);
        return Ok(());
    }
    let labels = classes(trained.dev)?;
    rows.label.clone_from(&labels);
    rows.row = trained.dev.iter().map(|row| row.row as u32).collect();
    let foreign = match trained.foreign {
        [] => Vec::new(),
        rows => batches(classifier, rows, BATCH)?,
    };
    let mut arms = ClassifierArms { labels: &labels, result, rows };
    arms.add(treatment::MEAN, &mean.mean)?;
    let others = logits(classifier, &foreign, &Pass::Mean.into())?;
    let others: Vec<Vec<f64>> = others.iter().map(|row| softmax(row)).collect();
    let entropies = |rows: &[Vec<f64>]| -> Vec<f64> { rows.iter().map(|row| entropy(row)).collect() };
    arms.tell("mean: entropy", &entropies(&mean.mean), &entropies(&others))?;
    let held_out = match trained.held_out {
        [] => Vec::new(),
        rows => batches(classifier, rows, BATCH)?,
    };
    let truth = classes(trained.held_out)?;
    if !held_out.is_empty() {
        let fitted = logits(classifier, &held_out, &Pass::Mean.into())?;
        arms.add_tempered(treatment::TEMPERATURE, &fitted, &truth, &mean.logits)?;
    }
    if recipe.has_posterior() {
        let replaced = trained.parameter_draws()?;
        let model = replaced.as_ref().map_or(classifier as &dyn Predictor, |replaced| replaced);
        let draws = |rows: &[Batch]| posterior_draws(model, rows, trained.draws);
        let name = treatment::draws(trained.draws);
        let average = arms.add_draws(&name, draws(&dev)?, draws(&foreign)?)?;
        if !held_out.is_empty() {
            let fitted = posterior_probabilities(model, &held_out, trained.draws)?;
            let name = treatment::tempered_draws(trained.draws);
            arms.add_tempered(&name, &logarithms(&fitted), &truth, &logarithms(&average))?;
        }
    }
    if recipe.is_lora() {
        of_trained_lora(trained, (&held_out, &truth), &dev, &foreign, &mut arms)?;
    } else if recipe.is_monteclora() && held_out.is_empty() {
        of_trained_posterior(trained, has_linearised(recipe), &dev, &foreign, &mut arms)?;
    }
    Ok(())
}

/// Log-probabilities as logits; a probability of 0 becomes the smallest positive normal f64.
fn logarithms(probabilities: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let row = |row: &Vec<f64>| row.iter().map(|p| p.max(f64::MIN_POSITIVE).ln()).collect();
    probabilities.iter().map(row).collect()
}

/// The Bayesian treatments of a LoRA that was trained without a posterior: those fitted on held-out rows if
/// there are any, and the others if it was trained on all rows.
fn of_trained_lora(
    mut trained: TrainedModel,
    (held_out, labels): (&[Batch], &[u32]),
    dev: &[Batch],
    foreign: &[Batch],
    arms: &mut ClassifierArms,
) -> Result<()> {
    let classifier = &trained.classifier;
    if !held_out.is_empty() {
        return tfb::arms(classifier, (held_out, labels), dev, trained.draws)?
            .iter()
            .try_for_each(|(treatment, rows)| arms.add(treatment, rows));
    }
    let dropped = |rows: &[Batch]| posterior_draws(&McDropout(classifier), rows, trained.draws);
    arms.add_draws(treatment::MC_DROPOUT, dropped(dev)?, dropped(foreign)?)?;
    let mut ensemble = Ensemble::new();
    trained.members.into_iter().for_each(|member| ensemble.push_snapshot(member));
    if !ensemble.is_empty() {
        let members = |rows: &[Batch]| ensemble.draws(classifier, &classifier.params, rows);
        arms.add_draws(treatment::CHECKPOINTS, members(dev)?, members(foreign)?)?;
    }
    let train = batches(classifier, &of_curvature(trained.train, trained.noise), BATCH)?;
    let of_rows = trained.train.len();
    // With merged adapters, a backward pass stops at the head.
    merge::merge(trained.classifier.model.as_mut())?;
    let scope = Scope::LastLayer(LastLayer::of_head(&trained.classifier.params)?);
    let predicted = laplace(&trained.classifier, scope, (&train, of_rows), dev, trained.noise);
    merge::unmerge(trained.classifier.model.as_mut())?;
    arms.add(treatment::LAST_LAYER_LAPLACE, &predicted?)?;
    let taps = Taps::install(trained.classifier.model.as_mut())?;
    let scope = Scope::Adapters(taps.clone());
    let predicted = laplace(&trained.classifier, scope, (&train, of_rows), dev, trained.noise);
    taps.remove(trained.classifier.model.as_mut())?;
    arms.add(treatment::LAPLACE, &predicted?)
}

/// The predictions of a trained MonteCLoRA that is linearised in its adapters: under its own posterior, under
/// one of the same form with the greatest evidence, and under a Laplace approximation.
fn of_trained_posterior(
    mut trained: TrainedModel,
    has_linearised: bool,
    dev: &[Batch],
    foreign: &[Batch],
    arms: &mut ClassifierArms,
) -> Result<()> {
    let train = batches(&trained.classifier, &of_curvature(trained.train, trained.noise), BATCH)?;
    let of_rows = trained.train.len();
    let taps = Taps::install(trained.classifier.model.as_mut())?;
    let classifier = &trained.classifier;
    let own = || LinearisedPosterior::trained(classifier.model.as_ref(), taps.clone());
    let own = has_linearised.then(own).transpose()?;
    let refitted = LinearisedPosterior::refitted(classifier, taps.clone(), &train, Some(of_rows))?;
    let named = own.map(|own| (treatment::LINEARISED, own)).into_iter();
    for (name, posterior) in named.chain([(treatment::REFITTED, refitted)]) {
        let draws = |rows: &[Batch]| -> Result<Vec<Vec<Vec<f64>>>> {
            posterior.predict(classifier, rows)?.draws(LAPLACE_SAMPLES, trained.noise)
        };
        arms.add_draws(name, draws(dev)?, draws(foreign)?)?;
    }
    let scope = Scope::Adapters(taps.clone());
    let predicted = laplace(classifier, scope, (&train, of_rows), dev, trained.noise)?;
    taps.remove(trained.classifier.model.as_mut())?;
    arms.add(treatment::LAPLACE, &predicted)
}

/// The rows whose curvature stands for that of all.
fn of_curvature(rows: &[Encoded], noise: Noise) -> Vec<Encoded> {
    split::at(rows, &split::stratified(&split::strata(rows), LAPLACE_ROWS, noise, Subset::Curvature))
}

/// The probabilities under a Laplace approximation whose prior precision maximises the evidence. `train` is a
/// sample of so many training rows.
fn laplace(
    classifier: &Classifier,
    scope: Scope,
    (train, of_rows): (&[Batch], usize),
    dev: &[Batch],
    noise: Noise,
) -> Result<Vec<Vec<f64>>> {
    let mut laplace = Laplace::fit(classifier, scope, train, Some(of_rows))?;
    laplace.maximise_evidence();
    laplace.predict(classifier, dev)?.probabilities(LAPLACE_SAMPLES, noise)
}

/// Records the arms of a classifier.
struct ClassifierArms<'a> {
    labels: &'a [u32],
    result: &'a mut CellResult,
    rows: &'a mut CellRows,
}

impl ClassifierArms<'_> {
    fn add(&mut self, treatment: &str, probabilities: &[Vec<f64>]) -> Result<()> {
        let metrics = Metrics::classification(probabilities, self.labels).map_err(not_finite)?;
        self.result.arms.insert(treatment.to_string(), metrics);
        self.result.reliability.insert(treatment.to_string(), reliability(probabilities, self.labels));
        self.rows.add(treatment, probabilities);
        Ok(())
    }

    /// Adds the `measured` logits at the temperature that is fitted on the logits `fitted` of other rows.
    fn add_tempered(
        &mut self,
        treatment: &str,
        fitted: &[Vec<f64>],
        labels: &[u32],
        measured: &[Vec<f64>],
    ) -> Result<()> {
        let temperature = Temperature::fit(fitted, labels).map_err(not_finite)?;
        self.add(treatment, &temperature.probabilities(measured))
    }

    /// Adds the average of draws, and how well their uncertainty recognises foreign rows, of which
    /// there are as many draws. Returns the average.
    fn add_draws(
        &mut self,
        treatment: &str,
        draws: Vec<Vec<Vec<f64>>>,
        foreign: Vec<Vec<Vec<f64>>>,
    ) -> Result<Vec<Vec<f64>>> {
        let (own, others) = (uncertainty(&draws).map_err(not_finite)?, uncertainty(&foreign)?);
        let both = |of: fn(&Uncertainty) -> f64| {
            [&own, &others].map(|rows| rows.iter().map(of).collect::<Vec<f64>>())
        };
        let [total, total_of_others] = both(|row| row.total);
        self.tell(&format!("{treatment}: entropy"), &total, &total_of_others)?;
        let [epistemic, epistemic_of_others] = both(|row| row.epistemic);
        self.tell(&format!("{treatment}: mutual information"), &epistemic, &epistemic_of_others)?;
        let mut average = RunningMean::default();
        draws.into_iter().for_each(|rows| average.add(rows.into_iter()));
        let average = average.finish();
        self.add(treatment, &average)?;
        Ok(average)
    }

    /// Adds the AUROC with which a score recognises foreign rows, if there are any.
    fn tell(&mut self, name: &str, own: &[f64], others: &[f64]) -> Result<()> {
        if !others.is_empty() {
            self.result.ood.insert(name.to_string(), auroc(own, others)?);
        }
        Ok(())
    }
}

/// The labels of rows, which must be classes.
fn classes(rows: &[Encoded]) -> Result<Vec<u32>> {
    let class = |row: &Encoded| match row.label {
        Label::Class(class) => Ok(class),
        Label::Score(_) => Err(Error::config("labels", format!("row {} has a score", row.row))),
        Label::Unknown => Err(Error::config("labels", format!("row {} has no label", row.row))),
    };
    rows.iter().map(class).collect()
}

/// Treats predictions that are not probabilities as those of a diverged model.
pub(super) fn not_finite(error: Error) -> Error {
    Error::NonFinite {
        step: 0,
        term: format!("predictions ({error})"),
        value: f64::NAN,
        layer: None,
        rows: Vec::new(),
    }
}

/// The reliability diagram, in the bins of the expected calibration error: (low, high], of equal width.
pub(super) fn reliability(probabilities: &[Vec<f64>], labels: &[u32]) -> Vec<Bin> {
    let mut bins = vec![Bin::default(); ECE_BINS];
    for (row, label) in probabilities.iter().zip(labels) {
        let class = argmax(row);
        let bin = &mut bins[confidence_bin(row[class])];
        bin.count += 1;
        bin.confidence += row[class];
        bin.accuracy += f64::from(u8::from(class == *label as usize));
    }
    for bin in bins.iter_mut().filter(|bin| bin.count > 0) {
        bin.confidence /= bin.count as f64;
        bin.accuracy /= bin.count as f64;
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::study::CellKey;

    /// The arms of two rows of classes 0 and 1, from these draws of theirs and of a foreign row.
    fn arms_of(own: &[[[f64; 2]; 2]], foreign: &[[f64; 2]]) -> Result<CellResult> {
        let key = CellKey { task: "sst2".into(), method: "x".into(), lr: 1.0, batch_size: 1, seed: 1 };
        let (mut result, mut rows) = (CellResult::begun(&key, "accuracy"), CellRows::default());
        let mut arms = ClassifierArms { labels: &[0, 1], result: &mut result, rows: &mut rows };
        let own = own.iter().map(|draw| draw.iter().map(|row| row.to_vec()).collect()).collect();
        let foreign = foreign.iter().map(|row| vec![row.to_vec()]).collect();
        let average = arms.add_draws("2 draws", own, foreign)?;
        assert_eq!(average, [[0.75, 0.25], [0.5, 0.5]]);
        Ok(result)
    }

    #[test]
    fn foreign_rows_are_told_by_the_entropy_of_the_average_and_by_what_draws_disagree_on() -> Result<()> {
        // Entropies of the averages .56 and .69; the second row's draws disagree more.
        let own = [[[0.8, 0.2], [0.9, 0.1]], [[0.7, 0.3], [0.1, 0.9]]];
        let of = |foreign: &[[f64; 2]]| -> Result<[f64; 2]> {
            let ood = arms_of(&own, foreign)?.ood;
            Ok([ood["2 draws: entropy"], ood["2 draws: mutual information"]])
        };
        assert_eq!(of(&[[1.0, 0.0], [0.0, 1.0]])?, [0.75, 1.0]); // as unsure as the second, all of it disagreement
        assert_eq!(of(&[[0.5, 0.5], [0.5, 0.5]])?, [0.75, 0.0]); // the same, none of it
        assert_eq!(of(&[[1.0, 0.0], [1.0, 0.0]])?, [0.0, 0.0]); // sure
        Ok(())
    }

    #[test]
    fn a_bin_has_the_mean_confidence_and_the_share_that_is_right() {
        let bins = reliability(&[vec![0.94, 0.06], vec![0.96, 0.04]], &[0, 1]);
        let filled: Vec<&Bin> = bins.iter().filter(|bin| bin.count > 0).collect();
        assert_eq!((filled.len(), filled[0].count, filled[0].accuracy), (1, 2, 0.5));
        assert!((filled[0].confidence - 0.95).abs() < 1e-15);
    }

    #[test]
    fn a_curvature_is_of_rows_of_every_class() {
        let label = |row| Label::Class(u32::from(row >= 300));
        let row = |row| Encoded { ids: vec![1], type_ids: vec![0], label: label(row), row };
        let rows: Vec<Encoded> = (0..600).map(row).collect();
        let chosen = of_curvature(&rows, Noise::new(1));
        let ones = chosen.iter().filter(|row| row.label == Label::Class(1)).count();
        assert_eq!((chosen.len(), ones), (LAPLACE_ROWS, LAPLACE_ROWS / 2));
    }
}
