//! Fine-tunes a LLaMA on text, instructions, GSM8K or code, and lets it speak before and after.
//!
//! `cargo run --release --example llama`: the bundled stories260K on a bundled excerpt of GSM8K,
//! with LoRA and then MonteCLoRA on its attention projections, in one table.
//!
//! `cargo run --release --example llama -- --model DIR_OR_HUB_ID --data TRAIN.jsonl
//! --held-out TEST.jsonl --format instruct --method monteclora --rank 32 --alpha 64 --lr 3e-4
//! --sample-scaler 2.5e-5 --dtype bf16 --device cuda --output OUT`: any model, any data. The
//! templates are those of `monteclora::data::instruct`.

mod common;

use std::path::{Path, PathBuf};

use clap::Parser;
use common::options::{Log, MethodOptions, TrainOptions};
use common::Outcome;
use indicatif::ProgressBar;
use monteclora::data::batch::Batcher;
use monteclora::data::causal::{pack, PromptEncoder, Tokens};
use monteclora::data::instruct::{self, Format};
use monteclora::generate::{generate, GenerateConfig, Sampling, Weights};
use monteclora::inject::DEFAULT_ADAPTER;
use monteclora::models::causal::CausalLm;
use monteclora::models::hub::ModelFiles;
use monteclora::models::llama::{LlamaConfig, LlamaForCausalLM};
use monteclora::params::Role;
use monteclora::peft::{AdapterFile, Origin, Profile};
use monteclora::train::{self, held_out_loss, CausalTuning, Observer, Record};
use monteclora::{files, Noise, Params, Pass};
use serde_json::{json, Value};

#[derive(Parser, Clone)]
struct Args {
    /// A model folder, or a hub repository. Default: the bundled stories260K.
    #[arg(long)]
    model: Option<String>,
    /// Training rows: JSON, JSON lines or text. Default: the bundled excerpt of GSM8K.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Rows for the held-out loss, of the same format. Default: every twentieth row of the data.
    #[arg(long)]
    held_out: Option<PathBuf>,
    /// instruct, gsm8k, text or code.
    #[arg(long, default_value = "gsm8k")]
    format: String,
    #[command(flatten)]
    method: MethodOptions,
    #[command(flatten)]
    train: TrainOptions,
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    #[arg(long, default_value_t = 256)]
    max_length: usize,
    /// Learn the prompts as well as the answers.
    #[arg(long)]
    learn_prompt: bool,
    /// Put several rows into one sequence.
    #[arg(long)]
    packing: bool,
    /// What is continued before and after. Default: the first held-out prompt.
    #[arg(long)]
    prompt: Option<String>,
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// 0: greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Posterior draws whose probabilities are averaged for the held-out loss, beside the mean.
    #[arg(long, default_value_t = 4)]
    posterior_samples: usize,
    /// Write A and B alone, for servers, rather than what PEFT trains on with.
    #[arg(long)]
    serving: bool,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// f32, bf16 or f16: the dtype of the frozen base.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Folder for metrics.json, log.jsonl and adapter/.
    #[arg(long)]
    output: Option<PathBuf>,
}

/// The rows of a run.
struct Data {
    train: Vec<Tokens>,
    held_out: Vec<Tokens>,
    prompt: String,
}

fn main() -> Outcome {
    common::tune_allocator();
    let args = Args::parse();
    let model = match &args.model {
        Some(model) => model.clone(),
        None => common::asset("stories260k")?,
    };
    let model_files = ModelFiles::locate(&model, None)?;
    let config = LlamaConfig::from_file(model_files.config_path())?;
    let tokenizer = common::tokenizer(&model_files)?;
    let (length, eos) = (args.max_length, config.eos_token_ids().first().copied());
    let longest = config.decoder.max_position_embeddings;
    let encoder = PromptEncoder::new(tokenizer, length, longest, eos, args.learn_prompt)?;
    let data = data(&args, &encoder)?;
    println!("{} training rows, {} held out", data.train.len(), data.held_out.len());

    let methods = args.method.names();
    let mut table = Vec::new();
    for name in &methods {
        let output =
            args.output.as_ref().map(|dir| if methods.len() == 1 { dir.clone() } else { dir.join(name) });
        table.push(run(&args, &model, &model_files, &config, &encoder, &data, name, output.as_deref())?);
    }
    println!(
        "\n{:<12} {:>10} {:>10} {:>10} {:>10} {:>8}",
        "method", "before", "mean", "posterior", "trainable", "seconds"
    );
    for row in &table {
        let number = |key: &str, digits: usize| match row[key].as_f64() {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_string(),
        };
        let (before, mean, posterior) =
            (number("loss_before", 4), number("loss_mean", 4), number("loss_posterior", 4));
        let (method, trainable) = (row["method"].as_str().unwrap_or_default(), &row["trainable_parameters"]);
        println!(
            "{method:<12} {before:>10} {mean:>10} {posterior:>10} {trainable:>10} {:>8}",
            number("seconds", 1)
        );
    }
    Ok(())
}

/// Reads, encodes and splits the data.
fn data(args: &Args, encoder: &PromptEncoder) -> Outcome<Data> {
    let format: Format = args.format.parse()?;
    let (mut rows, held_out) = match (&args.data, &args.held_out) {
        (Some(path), Some(held_out)) => (instruct::read(path, format)?, instruct::read(held_out, format)?),
        (Some(path), None) => {
            let rows = instruct::read(path, format)?.into_iter().enumerate();
            let (held_out, rows): (Vec<_>, Vec<_>) = rows.partition(|(i, _)| i % 20 == 19);
            let texts = |rows: Vec<(usize, _)>| rows.into_iter().map(|(_, row)| row).collect();
            (texts(rows), texts(held_out))
        }
        (None, _) => {
            let dir = common::asset("gsm8k")?;
            let file = |name| instruct::read(&Path::new(&dir).join(name), format);
            (file("train.jsonl")?, file("test.jsonl")?)
        }
    };
    rows.truncate(args.train.limit(&rows).len());
    let prompt = match (&args.prompt, held_out.first()) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(row)) => row.prompt.clone(),
        (None, None) => return Err("--data: too few rows to hold some out; give --held-out".into()),
    };
    let (train, held_out) = (encoder.encode(&rows)?, encoder.encode(&held_out)?);
    if train.cut + train.dropped > 0 {
        let lost = format!("{} rows lost their end and {} were left out", train.cut, train.dropped);
        println!("--max-length {}: {lost}", args.max_length);
    }
    let train = if args.packing { pack(&train.rows, args.max_length) } else { train.rows };
    Ok(Data { train, held_out: held_out.rows, prompt })
}

/// One method: load, speak, train, evaluate, speak, write. Returns what `metrics.json` holds.
#[allow(clippy::too_many_arguments)]
fn run(
    args: &Args,
    model_name: &str,
    model_files: &ModelFiles,
    config: &LlamaConfig,
    encoder: &PromptEncoder,
    data: &Data,
    name: &str,
    out: Option<&Path>,
) -> Outcome<Value> {
    let device = common::device(&args.device)?;
    let noise = Noise::new(args.train.seed);
    let method = args.method.method(name)?;
    let params = Params::new(noise, &device);
    let checkpoint = model_files.var_builder(common::dtype(&args.dtype)?, &device)?;
    let base = match method.adapter() {
        Some(_) => checkpoint,
        None => params.var_builder(Some(checkpoint), Role::Base),
    };
    let mut model = LlamaForCausalLM::load(base, config, noise)?;
    let (_, regularizer) = method.inject(&mut model, &args.method.targets()?, &params)?;

    let speak = |model: &LlamaForCausalLM| -> Outcome<String> {
        let sampling = match args.temperature {
            0.0 => Sampling::ArgMax,
            temperature => Sampling::All { temperature },
        };
        let config = GenerateConfig {
            max_new_tokens: args.max_new_tokens,
            sampling,
            seed: args.train.seed,
            stop: config.eos_token_ids(),
            weights: Weights::Mean,
        };
        let ids = generate(model, &[encoder.prompt(&data.prompt)?], &config, &mut |_, _| true)?;
        Ok(encoder.tokenizer().decode(&ids[0], true).map_err(|e| e.to_string())?)
    };
    let loss = |passes: &[Pass]| held_out_loss(&model, &data.held_out, 16, passes);
    let before = loss(&[Pass::Mean])?;
    println!("\n{name}, before: {}[{}]", data.prompt, speak(&model)?);

    let batcher = Batcher::new(args.batch_size, args.train.length_grouped, noise)?;
    let objective =
        CausalTuning { model: &model, regularizer, rows: &data.train, batcher, pad_id: config.pad_id() };
    let log = out.map(Log::create).transpose()?;
    let mut watch = Watch { model: &model, held_out: &data.held_out, bar: common::progress(0, name), log };
    // The bundled model is small and learns a foreign text: it wants a higher rate.
    let train_config = args.train.config(if args.model.is_none() { 5e-3 } else { 3e-4 })?;
    let summary = train::fit(&objective, &params, &train_config, &mut watch)?;
    watch.bar.finish_and_clear();
    watch.log.map(Log::finish).transpose()?;

    let draws: Vec<Pass> = match name {
        "monteclora" => (0..args.posterior_samples as u64).map(|draw| Pass::Posterior { draw }).collect(),
        _ => Vec::new(), // only MonteCLoRA has a posterior to draw from
    };
    let posterior = if draws.is_empty() { None } else { Some(loss(&draws)?) };
    println!("{name}, after: {}[{}]", data.prompt, speak(&model)?);
    let metrics = json!({
        "model": model_name, "method": name, "seed": args.train.seed, "steps": summary.steps,
        "kept_step": summary.kept_step, "seconds": summary.seconds,
        "step_seconds_median": summary.step_seconds_median,
        "trainable_parameters": params.trainable_count(), "loss_before": before,
        "loss_mean": loss(&[Pass::Mean])?, "loss_posterior": posterior,
        "peak_rss_mb": train::peak_rss_bytes().map(|bytes| bytes as f64 / 1e6),
    });
    if let Some(dir) = out {
        files::write(&dir.join("metrics.json"), serde_json::to_string_pretty(&metrics)?.as_bytes())?;
        if let Some(adapter) = method.adapter() {
            let (base, task) = (Some(model_name.to_string()), Some("CAUSAL_LM".to_string()));
            let origin = Origin { base_model: base, task, ..Origin::default() };
            let file = AdapterFile::from_model(&model, DEFAULT_ADAPTER, &params, &adapter, &origin)?;
            let profile = if args.serving { Profile::Serving } else { Profile::PeftMonteCLoRA };
            file.write(dir.join("adapter"), profile)?;
        }
    }
    Ok(metrics)
}

/// Progress bar, log and held-out loss of a run.
struct Watch<'a> {
    model: &'a dyn CausalLm,
    held_out: &'a [Tokens],
    bar: ProgressBar,
    log: Option<Log>,
}

impl Observer for Watch<'_> {
    fn start(&mut self, total_steps: usize) {
        self.bar.set_length(total_steps as u64);
    }

    fn step(&mut self, record: &Record) -> monteclora::Result<()> {
        self.bar.inc(1);
        self.bar.set_message(format!("loss {:.3}", record.loss));
        self.log.as_mut().map_or(Ok(()), |log| log.write(record))
    }

    fn evaluate(&mut self, step: usize) -> monteclora::Result<Option<f64>> {
        let loss = held_out_loss(self.model, self.held_out, 16, &[Pass::Mean])?;
        let line = format!("{} step {step}: held-out loss {loss:.4}", self.bar.prefix());
        common::say(&self.bar, &line);
        Ok(Some(-loss))
    }
}
