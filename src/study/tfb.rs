//! Training-free Bayesianisation of a cell's LoRA, in the two ways that its width is chosen.

use crate::adapter::Pass;
use crate::bayes::tfb::{self, Search, Tfb};
use crate::data::batch::Batch;
use crate::error::Result;
use crate::predict::{logits, Predictor};
use crate::train::Classifier;

/// The name of an arm, and its probabilities, one row an example.
type NamedProbabilities = (&'static str, Vec<Vec<f64>>);

/// Probabilities of `dev` by arm: the widest noise that changes little of what the model itself says of the
/// held-out rows (as its authors choose it), and the noise whose loss on their labels is least.
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
    Ok([("tfb", at(tolerated)?), ("tfb held-out", at(best)?)])
}
