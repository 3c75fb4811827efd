//! One method's run: load, train, save, measure.

use std::path::{Path, PathBuf};

use candle_core::DType;
use indicatif::ProgressBar;
use monteclora::bayes::{LinearisedClassifier, Temperature};
use monteclora::data::batch::{Batch, Batcher};
use monteclora::data::encode::{Encoded, TextEncoder};
use monteclora::data::split::{measured, strata};
use monteclora::data::task::Splits;
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::check_merged;
use monteclora::models::sequence::SequenceConfig;
use monteclora::train::{
    self, Classification, Classifier, Evaluation, Method, MethodInit, MethodName, Predictions, RunFolder,
    Summary,
};
use monteclora::util::files;
use monteclora::Noise;
use serde_json::{json, Value};

use super::rows::{tell_cut, Goal, Input, TEST};
use super::{temperature, Args};
use crate::common::log::{draw_curves, Log};
use crate::common::options::{check_apart, stays, Base};
use crate::common::output::tell_err;
use crate::common::processes::Processes;
use crate::common::watch::{self, say, Scores, Watch};
use crate::common::{self, Outcome};

/// The predictions that are measured: at the mean, averaged over draws, and of the linearised model.
pub const PARTS: [&str; 3] = ["mean", "posterior", "linearised"];

/// The run of one method.
pub struct Run<'a> {
    pub args: &'a Args,
    pub goal: &'a Goal,
    pub base: &'a Base,
    pub name: MethodName,
    pub start: MethodInit,
    pub dtype: DType,
    /// The folder of the run.
    pub out: Option<&'a Path>,
    /// The same in the process that writes.
    pub writes: Option<&'a Path>,
    pub processes: &'a Processes,
}

/// The tokenised rows of a run.
struct Rows {
    train: Vec<Encoded>,
    /// The rows that a temperature is fitted on.
    held_out: Vec<Encoded>,
    dev: Vec<Split>,
    /// The maximum number of tokens.
    length: usize,
}

/// Rows to evaluate.
struct Split {
    name: String,
    rows: Vec<Encoded>,
    batches: Vec<Batch>,
}

impl Run<'_> {
    /// Loads, trains, saves and measures. Returns the contents of `metrics.json`.
    pub fn execute(&self, data: &Splits) -> Outcome<Value> {
        self.processes.check(0)?;
        // Held until everything is written, not only during training.
        let _lock = self.writes.map(files::lock).transpose()?;
        common::reset_peak_memory();
        let model_files = common::download::model_files(&self.base.model, self.base.revision.as_deref())?;
        let model_files = model_files.quantized(self.args.quantize);
        let config = SequenceConfig::from_files(&model_files, self.goal.labels.len())?;
        let mut rows = self.encode(data, &model_files, &config)?;
        let saves = self.args.train.writes(&self.start, self.out)?;
        if let (Method::Full, Some(out)) = (self.start.method(), self.out) {
            check_apart("--model", Path::new(&self.base.model), &RunFolder::new(out).model())?;
        }
        let classifier = self.load(&model_files, &config)?;
        if self.args.merged && !saves && self.out.is_some() {
            return Err("--merged: nothing is trained that could be written: give an --adapter".into());
        }
        let merged = self.writes.filter(|_| self.args.merged && self.start.method() != Method::Full);
        let merged = merged.map(|dir| RunFolder::new(dir).model());
        let is_there = |dir: &Path| self.args.train.resume && files::has_entries(dir);
        if let Some(dir) = merged.as_deref().filter(|dir| !is_there(dir)) {
            check_merged(classifier.model.as_ref(), &classifier.params, &model_files, dir)?;
        }
        for split in &mut rows.dev {
            split.batches = train::batches(&classifier, &split.rows, classifier.eval_batch_size())?;
        }
        let summary = match self.args.train.epochs {
            0 => Summary::default(), // evaluation only
            _ => self.train(&classifier, &rows, merged.iter().cloned().collect())?,
        };
        let temperature =
            (!rows.held_out.is_empty()).then(|| temperature::fit(&classifier, &rows.held_out)).transpose()?;
        if let Some(dir) = self.writes.filter(|_| saves) {
            self.save(&classifier, rows.length, dir)?;
        }
        if let Some(dir) = merged.as_deref().filter(|dir| !stays(dir, is_there(dir))) {
            classifier.save_merged(dir)?;
        }
        self.measure(classifier, &rows, &summary, temperature, saves)
    }

    fn encode(&self, data: &Splits, files: &ModelFiles, config: &SequenceConfig) -> Outcome<Rows> {
        let tokenizer = common::tokenizer(files, config.vocab_size())?;
        let length = self.args.method.text_length(self.args.max_length.unwrap_or(128), config.longest());
        let encoder = TextEncoder::new(tokenizer, length, config.longest())?;
        let train = encoder.encode(self.args.train.limit(&data.train))?;
        tell_cut("training", &train, length);
        let tempers = self.goal.labels.len() > 1 && self.args.train.epochs > 0;
        let share = self.args.temperature_share.filter(|_| tempers).unwrap_or(0.0);
        let (train, held_out) = temperature::split(train, share, Noise::new(self.args.train.seed))?;
        let mut dev = Vec::new();
        for (name, examples) in &data.dev {
            let limit = self.args.limit_dev.filter(|_| name != TEST);
            let rows = measured(encoder.encode(examples)?, limit, strata);
            tell_cut(name, &rows, length);
            dev.push(Split { name: name.clone(), rows, batches: Vec::new() });
        }
        Ok(Rows { train, held_out, dev, length })
    }

    fn load(&self, files: &ModelFiles, config: &SequenceConfig) -> Outcome<Classifier> {
        let Self { args, goal, name, .. } = self;
        let load = if args.new_head { Classifier::load_with_new_head } else { Classifier::load };
        let (noise, device) = (Noise::new(args.train.seed), self.processes.device(&args.device)?);
        let mut classifier = load(files, goal.labels.clone(), &self.start, noise, self.dtype, &device)?;
        if let Some(note) = classifier.note() {
            tell_err!("{}: {note}", self.base.model);
        }
        classifier.model.set_checkpoint_layers(args.train.checkpoint_layers);
        let positive = args.tables.positive_class.as_deref();
        positive.map_or(Ok(()), |name| classifier.set_positive_class(name))?;
        if let Some(positive) = classifier.positive_class().filter(|_| goal.metric == "f1") {
            tell_err!("{name}: f1 is measured of the class {positive} (--positive-class)");
        }
        // Of a decoder, whose batches take more memory, no more rows than fit in training.
        let most = if config.is_decoder() { args.batch_size } else { usize::MAX };
        let eval_batch_size = args.eval_batch_size.unwrap_or(classifier.eval_batch_size().min(most));
        classifier.set_eval_batch_size(eval_batch_size)?;
        Ok(classifier)
    }

    /// Trains; `at_end` is written afterwards.
    fn train(&self, classifier: &Classifier, rows: &Rows, at_end: Vec<PathBuf>) -> Outcome<Summary> {
        let Self { args, goal, processes, .. } = self;
        let batcher = Batcher::new(args.batch_size, args.train.length_grouped, Noise::new(args.train.seed))?;
        let objective = Classification::new(classifier, &rows.train, batcher);
        let lr = if self.base.is_bundled { 2e-3 } else { 3e-4 };
        let config = args.train.config(lr, &self.start.method(), self.dtype, processes.world())?;
        let log = self.writes.map(|dir| Log::create(dir, args.train.tensorboard)).transpose()?;
        let bar = processes.progress(0, self.name.as_str());
        let evaluate =
            |bar: &ProgressBar, step| evaluate(classifier, &rows.dev, &goal.metric, bar, step, processes);
        let keep = || self.writes.map_or(Ok(()), |dir| self.save(classifier, rows.length, dir));
        let is_alone = processes.world() == 1;
        let mut watch = Watch { bar, log, evaluate: &evaluate, keep: &keep, is_alone, at_end };
        let held_out = choosing(&rows.dev).flat_map(|split| &split.rows).flat_map(Encoded::numbers);
        let mut checkpoints = self.out.map(|dir| args.train.checkpoints(dir, &self.base.model, held_out));
        // Only if given: the default metric follows from settings that are compared already.
        if let (Some(checkpoints), Some(metric)) = (&mut checkpoints, &args.tables.metric) {
            let of_first = classifier.labels.name(0).filter(|_| metric == "f1");
            let of_first = of_first.filter(|class| classifier.positive_class() == Some(*class));
            let metric = of_first.map_or(metric.clone(), |class| format!("{metric} of {class}"));
            checkpoints.settings.insert("metric".to_string(), metric);
        }
        let params = &classifier.params;
        let summary = watch::fit(&objective, params, &config, &mut watch, checkpoints.as_ref(), processes)?;
        watch.bar.finish_and_clear();
        Ok(summary)
    }

    /// Writes what was trained, after the settings that a prediction reads.
    fn save(&self, classifier: &Classifier, max_length: usize, dir: &Path) -> monteclora::Result<()> {
        let input = Input { columns: self.goal.columns.clone(), max_length };
        RunFolder::new(dir).save_input(&input)?;
        classifier.save(&self.base.model, dir)
    }

    /// Measures the rows of all splits.
    fn measure(
        &self,
        classifier: Classifier,
        rows: &Rows,
        summary: &Summary,
        temperature: Option<Temperature>,
        saves: bool,
    ) -> Outcome<Value> {
        let Self { args, goal, .. } = self;
        let samples = args.posterior_samples.unwrap_or(if args.method.method.is_none() { 10 } else { 0 });
        // Other methods have no posterior to draw from.
        let samples = if self.start.method().has_posterior() { samples } else { 0 };
        let mut measured = Vec::new();
        for split in &rows.dev {
            self.processes.check(summary.steps)?;
            let communicator = self.processes.communicator();
            let Split { rows, batches, .. } = split;
            measured.push(Predictions::in_turns(&classifier, rows, batches, samples, communicator)?);
        }
        let mut metrics = json!({
            "task": goal.name, "method": self.name.as_str(), "seed": args.train.seed, "model": self.base.model,
            "trainable_parameters": classifier.params.trainable_count(), "steps": summary.steps,
            "kept_step": summary.kept_step, "seconds": summary.seconds,
            "step_seconds_median": summary.step_seconds_median, "skipped": summary.skipped,
        });
        if let Some(temperature) = temperature {
            metrics["temperature"] = json!(temperature.value());
        }
        if let Some(first) = measured.first().filter(|_| goal.columns.is_some()) {
            metrics["labels"] = json!(goal.labels.names());
            metrics["positive_class"] = json!(classifier.positive_class());
            metrics["classes"] = serde_json::to_value(first.class_scores()?)?;
        }
        let written = self.write(&metrics, rows, &measured)?;
        self.writes.map_or(Ok(()), draw_curves)?;
        let linearises = args.linearised && self.start.method().can_be_linearised() && goal.labels.len() > 1;
        if !linearises || !self.processes.is_first() {
            return Ok(written);
        }
        // After the files of the rest, which a refit that fails does not cost.
        let linearised = LinearisedClassifier::refitted(classifier, &rows.train)?;
        for (split, predictions) in rows.dev.iter().zip(&mut measured) {
            predictions.linearised = Some(linearised.probabilities(&split.batches)?);
        }
        if let Some(dir) = self.writes.filter(|_| saves) {
            linearised.save(&self.base.model, dir)?;
        }
        self.write(&metrics, rows, &measured)
    }

    /// Writes the metrics, to which it adds those of all splits, and the predictions.
    fn write(&self, metrics: &Value, rows: &Rows, measured: &[Predictions]) -> Outcome<Value> {
        let mut metrics = metrics.clone();
        for (i, (split, predictions)) in rows.dev.iter().zip(measured).enumerate() {
            let wide = self.goal.columns.is_some() || self.args.tables.metric.is_some();
            let suffix = if i == 0 { String::new() } else { format!("_{}", split.name) };
            let evaluation = serde_json::to_value(measured_as(predictions, wide)?)?;
            for part in PARTS {
                if !evaluation[part].is_null() {
                    metrics[format!("{part}{suffix}")] = evaluation[part].clone();
                }
            }
            if let Some(dir) = self.writes {
                predictions.write(&dir.join(format!("predictions{suffix}.jsonl")))?;
            }
        }
        metrics["peak_rss_mb"] = json!(train::peak_rss_bytes().map(|bytes| bytes as f64 / 1e6));
        if let Some(dir) = self.writes {
            files::write_json(&dir.join("metrics.json"), &metrics)?;
        }
        Ok(metrics)
    }
}

/// The metrics of the benchmark or, for own data, of the larger set.
fn measured_as(predictions: &Predictions, own: bool) -> monteclora::Result<Evaluation> {
    if own {
        predictions.evaluate_own_data()
    } else {
        predictions.evaluate()
    }
}

/// The splits by which the best step is chosen: all but the test's.
fn choosing(dev: &[Split]) -> impl Iterator<Item = &Split> {
    dev.iter().filter(|split| split.name != TEST)
}

/// Evaluates and reports all splits but the test's; the score is that of the first one.
fn evaluate(
    classifier: &Classifier,
    dev: &[Split],
    metric: &str,
    bar: &ProgressBar,
    step: usize,
    processes: &Processes,
) -> monteclora::Result<Scores> {
    let mut scores = Scores::default();
    for split in choosing(dev) {
        let communicator = processes.communicator();
        let predictions = Predictions::in_turns(classifier, &split.rows, &split.batches, 0, communicator)?;
        // With the larger set of metrics, since --metric may name any of them.
        let Evaluation { mean, .. } = measured_as(&predictions, true)?;
        let value = mean.get(metric);
        scores.score = scores.score.or(mean.score(metric));
        let named = [(metric, value), ("nll", mean.nll)].map(|(name, value)| Some((name, value?)));
        let named = named.into_iter().flatten();
        scores.values.extend(named.map(|(name, value)| (format!("{}/{name}", split.name), value)));
        let nll = mean.nll.map(|nll| format!(", nll {nll:.4}")).unwrap_or_default();
        let (name, value) = (bar.prefix(), value.unwrap_or(f64::NAN));
        say(bar, &format!("{name} step {step}: {} {metric} {value:.4}{nll}", split.name));
    }
    Ok(scores)
}
