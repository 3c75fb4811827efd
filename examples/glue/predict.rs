//! Predictions of a trained classifier, for a table or for a task's test sets.

use std::path::Path;

use candle_core::{DType, Device};
use monteclora::bayes::TrainedClassifier;
use monteclora::data::table::{self, Columns, Target};
use monteclora::data::task::{Example, Task};
use monteclora::models::hub::ModelFiles;
use monteclora::models::Quantization;
use monteclora::predict::{Prediction, Submission};
use monteclora::train::{Classifier, RunFolder};
use monteclora::util::files;
use monteclora::Labels;

use super::rows::{tell_cut, Input, TableOptions};
use crate::common::output::tell_err;
use crate::common::{download, output, Outcome};

/// A prediction to make.
pub struct Request<'a> {
    /// A table, or a folder in the download layout of `task`, whose test sets are predicted.
    pub rows: &'a Path,
    pub options: &'a TableOptions,
    pub task: Task,
    /// The base model; without `trained`, a model with a head.
    pub model: Option<&'a str>,
    /// The revision of its repository.
    pub revision: Option<&'a str>,
    /// The folder of an adapter, a model or a run.
    pub trained: Option<&'a Path>,
    pub max_length: Option<usize>,
    pub eval_batch_size: Option<usize>,
    /// The number of posterior draws to average; 0 for the mean, or the linearised model.
    pub samples: usize,
    /// Predict with the run's posterior of the linearised model.
    pub linearised: bool,
    pub dtype: DType,
    /// The quantisation of the base that the adapter was trained on, if any.
    pub quantize: Option<Quantization>,
    pub device: &'a Device,
    /// The output folder; without it, the predictions of a table go to standard output.
    pub output: Option<&'a Path>,
}

impl Request<'_> {
    /// Opens the classifier, predicts the rows and writes the predictions.
    pub fn run(&self) -> Outcome {
        let base = download::given_base(self.model, self.revision, self.quantize)?;
        let mut opened = self.open(base.as_ref())?;
        let classifier = opened.classifier_mut();
        let input =
            self.trained.map(RunFolder::find_input::<Input>).transpose()?.flatten().map(|(_, input)| input);
        let of_run = input.as_ref().map(|input| input.max_length.min(classifier.config().longest()));
        classifier.set_max_length(self.max_length.or(of_run).unwrap_or(classifier.max_length()))?;
        self.eval_batch_size.map_or(Ok(()), |rows| classifier.set_eval_batch_size(rows))?;
        let positive = self.options.positive_class.as_deref();
        positive.map_or(Ok(()), |name| classifier.set_positive_class(name))?;
        if self.rows.is_dir() {
            return self.submit(opened);
        }
        let classifier = opened.classifier();
        let columns = self.columns(input.and_then(|input| input.columns));
        let table = table::read(self.rows, &columns)?;
        let target = match classifier.is_regression() {
            true => Target::Score,
            false => Target::Classes(classifier.labels.clone()),
        };
        let examples = target.examples(&table)?;
        let predictions = self.predict(&opened, &examples)?;
        match self.output {
            Some(dir) => {
                std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
                let stem = self.rows.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                let path = dir.join(format!("{stem}.predicted.csv"));
                Prediction::write_csv(&predictions, &classifier.labels, &path)?;
                tell_err!("{}: {} rows", path.display(), predictions.len());
            }
            None => output::result(Prediction::csv(&predictions, &classifier.labels)?.trim_end())?,
        }
        if columns.label.is_some() {
            let metrics = opened.evaluate(&examples, self.samples)?;
            tell_err!("measured: {}", serde_json::to_string(&metrics)?);
        }
        Ok(())
    }

    fn open(&self, base: Option<&ModelFiles>) -> Outcome<TrainedClassifier> {
        let (dtype, device) = (self.dtype, self.device);
        Ok(match (self.trained, base) {
            (Some(dir), base) => TrainedClassifier::open(dir, base, self.linearised, dtype, device)?,
            (None, _) if self.linearised => return Err("--linearised: give the --adapter of a run".into()),
            (None, Some(files)) => TrainedClassifier::Plain(Classifier::of_checkpoint(files, dtype, device)?),
            (None, None) => {
                return Err("--predict: give the trained --adapter, or a --model with a head".into())
            }
        })
    }

    /// The given column names, else those of the run; labels only if they are given.
    fn columns(&self, of_run: Option<Columns>) -> Columns {
        let given = self.options;
        let of_run = of_run.unwrap_or_default();
        Columns {
            text: given.text_column.clone().unwrap_or(of_run.text),
            text_pair: given.text_pair_column.clone().or(of_run.text_pair),
            label: given.label_column.clone(),
        }
    }

    fn predict(&self, opened: &TrainedClassifier, examples: &[Example]) -> Outcome<Vec<Prediction>> {
        let classifier = opened.classifier();
        tell_cut("predicted", &classifier.encode(examples)?, classifier.max_length());
        Ok(opened.predict(examples, self.samples)?)
    }

    /// Writes the files that the benchmark's server accepts.
    fn submit(&self, mut opened: TrainedClassifier) -> Outcome {
        let classifier = opened.classifier_mut();
        // A classifier without class names uses the order of the task.
        let labels = Labels::from(self.task);
        if classifier.labels.are_numbers() && classifier.labels.len() == labels.len() {
            classifier.labels = labels;
        }
        let dir = self.output.ok_or("--predict: a submission is files: give --output")?;
        std::fs::create_dir_all(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        for (set, examples) in self.task.load_tests(self.rows)? {
            let Submission { name, text } =
                Submission::new(self.task, &set, &self.predict(&opened, &examples)?)?;
            files::write(&dir.join(&name), text.as_bytes())?;
            tell_err!("{}: {} rows", dir.join(&name).display(), examples.len());
        }
        Ok(())
    }
}
