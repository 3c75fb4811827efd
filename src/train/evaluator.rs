//! An [`Observer`] that evaluates a classifier on held-out rows and records the run.

use std::fmt;

use super::classifier::Classifier;
use super::objective::{Observer, StepRecord};
use super::predictions::{batches, Evaluation, Predictions};
use crate::data::batch::Batch;
use crate::data::encode::Encoded;
use crate::error::{Error, Result};
use crate::metrics::Metrics;

type Score<'a> = Box<dyn Fn(&Predictions) -> Result<f64> + 'a>;

/// Evaluates a [`Classifier`] on held-out rows whenever [`fit`](super::fit) asks, at the posterior mean.
///
/// # Example
/// Early stopping by a custom metric:
/// ```
/// use candle_core::{DType, Device};
/// use monteclora::adapters::LoraConfig;
/// use monteclora::data::batch::Batcher;
/// use monteclora::data::encode::TextEncoder;
/// use monteclora::data::task::{Label, Task};
/// use monteclora::data::tokenizer;
/// use monteclora::inject::Targets;
/// use monteclora::models::hub::ModelFiles;
/// use monteclora::train::{
///     fit, Classification, Classifier, Evaluator, Method, MethodInit, Observer, Predictions, TrainConfig,
/// };
/// use monteclora::{Error, Noise, Result};
///
/// # if !std::path::Path::new("examples/assets").exists() { return Ok::<(), Error>(()) } // not in the package
/// let files = ModelFiles::locate("examples/assets/tiny-roberta", None)?;
/// let start = MethodInit::Fresh(Method::Lora(LoraConfig::default()), Targets::default());
/// let classifier = Classifier::load(&files, 2, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
/// let tokenizer = tokenizer::read(files.tokenizer_path().ok_or_else(|| Error::config("model", "no tokenizer"))?)?;
/// let encoder = TextEncoder::new(tokenizer, 32, 512)?;
/// let data = Task::Sst2.load_folder("examples/assets/sst2".as_ref())?;
/// let (rows, held_out) = (encoder.encode(&data.train[..8])?, encoder.encode(&data.dev[0].1[..8])?);
///
/// /// The share of rows of class 1 that are found.
/// fn recall(predictions: &Predictions) -> Result<f64> {
///     let ones = predictions.labels().iter().zip(&predictions.mean).filter(|(label, _)| **label == Label::Class(1));
///     let found: Vec<bool> = ones.map(|(_, row)| row[1] > row[0]).collect();
///     Ok(found.iter().filter(|found| **found).count() as f64 / found.len().max(1) as f64)
/// }
///
/// let mut evaluator = Evaluator::new(&classifier, &held_out, 8)?.with_score(recall);
/// let objective = Classification::new(&classifier, &rows, Batcher::new(4, false, Noise::new(1))?);
/// let config = TrainConfig { epochs: 3, patience: Some(1), ..Default::default() };
/// let summary = fit(&objective, &classifier.params, &config, &mut evaluator)?;
/// assert_eq!(summary.steps, evaluator.records().len());
/// assert_eq!(evaluator.evaluations().last().map(|(step, _)| *step), Some(summary.steps));
///
/// let mut by_name = Evaluator::new(&classifier, &held_out, 8)?.with_metric("macro_f1")?;
/// let score = by_name.evaluate(0)?;
/// assert!(score.is_some() && score == by_name.evaluations()[0].1.mean.macro_f1);
/// # Ok::<(), Error>(())
/// ```
pub struct Evaluator<'a> {
    classifier: &'a Classifier,
    rows: &'a [Encoded],
    batches: Vec<Batch>,
    score: Score<'a>,
    records: Vec<StepRecord>,
    evaluations: Vec<(usize, Evaluation)>,
}

impl<'a> Evaluator<'a> {
    /// Creates an evaluator on these rows. The score is the accuracy, or for a regression the negative mean
    /// squared error.
    ///
    /// # Errors
    /// If there are no rows, or candle fails.
    pub fn new(classifier: &'a Classifier, rows: &'a [Encoded], batch_size: usize) -> Result<Self> {
        let batches = batches(classifier, rows, batch_size)?;
        let metric = if classifier.is_regression() { "mse" } else { "accuracy" };
        let score = by_metric(metric);
        Ok(Self { classifier, rows, batches, score, records: Vec::new(), evaluations: Vec::new() })
    }

    /// Scores by the metric with this name ([`Metrics::names`]), negated if lower is better.
    ///
    /// # Errors
    /// If the classifier's predictions have no such metric.
    pub fn with_metric(self, metric: &'a str) -> Result<Self> {
        let known = Metrics::names(self.classifier.model.num_labels());
        if !known.contains(&metric) {
            let reason = format!("expected one of {}, got {metric}", known.join(", "));
            return Err(Error::config("metric", reason));
        }
        Ok(Self { score: by_metric(metric), ..self })
    }

    /// Scores by a function; higher is better.
    pub fn with_score(self, score: impl Fn(&Predictions) -> Result<f64> + 'a) -> Self {
        Self { score: Box::new(score), ..self }
    }

    /// Returns every step so far.
    pub fn records(&self) -> &[StepRecord] {
        &self.records
    }

    /// Returns every evaluation with the step after which it took place.
    pub fn evaluations(&self) -> &[(usize, Evaluation)] {
        &self.evaluations
    }
}

fn by_metric(metric: &str) -> Score<'_> {
    Box::new(move |predictions| {
        let score = predictions.evaluate_own_data()?.mean.score(metric);
        let reason = || format!("there is no {metric:?} of these predictions");
        score.ok_or_else(|| Error::config("metric", reason()))
    })
}

impl fmt::Debug for Evaluator<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, records, evaluations, .. } = self;
        let (rows, records) = (rows.len(), records.len());
        f.debug_struct("Evaluator")
            .field("rows", &rows)
            .field("records", &records)
            .field("evaluations", evaluations)
            .finish()
    }
}

impl Observer for Evaluator<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.records.push(record.clone());
        Ok(())
    }

    fn evaluate(&mut self, step: usize) -> Result<Option<f64>> {
        let predictions = Predictions::new(self.classifier, self.rows, &self.batches, 0)?;
        self.evaluations.push((step, predictions.evaluate_own_data()?));
        (self.score)(&predictions).map(Some)
    }
}
