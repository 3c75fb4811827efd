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

mod answers;
#[path = "../common/mod.rs"]
mod common;
mod generation;
mod gguf;
mod row_format;
mod rows;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use common::options::{output_of, MethodOptions};
use common::output::{tell, tell_err};
use common::processes::{self, Processes};
use common::tasks::TaskOptions;
use common::training::TrainOptions;
use common::{interrupt, Outcome};
use generation::GenerationOptions;
use gguf::GgufOptions;
use monteclora::data::causal::PromptEncoder;
use monteclora::data::instruct::Format;
use monteclora::models::decoder::DecoderConfig;
use monteclora::models::Quantization;
use monteclora::train::{Method, MethodName};
use row_format::{FormatOptions, RowFormat};
use rows::{Data, Input};
use run::Setup;
use serde_json::Value;

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
    /// Answer the prompts of this file instead of training, with the --adapter (a folder of an adapter, a model or a
    /// run) or a --model, and write JSON lines to --output or standard output. Its rows need no answers; their
    /// --format is by default that of the run.
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    predict: Option<PathBuf>,
    /// Measure the held-out loss on this many of the held-out rows, drawn at random.
    #[arg(long)]
    limit_held_out: Option<usize>,
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
    /// Posterior draws to average besides the mean, for the held-out loss and the task (monteclora and blob). With
    /// --predict: instead of the mean, if given.
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

const EXAMPLES: &str = "\
Examples:
  llama --model DIR --data TRAIN.jsonl --format instruct --method monteclora --sample-scaler 2.5e-5 --output OUT
  llama --model DIR --data CHATS.jsonl --format chat --method lora --output OUT
  llama --predict QUESTIONS.jsonl --adapter OUT
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
    let (format, knows_format) = Input::complete(&args.format, args.method.adapter.as_deref(), &given)?;
    args.format = format;
    args.task.benchmark()?; // fails here, not after an hour of training
    processes.join(&args.device)?;
    if let Some(rows) = &args.predict {
        if !processes.is_first() {
            return Ok(()); // one process is enough
        }
        return answers::answer(&args, rows, &given, &processes.devices(&args.device)?);
    }
    let base = args.method.base(args.model.as_deref(), args.revision.as_deref(), "stories260k")?;
    let files =
        common::download::model_files(&base.model, base.revision.as_deref())?.quantized(args.quantize);
    let config = DecoderConfig::from_files(&files)?;
    let longest = config.max_length();
    args.max_length = args.method.text_length(args.max_length, longest);
    let (length, ends) = (args.max_length, config.eos_token_ids.clone());
    let format = args.format.row_format(&files)?;
    args.format.tell_unread(&given);
    // A run that only writes an adapter in another form knows no format, unless the adapter's run had one.
    let input = Some(Input::new(&args.format, &format)).filter(|_| knows_format || args.train.epochs > 0);
    let writes_only = args.train.epochs == 0 && args.data.is_none() && args.held_out.is_none();
    let format = if writes_only { RowFormat::Plain(Format::Gsm8k) } else { format };
    if ends.is_empty() && !format.is_chat() {
        tell_err!("{}: it names no end token: the model does not learn where answers end", base.model);
    }
    let tokenizer = common::tokenizer(&files, config.vocab_size)?;
    let encoder = PromptEncoder::new(tokenizer, length, longest, ends, args.learn_prompt)?;
    let encoder = if format.is_chat() { encoder.of_rendered() } else { encoder };
    let data = Data::read(&args, &format, &config, &encoder)?;
    tell!("{} training rows, {} held out", data.train.len(), data.held_out.len());

    let methods = args.method.names()?;
    if args.gguf.gguf.is_some() && methods.len() > 1 {
        return Err("--gguf: one file holds one adapter: give a single --method".into());
    }
    args.method.tell_unread(&given, &methods);
    let is_paper = methods.contains(&MethodName::MonteCLoRA) && args.method.preset == "paper";
    if is_paper && args.method.adapter.is_none() && !given.has("sample_scaler") && !base.is_bundled {
        tell_err!("monteclora: --sample-scaler 5e-3 is the paper's for RoBERTa, for LLaMA it has 2.5e-5");
    }
    args.train.tell_unread(&given, &methods, args.output.is_some());
    given.without_effect(&["head_lr_ratio"], "the head of a language model is part of its base");
    args.task.tell_unread(&given);
    args.generation.tell_asked(&files)?;
    if !args.method.any(&methods, Method::has_posterior)? {
        given.without_effect(&["posterior_samples"], "the method has no posterior to draw from");
    }
    let setup = Setup { args, base, files, config, encoder, input, data };
    let mut table = Vec::new();
    for &name in &methods {
        let output = output_of(setup.args.output.as_deref(), name, &methods);
        table.push(setup.tune(name, output.as_deref(), processes)?);
    }
    print_table(&table);
    Ok(())
}

/// Prints the runs side by side.
fn print_table(runs: &[Value]) {
    tell!(
        "\n{:<12} {:>10} {:>10} {:>10} {:>10} {:>8}",
        "method",
        "before",
        "mean",
        "posterior",
        "trainable",
        "seconds"
    );
    for row in runs {
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
}
