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

#[path = "../common/mod.rs"]
mod common;
mod predict;
mod rows;
mod run;
mod temperature;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use common::given::Given;
use common::options::{output_of, Base, MethodOptions};
use common::output::{tell, tell_err};
use common::processes::{self, Processes};
use common::training::TrainOptions;
use common::{interrupt, Outcome};
use monteclora::data::task::{Splits, Task};
use monteclora::models::Quantization;
use monteclora::train::{Method, MethodInit, MethodName, RunFolder};
use monteclora::Noise;
use predict::Request;
use rows::{Goal, Input, TableOptions, TEST};
use run::{Run, PARTS};
use serde_json::Value;

/// Fine-tunes an encoder or a decoder on a GLUE or SuperGLUE task. Without arguments: LoRA and then
/// MonteCLoRA with the bundled model on the bundled rows, in one table.
#[derive(Parser, Clone)]
#[command(name = "glue", version, next_help_heading = "Model and data", after_help = EXAMPLES)]
struct Args {
    /// A model folder or a hub repository. Default: the base that --adapter names, or the bundled model.
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
    /// Use a newly initialised head, even if the model or the adapter has a trained one.
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
    /// Measure on this many rows of each development set, drawn at random, stratified by label.
    #[arg(long, help_heading = "Evaluation and output")]
    limit_dev: Option<usize>,
    /// Rows per batch of an evaluation or prediction. Default: 64; of a decoder 16, or --batch-size if that is
    /// less.
    #[arg(long, help_heading = "Evaluation and output")]
    eval_batch_size: Option<usize>,
    /// The maximum number of tokens in a row, special ones included; a pair is cut at its longer text first.
    /// Default: 128; with --adapter that of its run; with --predict else the model's.
    #[arg(long, help_heading = "Model and data")]
    max_length: Option<usize>,
    /// Posterior draws to average besides the mean (monteclora and blob). Default: 10 in the table, else 0.
    #[arg(long, help_heading = "Evaluation and output")]
    posterior_samples: Option<usize>,
    /// Predict also without draws, in the model linearised in A under the posterior of the greatest evidence on
    /// the training rows (lora, map and monteclora, of classes); with --predict, under that of the run alone.
    #[arg(long, help_heading = "Evaluation and output")]
    linearised: bool,
    /// Hold out this share of the training rows, fit a temperature on them when training ends, and divide the head
    /// by it, so that its probabilities are calibrated (classes; 0.15 in the studies).
    #[arg(long, value_name = "SHARE", help_heading = "Training")]
    temperature_share: Option<f64>,
    /// The device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu", help_heading = "Model and data")]
    device: String,
    /// The dtype of the frozen base: f32, bf16 or f16.
    #[arg(long, default_value = "f32", help_heading = "Model and data")]
    dtype: String,
    /// Quantise the frozen base: bf16, f16, q8_0, q6k, q5k, q4k, q3k, q2k, q5_1, q5_0, q4_1 or q4_0.
    #[arg(long, help_heading = "Model and data")]
    quantize: Option<Quantization>,
    /// Also write the whole model with the adapter merged in, to `OUT/model`.
    #[arg(long, requires = "output", help_heading = "Evaluation and output")]
    merged: bool,
    /// The folder for metrics.json, predictions.jsonl, log.jsonl and adapter/ (with full, model/). With
    /// several methods, each has a subfolder.
    #[arg(long, help_heading = "Evaluation and output")]
    output: Option<PathBuf>,
}

/// The options that a prediction reads.
const READ_BY_PREDICT: &str =
    "model revision task adapter predict text_column text_pair_column label_column \
    max_length eval_batch_size positive_class posterior_samples linearised device dtype quantize output";

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
        given.reads_only::<Args>(READ_BY_PREDICT, "with --predict nothing is trained");
        if args.linearised {
            given.without_effect(&["posterior_samples"], "the linearised model predicts without draws");
        }
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
            samples: if args.linearised { 0 } else { args.posterior_samples.unwrap_or(0) },
            linearised: args.linearised,
            dtype: common::dtype(&args.dtype)?,
            quantize: args.quantize,
            device: &processes.device(&args.device)?,
            output: args.output.as_deref(),
        }
        .run();
    }
    if let (None, Some(dir)) = (args.max_length, &args.method.adapter) {
        args.max_length = RunFolder::find_input::<Input>(dir)?.map(|(_, input)| input.max_length);
    }
    let base = args.method.base(args.model.as_deref(), args.revision.as_deref(), "tiny-roberta")?;
    let (goal, data) = load_data(&args, task, &base)?;
    let methods = args.method.names()?;
    tell_unread(&args, &given, &methods, &goal)?;
    let mut table = Vec::new();
    for &name in &methods {
        let output = output_of(args.output.as_deref(), name, &methods);
        let out = output.as_deref();
        let run = Run {
            args: &args,
            goal: &goal,
            base: &base,
            name,
            start: start(&args, name, out)?,
            dtype: common::dtype(&args.dtype)?,
            out,
            writes: out.filter(|_| processes.is_first()),
            processes,
        };
        table.push(run.execute(&data)?);
    }
    print_table(&table, &goal.metric);
    Ok(())
}

/// What a method starts from: with --new-head, an adapter without its head.
fn start(args: &Args, name: MethodName, out: Option<&Path>) -> Outcome<MethodInit> {
    let mut start = args.method.start(name, out)?;
    if let (true, MethodInit::Adapter(file) | MethodInit::PostHoc(file, _)) = (args.new_head, &mut start) {
        **file = file.as_ref().clone().without_head();
    }
    Ok(start)
}

/// Loads the rows: the user's own, or those of a task.
fn load_data(args: &Args, task: Task, base: &Base) -> Outcome<(Goal, Splits)> {
    if let Some(train) = &args.tables.train {
        let noise = Noise::new(args.train.seed);
        let (goal, data, counts) = Goal::of_tables(&args.tables, train, args.train.limit_train, noise)?;
        counts.iter().for_each(|line| tell_err!("{line}"));
        return Ok((goal, data));
    }
    let data = common::download::task_rows(task, args.data.as_deref(), base.is_bundled)?;
    Ok((Goal::of_task(task, &args.tables)?, data))
}

/// Warns about given options that a training of these methods does not read.
fn tell_unread(args: &Args, given: &Given, methods: &[MethodName], goal: &Goal) -> Outcome {
    args.method.tell_unread(given, methods);
    args.train.tell_unread(given, methods, args.output.is_some());
    if args.tables.train.is_none() {
        let of_tables = ["dev_share", "text_column", "text_pair_column", "label_column", "problem_type"];
        given.without_effect(&of_tables, "it only applies to your own table (--train)");
    }
    if args.tables.dev.is_some() {
        given.without_effect(&["dev_share"], "--dev gives the rows to evaluate");
    }
    if !args.method.any(methods, Method::has_posterior)? {
        given.without_effect(&["posterior_samples"], "the method has no posterior to draw from");
    }
    if goal.labels.len() < 2 || args.train.epochs == 0 {
        given.without_effect(&["temperature_share"], "it only applies to a training of classes");
    }
    if !args.method.any(methods, Method::can_be_linearised)? || goal.labels.len() < 2 {
        given.without_effect(&["linearised"], "it only applies to lora, map and monteclora, of classes");
    }
    Ok(())
}

/// Prints the runs side by side, with a line for each of their predictions.
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
        let of_test = PARTS.map(|part| (format!("{part}_{TEST}"), format!("{part}, {TEST}")));
        let parts = PARTS.map(|part| (part.to_string(), part.to_string())).into_iter().chain(of_test);
        for (key, part) in parts {
            let metrics = &run[&key];
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
