//! A trained classifier as it is, or linearised: what a program opens that lets its user choose.

use std::path::Path;

use candle_core::{DType, Device};

use super::linearised::LinearisedClassifier;
use crate::adapter::Pass;
use crate::data::task::Example;
use crate::error::Result;
use crate::metrics::Metrics;
use crate::models::hub::ModelFiles;
use crate::predict::Prediction;
use crate::train::{batches, Classifier, Evaluation, Predictions};

/// A trained classifier that predicts at its mean, or in the linearised model with the posterior of its run.
#[derive(Debug)]
pub enum TrainedClassifier {
    /// As it was trained.
    Plain(Classifier),
    /// Linearised in A.
    Linearised(LinearisedClassifier),
}

impl TrainedClassifier {
    /// Opens a folder by [`Classifier::open`] or, `linearised`, by [`LinearisedClassifier::open`].
    ///
    /// # Errors
    /// As these.
    pub fn open(
        dir: &Path,
        base: Option<&ModelFiles>,
        linearised: bool,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Ok(match linearised {
            true => Self::Linearised(LinearisedClassifier::open(dir, base, dtype, device)?),
            false => Self::Plain(Classifier::open(dir, base, dtype, device)?),
        })
    }

    /// The classifier itself.
    pub fn classifier(&self) -> &Classifier {
        match self {
            Self::Plain(classifier) => classifier,
            Self::Linearised(linearised) => linearised.classifier(),
        }
    }

    /// The classifier, to set lengths, batch sizes and labels. Its adapters have to stay as they are.
    pub fn classifier_mut(&mut self) -> &mut Classifier {
        match self {
            Self::Plain(classifier) => classifier,
            Self::Linearised(linearised) => linearised.classifier_mut(),
        }
    }

    /// Measures labelled examples by the predictions of [`Self::predict`].
    ///
    /// # Errors
    /// As [`Self::predict`] and [`Classifier::evaluate`].
    pub fn evaluate(&self, examples: &[Example], draws: usize) -> Result<Metrics> {
        let classifier = self.classifier();
        let rows = classifier.encode(examples)?;
        let batches = batches(classifier, &rows, classifier.eval_batch_size())?;
        let mut predictions = Predictions::new(classifier, &rows, &batches, draws)?;
        if let (Self::Linearised(linearised), 0) = (self, draws) {
            predictions.linearised = Some(linearised.probabilities(&batches)?);
        }
        let Evaluation { mean, posterior, linearised } = predictions.evaluate_own_data()?;
        Ok(posterior.or(linearised).unwrap_or(mean))
    }

    /// Predicts texts: without draws at the mean, or in the linearised model; else averaged over as many posterior
    /// draws, which are those of the model as it is.
    ///
    /// # Errors
    /// As [`Classifier::predict`], [`LinearisedClassifier::predict`] and [`Classifier::predict_averaged`].
    pub fn predict<T: Clone + Into<Example>>(&self, texts: &[T], draws: usize) -> Result<Vec<Prediction>> {
        match (self, draws) {
            (Self::Plain(classifier), 0) => classifier.predict(texts, &Pass::Mean),
            (Self::Linearised(linearised), 0) => linearised.predict(texts),
            (_, draws) => self.classifier().predict_averaged(texts, draws),
        }
    }
}
