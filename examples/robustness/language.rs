//! The study of a language model: its options, rows and tasks.

use std::path::{Path, PathBuf};

use candle_core::Device;
use monteclora::data::causal::{PromptEncoder, Tokens};
use monteclora::data::instruct::{self, Format, Prompted};
use monteclora::data::split;
use monteclora::eval::Benchmark;
use monteclora::models::decoder::DecoderConfig;
use monteclora::models::generate::{GenerateConfig, Sampling};
use monteclora::models::hub::ModelFiles;
use monteclora::study::{EvaluatedTask, LanguageTrial};
use monteclora::train;
use serde_json::{json, Value};

use crate::common::options::text_length;
use crate::common::output::tell;
use crate::common::tasks::BenchmarkOptions;
use crate::common::{asset, dtype, tokenizer, Outcome};

/// The bundled task.
pub const BUNDLED: &str = "gsm8k";

// Options that only studies of language models have. Not a doc comment, which clap would take for the
// program's description.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Language models")]
pub struct LanguageOptions {
    /// Train a language model (a LLaMA or another decoder) on this file's rows and measure it on --tasks,
    /// each in DATA/TASK/test.json or test.jsonl: gsm8k and humaneval by their own rules, all others as
    /// multiple choice.
    #[arg(long)]
    pub train: Option<PathBuf>,
    /// The format of --train: instruct, completion, gsm8k, text or code. Default: gsm8k if that is the only task, else
    /// instruct.
    #[arg(long)]
    pub train_format: Option<Format>,
    /// Also measure multiple choice by the first choice named in a generated text, as the paper's authors do.
    #[arg(long)]
    pub by_name: bool,
    /// The maximum number of generated tokens. Default: 32 for a choice's name, 256 for GSM8K, 512 for
    /// programs.
    #[arg(long)]
    pub max_new_tokens: Option<usize>,
    /// The sampling temperature for several completions of a program.
    #[arg(long, default_value_t = 0.2)]
    pub temperature: f64,
    /// The dtype of a language model's frozen base: f32, bf16 or f16.
    #[arg(long, default_value = "f32")]
    pub dtype: String,
    /// Keep only each layer's input and recompute the layer in the backward pass: less memory, more time.
    #[arg(long)]
    pub checkpoint_layers: bool,
    #[command(flatten)]
    pub benchmark: BenchmarkOptions,
}

/// The limits on rows, common to all cells of a study.
#[derive(Clone, Copy)]
pub struct Limits {
    /// The maximum number of tokens in a training row.
    pub max_length: usize,
    /// The largest number of virtual tokens that a method of the grid puts before a row.
    pub virtual_tokens: usize,
    /// The number of training rows in a cell; each seed has its own.
    pub train: Option<usize>,
    /// The number of rows of each task to measure on.
    pub dev: Option<usize>,
}

/// The encoded rows of a study.
pub struct LanguageData {
    /// The settings that all cells depend on.
    pub settings: Value,
    options: LanguageOptions,
    rows: Vec<Prompted>,
    train: Vec<Tokens>,
    limit_train: Option<usize>,
    tasks: Vec<EvaluatedTask>,
    encoder: PromptEncoder,
}

impl LanguageData {
    /// Reads the training rows and the tasks with these names below `data`; without --train, the bundled
    /// ones.
    pub fn load(
        options: &LanguageOptions,
        files: &ModelFiles,
        tasks: &[String],
        data: Option<&Path>,
        limits: Limits,
    ) -> Outcome<Self> {
        let (path, data) = match (&options.train, data) {
            (Some(path), Some(data)) => (path.clone(), data.to_path_buf()),
            (Some(_), None) => return Err("--train: give the folder of the tasks by --data".into()),
            (None, _) => {
                let dir = PathBuf::from(asset(BUNDLED)?);
                (dir.join("train.jsonl"), dir.parent().unwrap_or(Path::new(".")).to_path_buf())
            }
        };
        let tasks = options.tasks(tasks, &data, limits.dev)?;
        let config = DecoderConfig::from_files(files)?;
        let (longest, ends) = (config.max_length(), config.eos_token_ids.clone());
        let tokenizer = tokenizer(files, config.vocab_size)?;
        let length = text_length(limits.max_length, longest, limits.virtual_tokens);
        let encoder = PromptEncoder::new(tokenizer.clone(), length, longest, ends.clone(), false)?;
        // Measured rows are not cut to --max-length: they may use all positions of the model.
        let room = longest.saturating_sub(limits.virtual_tokens);
        let whole = PromptEncoder::new(tokenizer, room, longest, ends, false)?;

        let only = |name: &str| tasks.iter().all(|task| kind(&task.name) == name);
        let format =
            options.train_format.unwrap_or(if only("gsm8k") { Format::Gsm8k } else { Format::Instruct });
        let rows = instruct::read(&path, format)?;
        let encoded = encoder.encode(&rows)?;
        if encoded.cut + encoded.dropped > 0 {
            let lost =
                format!("{} training rows were truncated, {} were left out", encoded.cut, encoded.dropped);
            tell!("--max-length {length}: {lost}");
        }
        let checksum = train::fingerprint(encoded.rows.iter().flat_map(Tokens::numbers));
        let texts = |row: &Prompted| format!("{}{}\u{0}", row.prompt, row.answer).into_bytes();
        let checksum_of = |rows: &[Prompted]| train::fingerprint(rows.iter().flat_map(texts).map(u32::from));
        let measured: Vec<_> =
            tasks.iter().map(|task| json!([task.name, task.rows.len(), checksum_of(&task.rows)])).collect();
        let mut settings = json!({
            "train": path.file_name().map(|name| name.to_string_lossy()), "train_rows": checksum,
            "tasks": measured, "normalize": options.benchmark.normalize,
            "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "dtype": options.dtype,
        });
        // Only set if used, so that older studies, which lack this setting, still match.
        if options.benchmark.extract_code {
            settings["extract_code"] = json!(true);
        }
        for task in &tasks {
            // The same for several completions; a task's name alone stands for one greedy completion.
            match &task.benchmark {
                Benchmark::Code { samples: 1, .. } => {}
                Benchmark::Code { samples, ks, .. } => settings["completions"] = json!([samples, ks]),
                _ => {}
            }
        }
        let (options, encoder) = (options.clone(), whole);
        let (train, limit_train) = (encoded.rows, limits.train);
        Ok(Self { settings, options, rows, train, limit_train, tasks, encoder })
    }

    /// Creates the trial that runs every cell.
    pub fn trial<'a>(
        &'a self,
        files: &'a ModelFiles,
        epochs: usize,
        draws: usize,
        device: &'a Device,
    ) -> Outcome<LanguageTrial<'a>> {
        let Self { options, rows, train, limit_train, tasks, encoder, .. } = self;
        let (base_dtype, checkpoint_layers) = (dtype(&options.dtype)?, options.checkpoint_layers);
        Ok(LanguageTrial {
            files,
            rows,
            train,
            limit_train: *limit_train,
            tasks,
            encoder,
            epochs,
            draws,
            base_dtype,
            checkpoint_layers,
            device,
        })
    }
}

impl LanguageOptions {
    /// The name of the training data in the cells: that of their file, or of their folder if the file is
    /// `train`.
    pub fn name(&self) -> String {
        let Some(path) = &self.train else { return BUNDLED.to_string() };
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        match path.parent().and_then(Path::file_name) {
            Some(folder) if stem == "train" => folder.to_string_lossy().into_owned(),
            _ => stem,
        }
    }

    /// The benchmarks of the tasks with these names.
    pub fn kinds(&self, names: &[String]) -> Vec<&'static str> {
        names.iter().map(|name| kind(name)).collect()
    }

    /// Reads the tasks with these names.
    fn tasks(&self, names: &[String], data: &Path, limit: Option<usize>) -> Outcome<Vec<EvaluatedTask>> {
        let mut tasks: Vec<EvaluatedTask> = Vec::new();
        for name in names {
            let dir = data.join(name);
            let path = ["test.json", "test.jsonl"]
                .map(|file| dir.join(file))
                .into_iter()
                .find(|path| path.is_file());
            let path =
                path.ok_or_else(|| format!("--tasks {name}: {} has no test.json(l)", dir.display()))?;
            let (benchmark, format, most) = match kind(name) {
                "gsm8k" => ("gsm8k", Format::Gsm8k, 256),
                "humaneval" => ("humaneval", Format::Code, 512),
                _ => ("choice", Format::Instruct, 32),
            };
            let rows = instruct::read(&path, format)?;
            // All cells are measured on the same rows.
            let right = |row: &Prompted| row.choices.as_ref().map_or(0, |choices| choices.correct as u32);
            let rows = split::measured(rows, limit, |rows| rows.iter().map(right).collect());
            let benchmark = self.benchmark.named(benchmark)?;
            let sampling = match &benchmark {
                Benchmark::Code { samples, .. } if *samples > 1 => {
                    Sampling::All { temperature: self.temperature }
                }
                _ => Sampling::ArgMax,
            };
            let max_new_tokens = self.max_new_tokens.unwrap_or(most);
            let generation = GenerateConfig { max_new_tokens, sampling, ..GenerateConfig::default() };
            let task = EvaluatedTask { name: name.clone(), benchmark, rows, generation };
            let by_name = self.by_name && matches!(task.benchmark, Benchmark::Choice(_));
            let named = by_name.then(|| EvaluatedTask {
                name: format!("{name}-by-name"),
                benchmark: Benchmark::ChoiceByName,
                ..task.clone()
            });
            tasks.extend([task].into_iter().chain(named));
        }
        let twice =
            tasks.iter().enumerate().find(|(i, task)| tasks[..*i].iter().any(|t| t.name == task.name));
        match twice {
            Some((_, task)) => Err(format!("--tasks: {} comes twice", task.name).into()),
            None => Ok(tasks),
        }
    }
}

/// The benchmark of the task with this name.
fn kind(name: &str) -> &'static str {
    match name.to_ascii_lowercase().as_str() {
        "gsm8k" => "gsm8k",
        "humaneval" => "humaneval",
        _ => "choice",
    }
}
