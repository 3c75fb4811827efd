//! Fine-tunes a LLaMA or another decoder (Qwen, Mistral, SmolLM, Phi, Gemma) on text, instructions,
//! conversations, GSM8K or code, and generates a sample before and after.
//!
//! `cargo run --release --example llama`: the bundled stories260K on a bundled excerpt of GSM8K, with LoRA
//! and then MonteCLoRA on its attention projections, in one table.
//!
//! `cargo run --release --example llama -- --model DIR_OR_HUB_ID --data TRAIN.jsonl
//! --held-out TEST.jsonl --format instruct --method monteclora --rank 32 --alpha 64 --lr 3e-4
//! --sample-scaler 2.5e-5 --dtype bf16 --device cuda --output OUT`: any model, any data. The
//! templates are those of `monteclora::data::instruct`. `--adapter DIR` continues from an adapter of
//! this crate or of PEFT, `--task` measures the held-out rows by a benchmark, and `--epochs 0`
//! measures without training.

#![deny(clippy::print_stdout, clippy::print_stderr)] // use `tell!`: a closed pipe must not panic

mod common;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use common::generation::GenerationOptions;
use common::gguf::{stays, GgufOptions, Trained};
use common::log::{draw_curves, Log};
use common::options::{check_apart, MethodOptions};
use common::output::{tell, tell_err};
use common::processes::{self, Processes};
use common::row_format::{FormatOptions, RowFormat};
use common::tasks::TaskOptions;
use common::training::TrainOptions;
use common::watch::{self, say, Scores, Watch};
use common::{interrupt, Outcome};
use indicatif::ProgressBar;
use monteclora::data::batch::Batcher;
use monteclora::data::causal::{pack, PromptEncoder, Tokens};
use monteclora::data::instruct::{Format, Prompted};
use monteclora::eval::Generator;
use monteclora::inject::DEFAULT_ADAPTER;
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::generate::PosteriorWeights;
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::{check_merged, save_merged, MAX_SHARD_BYTES};
use monteclora::models::Quantization;
use monteclora::peft::{self, AdapterFile, AdapterMetadata, ExportFormat, Task};
use monteclora::train::distributed::Communicator;
use monteclora::train::{self, held_out_loss_in_turns, CausalTuning, Method, MethodName, RunFolder, Summary};
use monteclora::util::files;
use monteclora::{Noise, Params};
use serde_json::{json, Value};

/// Fine-tunes a LLaMA or another decoder on text, instructions, conversations, GSM8K or code, and generates a
/// sample before and after. Without arguments: LoRA and then MonteCLoRA with the bundled model on the bundled
/// rows, in one table.
#[derive(Parser, Clone)]
#[command(name = "llama", version, next_help_heading = "Model and data", after_help = EXAMPLES)]
struct Args {
    /// A model folder, a hub repository, or a GGUF file of either. Default: the base that --adapter names, or the
    /// bundled stories260K.
    #[arg(long)]
    model: Option<String>,
    /// The branch, tag or commit of the --model's repository.
    #[arg(long, requires = "model")]
    revision: Option<String>,
    /// Training rows: JSON, JSON lines or text. Default: the bundled excerpt of GSM8K.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Rows for the held-out loss, in the same format. Default: every twentieth row of the data.
    #[arg(long)]
    held_out: Option<PathBuf>,
    #[command(flatten)]
    format: FormatOptions,
    #[command(flatten)]
    method: MethodOptions,
    #[command(flatten)]
    train: TrainOptions,
    #[command(flatten)]
    task: TaskOptions,
    #[command(flatten)]
    gguf: GgufOptions,
    /// Rows per micro-batch, and prompts that are continued together.
    #[arg(long, default_value_t = 8, help_heading = "Training")]
    batch_size: usize,
    /// The maximum number of tokens in a row, prompt and answer together; longer rows lose their end.
    #[arg(long, default_value_t = 256, help_heading = "Model and data")]
    max_length: usize,
    /// Train on the prompts as well as the answers.
    #[arg(long, help_heading = "Training")]
    learn_prompt: bool,
    /// Pack several rows into one sequence, in which later rows see earlier ones.
    #[arg(long, help_heading = "Training")]
    packing: bool,
    /// The prompt to continue before and after training; of conversations, what a user says. Default: the
    /// first held-out prompt, of a text its first words.
    #[arg(long, help_heading = "Generation")]
    prompt: Option<String>,
    #[command(flatten)]
    generation: GenerationOptions,
    /// Posterior draws to average besides the mean, for the held-out loss and the task (monteclora and blob).
    #[arg(long, default_value_t = 4, help_heading = "Evaluation")]
    posterior_samples: usize,
    /// Write only A and B, for servers, instead of everything that PEFT needs to continue training.
    #[arg(long, requires = "output", help_heading = "Output")]
    serving: bool,
    /// With --serving: fold rsLoRA's scale into B, for servers without rsLoRA (llama.cpp).
    #[arg(long, requires = "serving", help_heading = "Output")]
    fold_rslora: bool,
    /// Also write the whole model with the adapter merged in, to `OUT/model`.
    #[arg(long, requires = "output", help_heading = "Output")]
    merged: bool,
    /// The device: cpu, cuda or cuda:N; several, separated by commas, split a large base (cuda:0,cuda:1).
    #[arg(long, default_value = "cpu", help_heading = "Model and data")]
    device: String,
    /// The dtype of the frozen base: f32, bf16 or f16.
    #[arg(long, default_value = "f32", help_heading = "Model and data")]
    dtype: String,
    /// Quantise the frozen base: bf16, f16, q8_0, q6k, q5k, q4k, q3k, q2k, q5_1, q5_0, q4_1 or q4_0.
    #[arg(long, help_heading = "Model and data")]
    quantize: Option<Quantization>,
    /// The folder for metrics.json, log.jsonl and adapter/ (with full, model/). With several methods, each
    /// has a subfolder.
    #[arg(long, help_heading = "Output")]
    output: Option<PathBuf>,
}

/// The rows of a run; the held-out ones also as texts.
struct Data {
    train: Vec<Tokens>,
    held_out: Vec<Tokens>,
    held_out_texts: Vec<Prompted>,
    prompt: String,
    /// The tokens that end a generated text.
    stop: Vec<u32>,
}

/// The data that all methods share.
struct Setup {
    args: Args,
    model: String,
    files: ModelFiles,
    config: DecoderConfig,
    encoder: PromptEncoder,
    data: Data,
}

const EXAMPLES: &str = "\
Examples:
  llama --model DIR --data TRAIN.jsonl --held-out TEST.jsonl --format instruct --method monteclora --output OUT
  llama --model DIR --data CHATS.jsonl --format chat --method monteclora --output OUT
  llama --model DIR --data ROWS.jsonl --format gsm8k --adapter OUT/adapter --epochs 0 --task gsm8k
  llama --model DIR --data ROWS.jsonl --format code --task humaneval --run-generated-programs --epochs 0

Everything else is in docs/GUIDE.md.";

fn main() -> ExitCode {
    processes::run(run)
}

fn run(processes: &Processes) -> Outcome {
    common::tune_allocator();
    interrupt::listen()?;
    let (mut args, given) = common::given::parse::<Args>();
    args.method.find_adapter()?;
    args.task.benchmark()?; // fails here, not after an hour of training
    processes.join(&args.device)?;
    let (model, revision) =
        args.method.base(args.model.as_deref(), args.revision.as_deref(), "stories260k")?;
    args.revision = revision;
    let files = common::download::model_files(&model, args.revision.as_deref())?.quantized(args.quantize);
    let config = DecoderConfig::from_files(&files)?;
    let longest = config.max_length();
    args.max_length = args.method.text_length(args.max_length, longest);
    let (length, ends) = (args.max_length, config.eos_token_ids.clone());
    let format = args.format.row_format(&files)?;
    args.format.tell_unread(&given);
    if ends.is_empty() && !format.is_chat() {
        tell_err!("{model}: it names no end token: the model does not learn where answers end");
    }
    let tokenizer = common::tokenizer(&files, config.vocab_size)?;
    let encoder = PromptEncoder::new(tokenizer, length, longest, ends, args.learn_prompt)?;
    let encoder = if format.is_chat() { encoder.of_rendered() } else { encoder };
    let data = data(&args, &format, &config, &encoder)?;
    tell!("{} training rows, {} held out", data.train.len(), data.held_out.len());

    let methods = args.method.names()?;
    if args.gguf.gguf.is_some() && methods.len() > 1 {
        return Err("--gguf: one file holds one adapter: give a single --method".into());
    }
    args.method.tell_unread(&given, &methods);
    args.train.tell_unread(&given, &methods, args.output.is_some());
    given.without_effect(&["head_lr_ratio"], "the head of a language model is part of its base");
    args.task.tell_unread(&given);
    args.generation.tell_asked(&files)?;
    if !args.method.any(&methods, Method::has_posterior)? {
        given.without_effect(&["posterior_samples"], "the method has no posterior to draw from");
    }
    let setup = Setup { args, model, files, config, encoder, data };
    let mut table = Vec::new();
    for &name in &methods {
        let output = setup.args.output.as_ref();
        let output = output.map(|dir| if methods.len() == 1 { dir.clone() } else { dir.join(name.as_str()) });
        table.push(setup.tune(name, output.as_deref(), processes)?);
    }
    tell!(
        "\n{:<12} {:>10} {:>10} {:>10} {:>10} {:>8}",
        "method",
        "before",
        "mean",
        "posterior",
        "trainable",
        "seconds"
    );
    for row in &table {
        let number = |key: &str, digits: usize| match row[key].as_f64() {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_string(),
        };
        let (before, mean, posterior) =
            (number("loss_before", 4), number("loss_mean", 4), number("loss_posterior", 4));
        let (method, trainable) = (row["method"].as_str().unwrap_or_default(), &row["trainable_parameters"]);
        tell!(
            "{method:<12} {before:>10} {mean:>10} {posterior:>10} {trainable:>10} {:>8}",
            number("seconds", 1)
        );
    }
    Ok(())
}

/// Reads, encodes and splits the data.
fn data(args: &Args, format: &RowFormat, config: &DecoderConfig, encoder: &PromptEncoder) -> Outcome<Data> {
    tell!("template: {}", format.template());
    let (mut rows, held_out) = match (&args.data, &args.held_out) {
        (Some(path), Some(held_out)) => (format.read(path)?, format.read(held_out)?),
        (Some(path), None) => format.read_parted(path)?,
        (None, _) if format.is_chat() => return Err("--format chat: give --data".into()),
        (None, held_out) => {
            let (dir, bundled) = (PathBuf::from(common::asset("gsm8k")?), RowFormat::Plain(Format::Gsm8k));
            let held_out = held_out.clone().unwrap_or(dir.join("test.jsonl"));
            (bundled.read(&dir.join("train.jsonl"))?, format.read(&held_out)?)
        }
    };
    rows.truncate(args.train.limit(&rows).len());
    if held_out.is_empty() {
        return Err("--data: too few rows to hold some out; give --held-out".into());
    }
    let (train, encoded) = (encoder.encode(&rows)?, encoder.encode(&held_out)?);
    for (name, rows) in [("training", &train), ("held-out", &encoded)] {
        if rows.rows.is_empty() && rows.dropped > 0 {
            let lost = format!("leaves no room for an answer in any of the {} {name} rows", rows.dropped);
            return Err(format!("--max-length {}: {lost}: give a larger one", args.max_length).into());
        }
        if rows.cut + rows.dropped > 0 {
            let lost = format!("{} {name} rows were truncated, {} were left out", rows.cut, rows.dropped);
            tell!("--max-length {}: {lost}", args.max_length);
        }
    }
    let fits =
        || encoded.rows.first().map_or_else(String::new, |tokens| held_out[tokens.row].opening().to_string());
    let prompt = args.prompt.as_ref().map(|prompt| format.prompt(prompt)).transpose()?.unwrap_or_else(fits);
    let turn_ends = train.ends.iter().filter(|end| !config.eos_token_ids.contains(end));
    let stop = config.eos_token_ids.iter().chain(turn_ends).copied().collect();
    let train = if args.packing { pack(&train.rows, args.max_length) } else { train.rows };
    Ok(Data { train, held_out: encoded.rows, held_out_texts: held_out, prompt, stop })
}

impl Setup {
    /// Runs one method: load, generate, train, evaluate, generate, write. Returns the contents of
    /// `metrics.json`.
    fn tune(&self, name: MethodName, out: Option<&Path>, processes: &Processes) -> Outcome<Value> {
        processes.check(0)?;
        let writes = out.filter(|_| processes.is_first());
        // Held until everything is written, not only during training.
        let _lock = writes.map(files::lock).transpose()?;
        common::reset_peak_memory();
        let Self { args, config, data, .. } = self;
        let placement = config.place(&processes.devices(&args.device)?)?;
        if placement.places() > 1 {
            tell_err!("{placement}");
        }
        let (noise, device) = (Noise::new(args.train.seed), placement.first());
        let params = Params::new(noise, device);
        let checkpoint = self.files.open_weights(common::dtype(&args.dtype)?, device)?;
        let start = args.method.start(name, out)?;
        let base = start.base(checkpoint, &params)?;
        let mut model = DecoderForCausalLM::load(base.placed(&placement), config, noise)?;
        model.set_checkpoint_layers(args.train.checkpoint_layers);
        let (hooks, saves) = (start.inject(&mut model, &params)?, args.train.writes(&start, out)?);
        if !saves && (args.merged || args.serving || args.gguf.is_asked()) {
            return Err("--epochs 0: nothing was trained that could be written: give an --adapter".into());
        }

        let whole = writes
            .filter(|_| saves && (args.merged || name == MethodName::Full))
            .map(|dir| RunFolder::new(dir).model());
        if let Some(dir) = &whole {
            check_apart("--model", Path::new(&self.model), dir)?;
            if !(args.train.resume && files::has_entries(dir)) {
                check_merged(&model, &params, &self.files, dir)?;
            }
        }
        let adapter = start.method().adapter();
        let trained =
            Trained { model: &model, params: &params, adapter: adapter.as_ref(), files: &self.files };
        args.gguf.check(&trained, writes, args.train.resume)?;
        args.task.check(&self.generator(&model, PosteriorWeights::Mean, 1)?, &data.held_out_texts)?;

        let communicator = processes.communicator();
        let (rows, most) = (&data.held_out, args.batch_size.min(16));
        let loss =
            |w: PosteriorWeights| held_out_loss_in_turns(&model, rows, most, &w.passes(), communicator);
        let before = loss(PosteriorWeights::Mean)?;
        tell!("\n{name}, before: {}[{}]", data.prompt, self.speak(&model));
        let log = writes.map(|dir| Log::create(dir, args.train.tensorboard)).transpose()?;
        let keep = || match (writes.filter(|_| saves), &adapter) {
            (Some(dir), Some(adapter)) => self.save_adapter(&model, &params, adapter, dir),
            (Some(dir), None) if name == MethodName::Full => RunFolder::new(dir).remove_adapter(),
            (Some(dir), None) => RunFolder::new(dir).save_parameters(&params),
            (None, _) => Ok(()),
        };
        let bar = processes.progress(0, name.as_str());
        let evaluate = |bar: &ProgressBar, step| {
            let loss = loss(PosteriorWeights::Mean)?;
            say(bar, &format!("{} step {step}: held-out loss {loss:.4}", bar.prefix()));
            Ok(Scores { score: Some(-loss), values: vec![("held-out/loss".to_string(), loss)] })
        };
        let at_end = whole.iter().cloned().chain(args.gguf.merged(writes).map(|(_, path)| path)).collect();
        let is_alone = processes.world() == 1;
        let mut watch = Watch { bar, log, evaluate: &evaluate, keep: &keep, is_alone, at_end };
        let summary = match args.train.epochs {
            0 => Summary::default(),
            _ => {
                let batcher = Batcher::new(args.batch_size, args.train.length_grouped, noise)?;
                let (rows, pad_id) = (&data.train, config.pad_id());
                let objective = CausalTuning::new(&model, hooks, rows, batcher, pad_id);
                // The bundled model is small and trained on other text: it needs a higher learning rate.
                let is_bundled = self.model == common::asset("stories260k")?;
                let config = args.train.config(
                    if is_bundled { 5e-3 } else { 3e-4 },
                    &start.method(),
                    common::dtype(&args.dtype)?,
                    processes.world(),
                )?;
                let held_out = data.held_out.iter().flat_map(Tokens::numbers);
                let checkpoints = out.map(|dir| args.train.checkpoints(dir, &self.model, held_out));
                watch::fit(&objective, &params, &config, &mut watch, checkpoints.as_ref(), processes)?
            }
        };
        watch.bar.finish_and_clear();

        // Written first, before anything else can fail.
        keep()?;
        if let Some(dir) = &whole {
            if !stays(dir, args.train.resume && files::has_entries(dir)) {
                save_merged(&model, &params, &self.files, None, dir, MAX_SHARD_BYTES)?;
            }
        }
        if processes.is_first() {
            args.gguf.write(&trained, writes, args.train.resume)?;
        }
        processes.check(summary.steps)?;
        tell!("{name}, after: {}[{}]", data.prompt, self.speak(&model));
        let draws = if start.method().has_posterior() { args.posterior_samples } else { 0 };
        let posterior = (draws > 0).then_some(PosteriorWeights::Average(draws));
        let metrics = json!({
            "model": self.model, "method": name.as_str(), "seed": args.train.seed, "steps": summary.steps,
            "kept_step": summary.kept_step, "seconds": summary.seconds,
            "step_seconds_median": summary.step_seconds_median, "skipped": summary.skipped,
            "trainable_parameters": params.trainable_count(), "loss_before": before,
            "loss_mean": loss(PosteriorWeights::Mean)?, "loss_posterior": posterior.map(loss).transpose()?,
            "task": args.task.task, "task_mean": self.measure(&model, PosteriorWeights::Mean, communicator)?,
            "task_posterior": posterior.map(|weights| self.measure(&model, weights, communicator)).transpose()?,
            "peak_rss_mb": train::peak_rss_bytes().map(|bytes| bytes as f64 / 1e6),
        });
        if let Some(dir) = writes {
            files::write_json(&dir.join("metrics.json"), &metrics)?;
            draw_curves(dir)?;
        }
        for weights in ["task_mean", "task_posterior"].iter().filter(|key| !metrics[**key].is_null()) {
            tell!("{name}, {weights}: {}", metrics[*weights]);
        }
        Ok(metrics)
    }

    /// Writes the adapter in its current state.
    fn save_adapter(
        &self,
        model: &DecoderForCausalLM,
        params: &Params,
        adapter: &peft::AdapterMethod,
        dir: &Path,
    ) -> monteclora::Result<()> {
        let (base_model, task) = (Some(self.model.clone()), Some(Task::CausalLm));
        let revision = self.files.revision().map(str::to_string);
        let metadata = AdapterMetadata { base_model, revision, task, labels: None };
        let format = if self.args.serving {
            ExportFormat::Serving { fold_rslora: self.args.fold_rslora }
        } else {
            ExportFormat::PeftMonteCLoRA
        };
        let file = AdapterFile::from_model(model, DEFAULT_ADAPTER, params, adapter, &metadata)?;
        RunFolder::new(dir).save_adapter(&file, format)
    }

    /// Generates the continuation of the prompt. A run goes on without this sample.
    fn speak(&self, model: &DecoderForCausalLM) -> String {
        let generator = self.generator(model, PosteriorWeights::Mean, 64);
        let texts = generator.and_then(|generator| Ok(generator.texts(&[&self.data.prompt], &[])?));
        texts.map(|mut texts| texts.swap_remove(0)).unwrap_or_else(|why| {
            tell_err!("there is no sample: {why}");
            String::new()
        })
    }

    /// The results of the task; null without one.
    fn measure(
        &self,
        model: &DecoderForCausalLM,
        weights: PosteriorWeights,
        communicator: &dyn Communicator,
    ) -> Outcome<Value> {
        let generator = self.generator(model, weights, self.args.task.max_new_tokens())?;
        self.args.task.measure(&generator, &self.data.held_out_texts, communicator)
    }

    fn generator<'a>(
        &'a self,
        model: &'a DecoderForCausalLM,
        weights: PosteriorWeights,
        most: usize,
    ) -> Outcome<Generator<'a>> {
        let (seed, stop) = (self.args.train.seed, self.data.stop.clone());
        let config = self.args.generation.config(seed, stop, weights, most)?;
        Ok(Generator { model, encoder: &self.encoder, config, batch_size: self.args.batch_size })
    }
}
