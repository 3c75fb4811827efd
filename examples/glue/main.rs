//! Fine-tunes an encoder or a decoder on a GLUE or SuperGLUE task.
//!
//! `cargo run --release --example glue`: the bundled model on the bundled SST-2 excerpt, with LoRA and then
//! MonteCLoRA, in one table.
//!
//! `cargo run --release --example glue -- --model DIR_OR_HUB_ID --task mrpc --data DIR
//! --method monteclora --targets query,key,value --rank 8 --alpha 16 --epochs 3 --batch-size 32
//! --lr 3e-4 --max-length 128 --seed 1 --posterior-samples 10 --output OUT`: any model, any task.
//!
//! `cargo run --release --example glue -- --train MINE.csv --method lora --output OUT`: your own rows, with a
//! text and a label column; then `--predict MORE.csv --adapter OUT` predicts the labels of others.

#![deny(clippy::print_stdout, clippy::print_stderr)] // use `tell!`: a closed pipe must not panic

mod common;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use common::given::Given;
use common::log::{draw_curves, Log};
use common::options::{check_apart, MethodOptions};
use common::output::{tell, tell_err};
use common::predict::Request;
use common::processes::{self, Processes};
use common::rows::{tell_cut, Goal, Input, TableOptions};
use common::training::TrainOptions;
use common::watch::{self, say, Scores, Watch};
use common::{interrupt, Outcome};
use indicatif::ProgressBar;
use monteclora::data::batch::{Batch, Batcher};
use monteclora::data::encode::{Encoded, TextEncoder};
use monteclora::data::task::{Splits, Task};
use monteclora::models::sequence::SequenceConfig;
use monteclora::models::Quantization;
use monteclora::train::{
    self, Classification, Classifier, Evaluation, Method, Predictions, RunFolder, Summary,
};
use monteclora::util::files;
use monteclora::Noise;
use serde_json::{json, Value};

/// Fine-tunes an encoder or a decoder on a GLUE or SuperGLUE task. Without arguments: LoRA and then
/// MonteCLoRA with the bundled model on the bundled rows, in one table.
#[derive(Parser, Clone)]
#[command(name = "glue", version, next_help_heading = "Model and data", after_help = EXAMPLES)]
struct Args {
    /// A model folder or a hub repository. Default: the bundled model.
    #[arg(long)]
    model: Option<String>,
    /// The branch, tag or commit of the repository of --model.
    #[arg(long, requires = "model")]
    revision: Option<String>,
    /// The task: mrpc, cola, rte, wic, boolq, sst2, qnli, qqp, mnli or stsb.
    #[arg(long, default_value = "sst2")]
    task: String,
    /// A folder in the GLUE or SuperGLUE download layout. Default: the task's files on the hub.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Use a newly initialised head, even if the model has a trained one.
    #[arg(long)]
    new_head: bool,
    #[command(flatten)]
    tables: TableOptions,
    /// Predict the rows of this table instead of training, with the --adapter (a folder of an adapter, a
    /// model or a run) or a --model with a head, and write CSV to --output or standard output. For a folder:
    /// the test sets of --task, in the format of the benchmark's server.
    #[arg(long, value_name = "FILE|DIR", conflicts_with = "train")]
    predict: Option<PathBuf>,
    #[command(flatten)]
    method: MethodOptions,
    #[command(flatten)]
    train: TrainOptions,
    /// Rows per micro-batch.
    #[arg(long, default_value_t = 32, help_heading = "Training")]
    batch_size: usize,
    /// Rows per batch of an evaluation or prediction. Default: 64; of a decoder 16, or --batch-size if that is
    /// less.
    #[arg(long, help_heading = "Evaluation and output")]
    eval_batch_size: Option<usize>,
    /// The maximum number of tokens in a row, special ones included; a pair is cut at its longer text first.
    /// Default: 128; with --predict that of the run, or else the model's.
    #[arg(long, help_heading = "Model and data")]
    max_length: Option<usize>,
    /// Posterior draws to average besides the mean (monteclora and blob). Default: 10 in the table, else 0.
    #[arg(long, help_heading = "Evaluation and output")]
    posterior_samples: Option<usize>,
    /// The device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu", help_heading = "Model and data")]
    device: String,
    /// The dtype of the frozen base: f32, bf16 or f16.
    #[arg(long, default_value = "f32", help_heading = "Model and data")]
    dtype: String,
    /// Quantise the frozen base: q8_0, q6k, q5k, q4k, q3k, q2k, q5_1, q5_0, q4_1 or q4_0.
    #[arg(long, help_heading = "Model and data")]
    quantize: Option<Quantization>,
    /// The folder for metrics.json, predictions.jsonl, log.jsonl and adapter/ (with full, model/). With
    /// several methods, each has a subfolder.
    #[arg(long, help_heading = "Evaluation and output")]
    output: Option<PathBuf>,
}

impl Args {
    /// Warns about given options that a prediction does not read.
    fn tell_unread_by_predict(&self, given: &Given) {
        let all = Self::command();
        let read =
            "model revision task adapter predict text_column text_pair_column label_column max_length \
                    eval_batch_size positive_class posterior_samples device dtype quantize output";
        let read: Vec<&str> = read.split_whitespace().collect();
        let options = all.get_arguments().map(|option| option.get_id().as_str());
        let unread: Vec<&str> = options.filter(|option| !read.contains(option)).collect();
        given.without_effect(&unread, "with --predict nothing is trained");
    }
}

const EXAMPLES: &str = "\
Examples:
  glue --task mrpc --model FacebookAI/roberta-base --method monteclora --posterior-samples 10 --output OUT
  glue --task sst2 --model DIR --data DIR --method lora --rank 16 --alpha 32 --lr 1e-4 --output OUT
  glue --task sst2 --model DIR --data DIR --method lora --output OUT --resume

Everything else is in docs/GUIDE.md.";

fn main() -> ExitCode {
    processes::run(run)
}

fn run(processes: &Processes) -> Outcome {
    common::tune_allocator();
    interrupt::listen()?;
    let (mut args, given) = common::given::parse::<Args>();
    args.method.find_adapter()?;
    let task: Task = args.task.parse()?;
    processes.join(&args.device)?;
    if let Some(rows) = &args.predict {
        args.tell_unread_by_predict(&given);
        if !processes.is_first() {
            return Ok(()); // one process is enough
        }
        return Request {
            rows,
            options: &args.tables,
            task,
            model: args.model.as_deref(),
            revision: args.revision.as_deref(),
            trained: args.method.adapter.as_deref(),
            max_length: args.max_length,
            eval_batch_size: args.eval_batch_size,
            samples: args.posterior_samples.unwrap_or(0),
            dtype: common::dtype(&args.dtype)?,
            quantize: args.quantize,
            device: &processes.device(&args.device)?,
            output: args.output.as_deref(),
        }
        .run();
    }
    let model = match &args.model {
        Some(model) => model.clone(),
        None => common::asset("tiny-roberta")?,
    };
    let (goal, data) = match (&args.tables.train, &args.data, &args.model) {
        (Some(train), ..) => {
            let noise = Noise::new(args.train.seed);
            let (goal, data, counts) = Goal::of_tables(&args.tables, train, args.train.limit_train, noise)?;
            counts.iter().for_each(|line| tell_err!("{line}"));
            (goal, data)
        }
        (None, data, model) => {
            let data = match (data, model) {
                (Some(dir), _) => task.load_folder(dir)?,
                (None, None) if task == Task::Sst2 => task.load_folder(Path::new(&common::asset("sst2")?))?,
                (None, _) => common::download::hub_splits(task)?,
            };
            (Goal::of_task(task, &args.tables)?, data)
        }
    };
    let methods = args.method.names()?;
    args.method.tell_unread(&given, &methods);
    args.train.tell_unread(&given, &methods, args.output.is_some());
    if args.tables.train.is_none() {
        let of_tables = ["dev_share", "text_column", "text_pair_column", "label_column", "problem_type"];
        given.without_effect(&of_tables, "it only applies to your own table (--train)");
    }
    if args.tables.dev.is_some() {
        given.without_effect(&["dev_share"], "--dev gives the rows to evaluate");
    }
    if !args.method.has_posterior(&methods)? {
        given.without_effect(&["posterior_samples"], "the method has no posterior to draw from");
    }
    let mut table = Vec::new();
    for name in &methods {
        let output =
            args.output.as_ref().map(|dir| if methods.len() == 1 { dir.clone() } else { dir.join(name) });
        table.push(tune(&args, &goal, &model, &data, name, output.as_deref(), processes)?);
    }
    print_table(&table, &goal.metric);
    Ok(())
}

/// Runs one method: load, train, evaluate, write. Returns the contents of `metrics.json`.
fn tune(
    args: &Args,
    goal: &Goal,
    model: &str,
    data: &Splits,
    name: &str,
    out: Option<&Path>,
    processes: &Processes,
) -> Outcome<Value> {
    processes.check(0)?;
    let writes = out.filter(|_| processes.is_first());
    // Held until everything is written, not only during training.
    let _lock = writes.map(files::lock).transpose()?;
    common::reset_peak_memory();
    let device = processes.device(&args.device)?;
    let files = common::download::model_files(model, args.revision.as_deref())?.quantized(args.quantize);
    let config = SequenceConfig::from_files(&files, goal.labels.len())?;
    let tokenizer = common::tokenizer(&files, config.vocab_size())?;
    let length = args.method.text_length(args.max_length.unwrap_or(128), config.longest());
    let encoder = TextEncoder::new(tokenizer, length, config.longest())?;
    let rows = encoder.encode(args.train.limit(&data.train))?;
    tell_cut("training", &rows, length);

    let noise = Noise::new(args.train.seed);
    let (start, dtype) = (args.method.start(name, out)?, common::dtype(&args.dtype)?);
    let saves = args.train.writes(&start, out)?;
    if let (Method::Full, Some(out)) = (start.method(), out) {
        check_apart("--model", Path::new(model), &RunFolder::new(out).model())?;
    }
    let load = if args.new_head { Classifier::load_with_new_head } else { Classifier::load };
    let mut classifier = load(&files, goal.labels.clone(), &start, noise, dtype, &device)?;
    if let Some(note) = classifier.note() {
        tell_err!("{model}: {note}");
    }
    classifier.model.set_checkpoint_layers(args.train.checkpoint_layers);
    let positive = args.tables.positive_class.as_deref();
    positive.map_or(Ok(()), |name| classifier.set_positive_class(name))?;
    let metric = goal.metric.as_str();
    if let Some(positive) = classifier.positive_class().filter(|_| metric == "f1") {
        tell_err!("{name}: f1 is measured of the class {positive} (--positive-class)");
    }
    // Of a decoder, whose batches take more memory, no more rows than fit in training.
    let most = if config.is_decoder() { args.batch_size } else { usize::MAX };
    let eval_batch_size = args.eval_batch_size.unwrap_or(classifier.eval_batch_size().min(most));
    classifier.set_eval_batch_size(eval_batch_size)?;
    let mut dev = Vec::new();
    for (split, examples) in &data.dev {
        let rows = encoder.encode(examples)?;
        tell_cut(split, &rows, length);
        let batches = train::batches(&classifier, &rows, eval_batch_size)?;
        dev.push(Split { name: split.clone(), rows, batches });
    }

    let batcher = Batcher::new(args.batch_size, args.train.length_grouped, noise)?;
    let objective = Classification::new(&classifier, &rows, batcher);
    // The bundled model is small and only briefly pre-trained: it needs a higher learning rate.
    let config = args.train.config(
        if args.model.is_none() { 2e-3 } else { 3e-4 },
        &start.method(),
        dtype,
        processes.world(),
    )?;
    let log = writes.map(|dir| Log::create(dir, args.train.tensorboard)).transpose()?;
    let bar = processes.progress(0, name);
    let evaluate = |bar: &ProgressBar, step| evaluate(&classifier, &dev, metric, bar, step, processes);
    // The settings that a prediction reads are written first.
    let save = |dir: &Path| {
        let input = Input { columns: goal.columns.clone(), max_length: length };
        files::write_json(&dir.join(Input::FILE), &input)?;
        classifier.save(model, dir)
    };
    let keep = || writes.map_or(Ok(()), save);
    let is_alone = processes.world() == 1;
    let mut watch = Watch { bar, log, evaluate: &evaluate, keep: &keep, is_alone, at_end: Vec::new() };
    let held_out = dev.iter().flat_map(|split| &split.rows).flat_map(Encoded::numbers);
    let mut checkpoints = out.map(|dir| args.train.checkpoints(dir, model, held_out));
    // Only if given: the default metric follows from settings that are compared already.
    if let (Some(checkpoints), Some(metric)) = (&mut checkpoints, &args.tables.metric) {
        let of_first = classifier.labels.name(0).filter(|_| metric == "f1");
        let of_first = of_first.filter(|class| classifier.positive_class() == Some(*class));
        let metric = of_first.map_or(metric.clone(), |class| format!("{metric} of {class}"));
        checkpoints.settings.insert("metric".to_string(), metric);
    }
    let params = &classifier.params;
    let summary = match args.train.epochs {
        0 => Summary::default(), // evaluation only
        _ => watch::fit(&objective, params, &config, &mut watch, checkpoints.as_ref(), processes)?,
    };
    watch.bar.finish_and_clear();

    let samples = args.posterior_samples.unwrap_or(if args.method.method.is_none() { 10 } else { 0 });
    // Other methods have no posterior to draw from.
    let samples = if start.method().has_posterior() { samples } else { 0 };
    let mut metrics = json!({
        "task": goal.name, "method": name, "seed": args.train.seed, "model": model,
        "trainable_parameters": classifier.params.trainable_count(), "steps": summary.steps,
        "kept_step": summary.kept_step, "seconds": summary.seconds,
        "step_seconds_median": summary.step_seconds_median, "skipped": summary.skipped,
    });
    for (i, split) in dev.iter().enumerate() {
        processes.check(summary.steps)?;
        let communicator = processes.communicator();
        let predictions =
            Predictions::in_turns(&classifier, &split.rows, &split.batches, samples, communicator)?;
        let wide = goal.columns.is_some() || args.tables.metric.is_some();
        let evaluation = serde_json::to_value(measured(&predictions, wide)?)?;
        let suffix = if i == 0 { String::new() } else { format!("_{}", split.name) };
        metrics[format!("mean{suffix}")] = evaluation["mean"].clone();
        metrics[format!("posterior{suffix}")] = evaluation["posterior"].clone();
        if i == 0 && goal.columns.is_some() {
            metrics["labels"] = json!(goal.labels.names());
            metrics["positive_class"] = json!(classifier.positive_class());
            metrics["classes"] = serde_json::to_value(predictions.class_scores()?)?;
        }
        if let Some(dir) = writes {
            predictions.write(&dir.join(format!("predictions{suffix}.jsonl")))?;
        }
    }
    metrics["peak_rss_mb"] = json!(train::peak_rss_bytes().map(|bytes| bytes as f64 / 1e6));
    if let Some(dir) = writes {
        files::write_json(&dir.join("metrics.json"), &metrics)?;
        if saves {
            save(dir)?;
        }
        draw_curves(dir)?;
    }
    Ok(metrics)
}

struct Split {
    name: String,
    rows: Vec<Encoded>,
    batches: Vec<Batch>,
}

/// The metrics of the benchmark or, for own data, of the larger set.
fn measured(predictions: &Predictions, own: bool) -> monteclora::Result<Evaluation> {
    if own {
        predictions.evaluate_own_data()
    } else {
        predictions.evaluate()
    }
}

/// Evaluates and reports all splits; the score is that of the first one.
fn evaluate(
    classifier: &Classifier,
    dev: &[Split],
    metric: &str,
    bar: &ProgressBar,
    step: usize,
    processes: &Processes,
) -> monteclora::Result<Scores> {
    let mut scores = Scores::default();
    for split in dev {
        let communicator = processes.communicator();
        let predictions = Predictions::in_turns(classifier, &split.rows, &split.batches, 0, communicator)?;
        // With the larger set of metrics, since --metric may name any of them.
        let Evaluation { mean, .. } = measured(&predictions, true)?;
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

/// Prints the runs side by side: the mean and, for methods with a posterior, the average of its draws.
fn print_table(runs: &[Value], metric: &str) {
    tell!(
        "{:<24} {:>9} {:>8} {:>8} {:>10} {:>8} {:>9}",
        "method",
        metric,
        "nll",
        "ece",
        "trainable",
        "seconds",
        "peak MB"
    );
    let number = |value: &Value, digits: usize| match value.as_f64() {
        Some(value) => format!("{value:.digits$}"),
        None => "-".to_string(),
    };
    for run in runs {
        for part in ["mean", "posterior"] {
            let metrics = &run[part];
            if metrics.is_null() {
                continue;
            }
            tell!(
                "{:<24} {:>9} {:>8} {:>8} {:>10} {:>8} {:>9}",
                format!("{} ({part})", run["method"].as_str().unwrap_or_default()),
                number(&metrics[metric], 4),
                number(&metrics["nll"], 4),
                number(&metrics["ece"], 4),
                run["trainable_parameters"],
                number(&run["seconds"], 1),
                number(&run["peak_rss_mb"], 0),
            );
        }
    }
}
