//! Training-free Bayesianisation of a cell's LoRA, with two ways to choose the noise.

use super::treatment;
use crate::adapter::Pass;
use crate::bayes::tfb::{self, Search, Tfb};
use crate::data::batch::Batch;
use crate::error::Result;
use crate::predict::{logits, Predictor};
use crate::train::Classifier;

/// A treatment, and its probabilities, one row per example.
type NamedProbabilities = (&'static str, Vec<Vec<f64>>);

/// The probabilities of `dev` by treatment. `tfb` uses the largest noise that hardly changes the loss on the
/// model's own predictions for the held-out rows (the authors' choice), `tfb held-out` the noise with the
/// lowest loss on their labels.
pub(super) fn arms(
    classifier: &Classifier,
    held_out: (&[Batch], &[u32]),
    dev: &[Batch],
    draws: usize,
) -> Result<[NamedProbabilities; 2]> {
    let (model, params) = (classifier as &dyn Predictor, &classifier.params);
    let family = Tfb::new(classifier.model.as_ref(), params.noise())?;
    let search = Search { draws, ..Search::default() };
    let own = tfb::predicted(&logits(model, held_out.0, &Pass::Mean.into())?);
    let tolerance = tfb::released_tolerance(own.len());
    let tolerated = family.tolerated(model, params, (held_out.0, &own), tolerance, &search)?;
    let best = family.best(model, params, held_out, &search)?;
    let at = |sigma| family.probabilities(model, params, dev, sigma, draws);
    Ok([(treatment::TFB, at(tolerated)?), (treatment::TFB_HELD_OUT, at(best)?)])
}
