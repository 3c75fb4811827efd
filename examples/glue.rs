//! Fine-tunes RoBERTa or BERT on a GLUE or SuperGLUE task.
//!
//! `cargo run --release --example glue`: the bundled model on the bundled SST-2 excerpt, with LoRA
//! and then MonteCLoRA, in one table.
//!
//! `cargo run --release --example glue -- --model DIR_OR_HUB_ID --task mrpc --data DIR
//! --method monteclora --targets query,key,value --rank 8 --alpha 16 --epochs 3 --batch-size 32
//! --lr 3e-4 --max-length 128 --seed 1 --posterior-samples 10 --output OUT`: any model, any task.

mod common;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Parser;
use common::Outcome;
use indicatif::ProgressBar;
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::{Batch, Batcher};
use monteclora::data::encode::{Encoded, TextEncoder};
use monteclora::data::task::{Splits, Task};
use monteclora::inject::Targets;
use monteclora::models::hub::ModelFiles;
use monteclora::models::roberta::RobertaConfig;
use monteclora::train::{self, Classification, Classifier, Method, Observer, Predictions, Record};
use monteclora::train::{Evaluation, Schedule, TrainConfig};
use monteclora::{Error, MonteCLoRAConfig, Noise};
use serde_json::{json, Value};

#[derive(Parser, Clone)]
struct Args {
    /// A model folder, or a hub repository. Default: the bundled model.
    #[arg(long)]
    model: Option<String>,
    /// mrpc, cola, rte, wic, boolq, sst2, qnli, qqp, mnli or stsb.
    #[arg(long, default_value = "sst2")]
    task: String,
    /// A folder in the GLUE or SuperGLUE download layout. Default: the hub's files of the task.
    #[arg(long)]
    data: Option<PathBuf>,
    /// monteclora, lora or full. Default: lora, then monteclora.
    #[arg(long)]
    method: Option<String>,
    /// Layers to adapt: names separated by commas, `all-linear` or `default`.
    #[arg(long, default_value = "query,key,value")]
    targets: String,
    #[arg(long, default_value_t = 8)]
    rank: usize,
    #[arg(long, default_value_t = 16.0)]
    alpha: f64,
    /// Dropout in the adapters.
    #[arg(long, default_value_t = 0.0)]
    adapter_dropout: f64,
    /// Constants of MonteCLoRA: paper, paper-literal or peft.
    #[arg(long, default_value = "paper")]
    preset: String,
    /// Mixture components N.
    #[arg(long)]
    num_components: Option<usize>,
    /// Scale of the perturbation, epsilon.
    #[arg(long)]
    sample_scaler: Option<f64>,
    /// Weight of the KL terms, eta.
    #[arg(long)]
    kl_weight: Option<f64>,
    #[arg(long, default_value_t = 3)]
    epochs: usize,
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Micro-batches of one step.
    #[arg(long, default_value_t = 1)]
    accumulation: usize,
    #[arg(long)]
    lr: Option<f64>,
    #[arg(long, default_value = "linear")]
    schedule: String,
    #[arg(long, default_value_t = 0.06)]
    warmup_ratio: f64,
    #[arg(long, default_value_t = 0.01)]
    weight_decay: f64,
    /// Largest global gradient norm; 0 for no clipping.
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    #[arg(long, default_value_t = 128)]
    max_length: usize,
    /// Batch rows of similar lengths together.
    #[arg(long)]
    length_grouped: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Train on the first rows only.
    #[arg(long)]
    limit_train: Option<usize>,
    /// Steps between evaluations. Default: one an epoch.
    #[arg(long)]
    eval_every: Option<usize>,
    /// Keep the last parameters rather than those of the best evaluation.
    #[arg(long)]
    keep_last: bool,
    /// Posterior draws to average beside the mean. Default: 10 in the table, else 0.
    #[arg(long)]
    posterior_samples: Option<usize>,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// f32, bf16 or f16: the dtype of the frozen base.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Folder for metrics.json, predictions.jsonl, log.jsonl and adapter/.
    #[arg(long)]
    output: Option<PathBuf>,
}

fn main() -> Outcome {
    common::tune_allocator();
    let args = Args::parse();
    let task: Task = args.task.parse()?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => common::asset("tiny-roberta")?,
    };
    let data = match (&args.data, &args.model) {
        (Some(dir), _) => task.load_folder(dir)?,
        (None, None) if task == Task::Sst2 => task.load_folder(Path::new(&common::asset("sst2")?))?,
        (None, _) => common::hub_splits(task)?,
    };
    let methods = match &args.method {
        Some(method) => vec![method.clone()],
        None => vec!["lora".to_string(), "monteclora".to_string()],
    };
    let mut table = Vec::new();
    for name in &methods {
        let output =
            args.output.as_ref().map(|dir| if methods.len() == 1 { dir.clone() } else { dir.join(name) });
        table.push(run(&args, task, &model, &data, name, output.as_deref())?);
    }
    print_table(&table);
    Ok(())
}

/// One method: load, train, evaluate, write. Returns what `metrics.json` holds.
fn run(
    args: &Args,
    task: Task,
    model: &str,
    data: &Splits,
    name: &str,
    out: Option<&Path>,
) -> Outcome<Value> {
    let device = common::device(&args.device)?;
    let files = ModelFiles::locate(model, None)?;
    let config = RobertaConfig::from_file(files.config_path())?;
    let encoder = TextEncoder::new(common::tokenizer(&files)?, args.max_length, config.max_length())?;
    let limit = args.limit_train.unwrap_or(usize::MAX).min(data.train.len());
    let rows = encoder.encode(&data.train[..limit])?;

    let noise = Noise::new(args.seed);
    let targets = Targets::parse(&args.targets)?;
    let dtype = common::dtype(&args.dtype)?;
    let method = method(args, name)?;
    let classifier = Classifier::load(&files, task.num_labels(), &method, &targets, noise, dtype, &device)?;
    let mut dev = Vec::new();
    for (split, examples) in &data.dev {
        let rows = encoder.encode(examples)?;
        let batches = train::batches(&classifier, &rows, 64)?;
        dev.push(Split { name: split.clone(), rows, batches });
    }

    let batcher = Batcher::new(args.batch_size, args.length_grouped, noise)?;
    let objective = Classification { classifier: &classifier, rows: &rows, batcher };
    let log = match out {
        Some(dir) => {
            std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
            let path = dir.join("log.jsonl");
            Some((BufWriter::new(File::create(&path).map_err(Error::io(&path))?), path))
        }
        None => None,
    };
    let bar = common::progress(0, name);
    let mut watch = Watch { classifier: &classifier, dev: &dev, metric: task.primary_metric(), bar, log };
    let summary = train::fit(&objective, &classifier.params, &train_config(args)?, &mut watch)?;
    watch.bar.finish_and_clear();
    if let Some((log, path)) = &mut watch.log {
        log.flush().map_err(Error::io(&*path))?;
    }

    let samples = args.posterior_samples.unwrap_or(if args.method.is_none() { 10 } else { 0 });
    // Only MonteCLoRA has a posterior to draw from.
    let samples = if name == "monteclora" { samples } else { 0 };
    let mut metrics = json!({
        "task": task.name(), "method": name, "seed": args.seed, "model": model,
        "trainable_parameters": classifier.params.trainable_count(), "steps": summary.steps,
        "kept_step": summary.kept_step, "seconds": summary.seconds,
        "step_seconds_median": summary.step_seconds_median,
    });
    for (i, split) in dev.iter().enumerate() {
        let predictions = Predictions::new(&classifier, &split.rows, &split.batches, samples)?;
        let evaluation = serde_json::to_value(predictions.evaluate()?)?;
        let suffix = if i == 0 { String::new() } else { format!("_{}", split.name) };
        metrics[format!("mean{suffix}")] = evaluation["mean"].clone();
        metrics[format!("posterior{suffix}")] = evaluation["posterior"].clone();
        if let Some(dir) = out {
            predictions.write(&dir.join(format!("predictions{suffix}.jsonl")))?;
        }
    }
    metrics["peak_rss_mb"] = json!(train::peak_rss_bytes().map(|bytes| bytes as f64 / 1e6));
    if let Some(dir) = out {
        let path = dir.join("metrics.json");
        std::fs::write(&path, serde_json::to_string_pretty(&metrics)?).map_err(Error::io(&path))?;
        classifier.save(&method, model, dir)?;
    }
    Ok(metrics)
}

/// The method of this name with the options that belong to it.
fn method(args: &Args, name: &str) -> Outcome<Method> {
    let (rank, alpha, dropout) = (args.rank, args.alpha, args.adapter_dropout);
    match name {
        "full" => Ok(Method::Full),
        "lora" => Ok(Method::Lora(LoraConfig { rank, alpha, dropout, ..LoraConfig::default() })),
        "monteclora" => {
            let preset = match args.preset.as_str() {
                "paper" => MonteCLoRAConfig::paper(),
                "paper-literal" => MonteCLoRAConfig::paper_literal(),
                "peft" => MonteCLoRAConfig::peft(),
                other => {
                    return Err(format!("--preset: expected paper, paper-literal or peft, got {other}").into())
                }
            };
            Ok(Method::MonteCLoRA(MonteCLoRAConfig {
                rank,
                alpha,
                dropout,
                num_components: args.num_components.unwrap_or(preset.num_components),
                sample_scaler: args.sample_scaler.unwrap_or(preset.sample_scaler),
                kl_weight: args.kl_weight.unwrap_or(preset.kl_weight),
                ..preset
            }))
        }
        other => Err(format!("--method: expected monteclora, lora or full, got {other}").into()),
    }
}

fn train_config(args: &Args) -> Outcome<TrainConfig> {
    if args.clip.is_nan() || args.clip < 0.0 {
        return Err(format!("--clip: expected a norm, or 0 for no clipping, got {}", args.clip).into());
    }
    // The bundled model is small and starts from little: it wants a higher rate.
    let default_lr = if args.model.is_none() { 2e-3 } else { 3e-4 };
    Ok(TrainConfig {
        epochs: args.epochs,
        lr: args.lr.unwrap_or(default_lr),
        schedule: args.schedule.parse::<Schedule>()?,
        warmup_ratio: args.warmup_ratio,
        weight_decay: args.weight_decay,
        clip: (args.clip > 0.0).then_some(args.clip),
        accumulation: args.accumulation,
        eval_every: args.eval_every,
        keep_best: !args.keep_last,
    })
}

struct Split {
    name: String,
    rows: Vec<Encoded>,
    batches: Vec<Batch>,
}

/// Progress bar, log and evaluation of a run.
struct Watch<'a> {
    classifier: &'a Classifier,
    dev: &'a [Split],
    metric: &'static str,
    bar: ProgressBar,
    log: Option<(BufWriter<File>, PathBuf)>,
}

impl Observer for Watch<'_> {
    fn start(&mut self, total_steps: usize) {
        self.bar.set_length(total_steps as u64);
    }

    fn step(&mut self, record: &Record) -> monteclora::Result<()> {
        self.bar.inc(1);
        self.bar.set_message(format!("loss {:.3}", record.loss));
        if let Some((log, path)) = &mut self.log {
            let line = serde_json::to_string(record).map_err(std::io::Error::from);
            line.and_then(|line| writeln!(log, "{line}")).map_err(Error::io(&*path))?;
        }
        Ok(())
    }

    fn evaluate(&mut self, step: usize) -> monteclora::Result<Option<f64>> {
        let mut score = None;
        for split in self.dev {
            let predictions = Predictions::new(self.classifier, &split.rows, &split.batches, 0)?;
            let Evaluation { mean, .. } = predictions.evaluate()?;
            let value = mean.get(self.metric);
            score = score.or(value);
            let nll = mean.nll.map(|nll| format!(", nll {nll:.4}")).unwrap_or_default();
            let (name, value) = (self.bar.prefix(), value.unwrap_or(f64::NAN));
            let line = format!("{name} step {step}: {} {} {value:.4}{nll}", split.name, self.metric);
            common::say(&self.bar, &line);
        }
        Ok(score)
    }
}

/// The runs side by side: the mean, and where there is a posterior, its average.
fn print_table(runs: &[Value]) {
    println!(
        "{:<24} {:>9} {:>8} {:>8} {:>10} {:>8} {:>9}",
        "method", "score", "nll", "ece", "trainable", "seconds", "peak MB"
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
            let score =
                ["accuracy", "pearson"].iter().map(|name| &metrics[name]).find(|value| !value.is_null());
            println!(
                "{:<24} {:>9} {:>8} {:>8} {:>10} {:>8} {:>9}",
                format!("{} ({part})", run["method"].as_str().unwrap_or_default()),
                number(score.unwrap_or(&Value::Null), 4),
                number(&metrics["nll"], 4),
                number(&metrics["ece"], 4),
                run["trainable_parameters"],
                number(&run["seconds"], 1),
                number(&run["peak_rss_mb"], 0),
            );
        }
    }
}
