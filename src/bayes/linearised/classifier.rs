//! A trained classifier whose predictions average over a Gaussian of its A, in the linearised model.

use std::path::Path;

use candle_core::{DType, Device};

use super::posterior::LinearisedPosterior;
use super::predictive::Linearised;
use super::taps::Taps;
use crate::data::batch::Batch;
use crate::data::encode::Encoded;
use crate::data::split::{self, Subset};
use crate::data::task::{Example, Label};
use crate::error::Result;
use crate::models::hub::ModelFiles;
use crate::noise::Noise;
use crate::predict::Prediction;
use crate::train::{batches, Classifier, RunFolder};

/// The most training rows that a refit reads.
const REFIT_ROWS: usize = 512;
/// Draws of the logits for each row. They cost no forward pass.
const LOGIT_DRAWS: usize = 1000;

/// A classifier with a [`LinearisedPosterior`], which predicts class probabilities and their uncertainty from one
/// forward pass, and one backward pass for each class.
///
/// Any number of threads can predict at once.
///
/// # Example
/// ```
/// use candle_core::{DType, Device};
/// use monteclora::bayes::LinearisedClassifier;
/// use monteclora::data::task::Task;
/// use monteclora::inject::Targets;
/// use monteclora::models::hub::ModelFiles;
/// use monteclora::train::{Classifier, Method, MethodInit};
/// use monteclora::{Error, MonteCLoRAConfig, Noise};
///
/// # if !std::path::Path::new("examples/assets").exists() { return Ok::<(), Error>(()) } // not in the package
/// let files = ModelFiles::locate("examples/assets/tiny-roberta", None)?;
/// let start = MethodInit::Fresh(Method::MonteCLoRA(MonteCLoRAConfig::calibrated()), Targets::default());
/// let classifier = Classifier::load(&files, 2, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
/// let rows = classifier.encode(&Task::Sst2.load_folder("examples/assets/sst2".as_ref())?.train[..16])?;
/// // Train on the rows, then:
/// let linearised = LinearisedClassifier::refitted(classifier, &rows)?;
/// let predicted = linearised.predict(&["a fine film"])?;
/// assert!(predicted[0].uncertainty.is_some());
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct LinearisedClassifier {
    classifier: Classifier,
    posterior: LinearisedPosterior,
}

impl LinearisedClassifier {
    /// Predicts with the posterior of the greatest evidence on the training rows
    /// ([`LinearisedPosterior::refitted`]); of more than 512 rows, on a random sample with the same shares of the
    /// classes.
    ///
    /// # Errors
    /// If the adapters are not of LoRA or MonteCLoRA or are merged, or as [`LinearisedPosterior::refitted`].
    pub fn refitted(classifier: Classifier, rows: &[Encoded]) -> Result<Self> {
        // Rows without a label were not trained on.
        let labelled: Vec<usize> =
            (0..rows.len()).filter(|place| rows[*place].label != Label::Unknown).collect();
        let strata = split::at(&split::strata(rows), &labelled);
        let chosen = split::stratified(&strata, REFIT_ROWS, Noise::new(0), Subset::Curvature);
        let sample = split::at(rows, &split::at(&labelled, &chosen));
        let sample = batches(&classifier, &sample, classifier.eval_batch_size())?;
        Self::with(classifier, |classifier, taps| {
            LinearisedPosterior::refitted(classifier, taps, &sample, Some(labelled.len()))
        })
    }

    /// Predicts with the posterior that training left ([`LinearisedPosterior::trained`]).
    ///
    /// # Errors
    /// As [`LinearisedPosterior::trained`], or if an adapter is merged.
    pub fn trained(classifier: Classifier) -> Result<Self> {
        Self::with(classifier, |classifier, taps| {
            LinearisedPosterior::trained(classifier.model.as_ref(), taps)
        })
    }

    /// Opens what [`Self::save`] wrote, as [`Classifier::open`] does.
    ///
    /// # Errors
    /// As [`Classifier::open`]; if there is no posterior beside the adapter, or it is not of this adapter.
    pub fn open(dir: &Path, base: Option<&ModelFiles>, dtype: DType, device: &Device) -> Result<Self> {
        let classifier = Classifier::open(dir, base, dtype, device)?;
        let path = RunFolder::find_adapter(dir).join(RunFolder::POSTERIOR);
        Self::with(classifier, |_, taps| LinearisedPosterior::read(&path, taps))
    }

    fn with(
        mut classifier: Classifier,
        posterior: impl FnOnce(&Classifier, Taps) -> Result<LinearisedPosterior>,
    ) -> Result<Self> {
        let taps = Taps::install(classifier.model.as_mut())?;
        // No gradient reaches the taps of a layer that is recomputed.
        classifier.model.set_checkpoint_layers(false);
        let posterior = posterior(&classifier, taps)?;
        Ok(Self { classifier, posterior })
    }

    /// Writes the adapter as [`Classifier::save`] does, and the posterior beside it.
    ///
    /// # Errors
    /// As [`Classifier::save`].
    pub fn save(&self, base_model: &str, dir: &Path) -> Result<()> {
        self.classifier.save(base_model, dir)?;
        self.posterior.save(&RunFolder::new(dir).adapter().join(RunFolder::POSTERIOR))
    }

    /// The classifier, which itself predicts at the mean.
    pub fn classifier(&self) -> &Classifier {
        &self.classifier
    }

    /// The classifier, to set lengths and batch sizes. Its adapters have to stay as they are.
    pub fn classifier_mut(&mut self) -> &mut Classifier {
        &mut self.classifier
    }

    /// Predicts texts as [`Classifier::predict`] does. What a text gets does not depend on the others.
    ///
    /// # Errors
    /// As [`Classifier::predict`], or if the backward pass fails.
    pub fn predict<T: Clone + Into<Example>>(&self, texts: &[T]) -> Result<Vec<Prediction>> {
        let Some(batches) = self.classifier.text_batches(texts)? else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for row in self.rows(&batches)? {
            let draws = row.draws(LOGIT_DRAWS, Noise::new(0))?;
            all.extend(Prediction::of_draws(&draws, &self.classifier.labels)?);
        }
        Ok(all)
    }

    /// The class probabilities of every row of some batches.
    ///
    /// # Errors
    /// As [`LinearisedPosterior::predict`].
    pub fn probabilities(&self, batches: &[Batch]) -> Result<Vec<Vec<f64>>> {
        let mut all = Vec::new();
        for row in self.rows(batches)? {
            all.extend(row.probabilities(LOGIT_DRAWS, Noise::new(0))?);
        }
        Ok(all)
    }

    /// The Gaussian logits of each row, one at a time: so every row gets the same draws, wherever it stands.
    fn rows(&self, batches: &[Batch]) -> Result<impl Iterator<Item = Linearised>> {
        let Linearised { logits, covariances } = self.posterior.predict(&self.classifier, batches)?;
        let row = |(logits, covariance)| Linearised { logits: vec![logits], covariances: vec![covariance] };
        Ok(logits.into_iter().zip(covariances).map(row))
    }
}
