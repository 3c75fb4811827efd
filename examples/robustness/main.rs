//! How much do results depend on hyperparameters? Runs the paper's grid, method by method, and writes a
//! report.
//!
//! `cargo run --release --example robustness -- --quick`: the bundled model on the bundled SST-2 excerpt, a
//! small grid. Without `--quick` the paper's nine settings.
//!
//! `cargo run --release --example robustness -- --model DIR_OR_HUB_ID --tasks mrpc,rte --data DIR
//! --methods lora,monteclora,monteclora:n=64 --lrs 3e-4,5e-5,1e-5 --batch-sizes 8,32,64 --epochs 3
//! --seeds 1,2,3 --output OUT`: any model, any task. A killed run resumes where it stopped;
//! `--shard 2/4`, or a SLURM job array, runs a part of the cells.
//!
//! `cargo run --release --example robustness -- --plan FILE --model DIR --data DIR --output OUT`: the study
//! that the file describes, and whether its criterion of success was met.
//!
//! `--train TRAIN.json --data DIR --tasks piqa,winogrande`: a language model, trained once per cell and
//! measured on every task; `--tasks gsm8k` without a model: the bundled model and rows.

#![deny(clippy::print_stdout, clippy::print_stderr)] // use `tell!`: a closed pipe must not panic

#[path = "../common/mod.rs"]
mod common;
mod language;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Parser;
use common::given::Given;
use common::options::text_length;
use common::output::{tell, tell_err};
use common::processes::{self, Processes};
use common::tasks::BenchmarkOptions;
use common::Outcome;
use language::{LanguageData, LanguageOptions, Limits, BUNDLED};
use monteclora::data::encode::{Encoded, TextEncoder};
use monteclora::data::split;
use monteclora::data::task::{Splits, Task};
use monteclora::models::hub::ModelFiles;
use monteclora::models::sequence::SequenceConfig;
use monteclora::study::recipe::Recipe;
use monteclora::study::{self, CellKey, Grid, PerTask, Plan, Progress, Shard, Trial};
use monteclora::Error;
use serde_json::{json, Value};

/// How much do results depend on hyperparameters? Runs a grid of methods, learning rates, batch sizes and
/// seeds, cell by cell, and writes a report. A killed run resumes where it stopped.
#[derive(Parser)]
#[command(name = "robustness", version, after_help = EXAMPLES)]
struct Args {
    /// A JSON file that describes the study (`study::Plan`): its tasks, methods, rates, seeds, rows and
    /// tests. A folder with results of a plan contains it: --report-only needs no file.
    #[arg(long, conflicts_with_all = ["tasks", "methods", "lrs", "batch_sizes", "seeds", "epochs", "max_length",
        "limit_train", "limit_dev", "foreign_task", "draws", "quick", "train", "report_only"])]
    plan: Option<PathBuf>,
    /// A model folder or a hub repository. Default: the bundled model.
    #[arg(long)]
    model: Option<String>,
    /// Tasks separated by commas: mrpc, cola, rte, wic, boolq, sst2, qnli, qqp, mnli or stsb; for a language
    /// model, folders of --data.
    #[arg(long, value_delimiter = ',', default_value = "sst2")]
    tasks: Vec<String>,
    /// A folder with the tasks in the GLUE or SuperGLUE download layout; for a language model, with a folder
    /// per task. Default: the hub's files.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Recipes separated by commas: a name (full, lora, map, rslora, loraplus, lora-fa, ivon, dora, adalora,
    /// ia3, bottleneck, prompt, blob, monteclora, monteclora-calibrated, monteclora-sparse,
    /// monteclora-posthoc, monteclora-released) and options, as in monteclora:n=64:eps=1e-2;
    /// lora:held-out=0.15 holds out 15 % of its rows to fit a temperature; monteclora-posthoc:adapter=DIR
    /// starts from an existing LoRA adapter of the task (no colon or comma in DIR).
    #[arg(long, value_delimiter = ',')]
    methods: Option<Vec<String>>,
    /// Learning rates. Default: the paper's; for the bundled model 2e-3,5e-4,1e-4.
    #[arg(long, value_delimiter = ',')]
    lrs: Option<Vec<f64>>,
    /// Batch sizes. Default: the paper's.
    #[arg(long, value_delimiter = ',')]
    batch_sizes: Option<Vec<usize>>,
    /// Seeds; each draws its own rows.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    seeds: Vec<u64>,
    /// Passes over the training rows: a number, a number for some tasks, or both, as in 20,mrpc=15.
    #[arg(long, default_value = "1")]
    epochs: PerTask<usize>,
    /// The maximum number of tokens in a row.
    #[arg(long, default_value_t = 128)]
    max_length: usize,
    /// Train on this many rows, stratified by label and drawn by the seed: a number, a number for some tasks,
    /// or both, as in 1000,sst2=4000.
    #[arg(long, default_value = "", hide_default_value = true)]
    limit_train: PerTask<usize>,
    /// Measure on this many rows, stratified by label, the same in every cell. Default: all.
    #[arg(long)]
    limit_dev: Option<usize>,
    /// A task whose rows are to be told apart from those of the others, or of some tasks only, as in
    /// sst2=cola.
    #[arg(long, default_value = "", hide_default_value = true)]
    foreign_task: PerTask<Task>,
    /// The number of posterior draws, and of passes of MC dropout.
    #[arg(long, default_value_t = 10)]
    draws: usize,
    /// A small grid: two learning rates, one batch size, three methods, one epoch.
    #[arg(long)]
    quick: bool,
    /// Run a part of the cells, i/n. Default: all, or this process's share among several, or this member's
    /// share of a SLURM job array.
    #[arg(long)]
    shard: Option<Shard>,
    /// Only write the report of the existing results.
    #[arg(long)]
    report_only: bool,
    /// Keep finished cells as lines of one file, cells.jsonl, instead of a folder each; with --report-only,
    /// pack the existing ones. A packed study can be resumed.
    #[arg(long)]
    pack: bool,
    /// The device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// The folder for the results and the report.
    #[arg(long, default_value = "target/robustness")]
    output: PathBuf,
    #[command(flatten)]
    language: LanguageOptions,
}

impl Args {
    /// Warns about given options that have no effect.
    fn tell_unread(&self, given: &Given) {
        if self.report_only {
            let run: Vec<&str> =
                "model tasks data methods lrs batch_sizes seeds epochs max_length limit_train \
                limit_dev foreign_task draws quick shard device train"
                    .split_whitespace()
                    .collect();
            given.without_effect(&run, "with --report-only nothing is run");
        } else if self.is_language() {
            BenchmarkOptions::tell_unread(given, &self.language.kinds(&self.tasks));
        } else {
            let own =
                ["train_format", "by_name", "max_new_tokens", "temperature", "dtype", "checkpoint_layers"];
            given.without_effect(&own, "it only applies to a study of a language model (--train)");
            BenchmarkOptions::tell_unread(given, &[]);
        }
    }

    /// Whether the tasks are those of a language model.
    fn is_language(&self) -> bool {
        self.language.train.is_some() || (self.model.is_none() && self.tasks == [BUNDLED])
    }

    fn glue_tasks(&self) -> Outcome<Vec<Task>> {
        let task = |name: &String| {
            name.parse::<Task>().map_err(|e| format!("{e}; for a language model, give --train"))
        };
        Ok(self.tasks.iter().map(task).collect::<Result<_, _>>()?)
    }

    fn shard(&self) -> Outcome<Shard> {
        Ok(match self.shard {
            Some(shard) => shard,
            None => Shard::from_slurm(|name| std::env::var(name).ok())?,
        })
    }
}

const EXAMPLES: &str = "\
Examples:
  robustness --quick
  robustness --model DIR --data DIR --tasks mrpc,rte --methods lora,monteclora --seeds 1,2,3 --output OUT
  robustness --plan FILE --model DIR --data DIR --output OUT
  robustness --train TRAIN.json --data DIR --tasks piqa,winogrande --model DIR --output OUT
  robustness --report-only --output OUT";

fn main() -> std::process::ExitCode {
    processes::run(run)
}

fn run(processes: &Processes) -> Outcome {
    common::tune_allocator();
    let (mut args, given) = common::given::parse::<Args>();
    args.tell_unread(&given);
    if !args.report_only {
        let plan = args.plan.as_deref().map(Plan::read).transpose()?;
        if let Some((plan, _)) = &plan {
            args.follow(plan);
        }
        if !args.is_language() {
            // The tasks' canonical names, however they are spelt; those of a plan are known to be valid.
            args.tasks = args.glue_tasks()?.iter().map(|task| task.name().to_string()).collect();
        }
        let shard = processes.share(args.shard()?);
        if args.pack && !shard.is_whole() {
            return Err("--pack: other processes may still run cells: use --report-only afterwards".into());
        }
        args.shard = Some(shard);
        args.device = processes.device_name(&args.device);
        processes.join(&args.device)?;
        run_cells(&args, plan)?;
    }
    // The last of several processes to finish writes the report of all cells.
    if args.pack {
        study::pack(&args.output)?;
    }
    study::write_report(&args.output, &args.output)?;
    #[cfg(feature = "plot")]
    study::plot::write_plots(&study::read_cells(&args.output)?, &args.output.join("plots"))?;
    let report = args.output.join("report.md");
    tell!("{}", std::fs::read_to_string(&report).map_err(Error::io(&*report))?);
    Ok(())
}

fn run_cells(args: &Args, plan: Option<(Plan, String)>) -> Outcome {
    let device = common::device(&args.device)?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => common::asset(if args.is_language() { "stories260k" } else { "tiny-roberta" })?,
    };
    let cells = match &plan {
        Some((plan, _)) if plan.model != short_name(&model) => {
            return Err(
                format!("--plan: expected the model {}, got {}", plan.model, short_name(&model)).into()
            );
        }
        Some((plan, _)) => plan.cells()?,
        None => grid(args).cells()?,
    };
    let files = common::download::model_files(&model, None)?;
    let methods: BTreeSet<&String> = cells.iter().map(|key| &key.method).collect();
    let recipes = methods.into_iter().map(|text| text.parse::<Recipe>());
    let recipes: Vec<Recipe> = recipes.collect::<monteclora::Result<_>>()?;
    for recipe in &recipes {
        recipe.notes().iter().for_each(|note| tell_err!("{}: {note}", recipe.text));
    }
    let elsewhere = recipes.iter().any(|recipe| recipe.adapter.is_some());
    if elsewhere && args.tasks.len() > 1 && !args.is_language() {
        return Err("--methods: a given adapter is for one task: give a single one in --tasks".into());
    }
    let virtual_tokens = recipes.iter().map(|recipe| recipe.method.virtual_tokens()).max().unwrap_or(0);
    let mut settings = settings(args, &model, plan.as_ref())?;
    extend(&mut settings, study::checksums_of_recipes(&recipes, &files)?);
    if args.is_language() {
        return run_language(args, &cells, &files, settings, virtual_tokens);
    }
    if args.draws == 0 {
        return Err("--draws: expected at least 1, got 0".into());
    }
    let data = Data { args, files: &files, virtual_tokens };
    let mut tasks = BTreeMap::new();
    for task in &args.glue_tasks()? {
        tasks.insert(task.name(), data.load(*task)?);
    }
    let mut foreign = BTreeMap::new();
    for (_, task) in args.foreign_task.entries() {
        foreign.insert(task.name(), data.load(*task)?.dev);
    }

    let mut cell = |key: &CellKey| {
        let rows = &tasks[key.task.as_str()];
        // A task is not foreign to itself.
        let other = args.foreign_task.get(rows.task).filter(|other| **other != rows.task);
        let foreign = other.map(|other| &foreign[other.name()]);
        let trial = Trial {
            files: &files,
            task: rows.task,
            train: &rows.train,
            limit_train: args.limit_train.get(rows.task).copied(),
            dev: &rows.dev,
            foreign: foreign.map_or(&[], Vec::as_slice),
            epochs: args.epochs.get(rows.task).copied().unwrap_or(1),
            draws: args.draws,
            device: &device,
        };
        common::reset_peak_memory();
        trial.run(key)
    };
    // A foreign task may also be one of the trained tasks: its name is marked.
    let strangers = foreign.iter().map(|(name, rows)| (format!("{name}, foreign"), [&[][..], &rows[..]]));
    let own = tasks.iter().map(|(name, rows)| (name.to_string(), [&rows.train[..], &rows.dev]));
    extend(&mut settings, study::checksums_of_data(strangers.chain(own)));
    study::run(&args.output, &settings, &cells, args.shard()?, &mut cell, &mut say)?;
    Ok(())
}

/// Runs the cells of a language model: one training per cell, measured on all tasks.
fn run_language(
    args: &Args,
    cells: &[CellKey],
    files: &ModelFiles,
    mut settings: Value,
    virtual_tokens: usize,
) -> Outcome {
    // One training serves all tasks, so that options by task are not possible.
    let own = [&args.epochs, &args.limit_train].map(|of| of.entries().iter().any(|(task, _)| task.is_some()));
    if own.contains(&true) || args.foreign_task != PerTask::default() {
        return Err("--epochs TASK=N, --limit-train TASK=N, --foreign-task: not with a language model".into());
    }
    let number = |of: &PerTask<usize>| of.entries().first().map(|(_, number)| *number);
    let device = common::device(&args.device)?;
    let (epochs, train) = (number(&args.epochs).unwrap_or(1), number(&args.limit_train));
    let limits = Limits { max_length: args.max_length, virtual_tokens, train, dev: args.limit_dev };
    let data = LanguageData::load(&args.language, files, &args.tasks, args.data.as_deref(), limits)?;
    settings["language"] = data.settings.clone();
    let trial = data.trial(files, epochs, args.draws, &device)?;
    let mut cell = |key: &CellKey| {
        common::reset_peak_memory();
        trial.run(key)
    };
    study::run(&args.output, &settings, cells, args.shard()?, &mut cell, &mut say)?;
    Ok(())
}

impl Args {
    /// Takes the settings of a plan.
    fn follow(&mut self, plan: &Plan) {
        self.tasks.clone_from(&plan.tasks);
        self.epochs.clone_from(&plan.epochs);
        self.max_length = plan.max_length;
        self.limit_train.clone_from(&plan.limit_train);
        self.limit_dev = plan.limit_dev;
        self.foreign_task.clone_from(&plan.foreign_task);
        self.draws = plan.draws;
    }
}

/// The last component of a model's folder or repository.
fn short_name(model: &str) -> String {
    Path::new(model).file_name().map_or(model.into(), |name| name.to_string_lossy()).into_owned()
}

/// The settings that all cells depend on, besides their own keys.
fn settings(args: &Args, model: &str, plan: Option<&(Plan, String)>) -> Outcome<Value> {
    // Older versions trained on the first rows and held out the last ones, and their posterior draws were not
    // in pairs: with these settings, their cells belong to another study.
    let mut settings = json!({
        "model": short_name(model), "version": env!("CARGO_PKG_VERSION"), "rows": "stratified, by seed",
        "posterior_draws": "in pairs",
    });
    let own = match plan {
        Some((plan, crc)) => plan.settings(crc)?,
        None => json!({
            "epochs": args.epochs, "max_length": args.max_length, "limit_train": args.limit_train,
            "limit_dev": args.limit_dev, "draws": args.draws, "foreign_task": args.foreign_task,
        }),
    };
    extend(&mut settings, own);
    Ok(settings)
}

fn extend(settings: &mut Value, more: Value) {
    if let (Some(settings), Value::Object(more)) = (settings.as_object_mut(), more) {
        settings.extend(more);
    }
}

fn grid(args: &Args) -> Grid {
    let methods = match (&args.methods, args.quick) {
        (Some(methods), _) => methods.clone(),
        (None, true) => ["lora", "full", "monteclora"].map(String::from).to_vec(),
        // The temperatures are fitted on rows that the LoRA was not trained on.
        (None, false) => {
            study::recipe::NAMES.iter().chain(&["lora:held-out=0.15"]).map(ToString::to_string).collect()
        }
    };
    let mut grid = if args.is_language() {
        Grid::paper_llama(vec![args.language.name()], methods)
    } else {
        Grid::paper(args.tasks.clone(), methods)
    };
    grid.seeds.clone_from(&args.seeds);
    if args.model.is_none() {
        // The bundled model is small and only briefly pre-trained: it needs higher learning rates.
        grid.lrs = vec![2e-3, 5e-4, 1e-4];
    }
    if args.quick {
        grid.lrs.truncate(2);
        grid.batch_sizes = vec![32];
    }
    Grid {
        lrs: args.lrs.clone().unwrap_or(grid.lrs),
        batch_sizes: args.batch_sizes.clone().unwrap_or(grid.batch_sizes),
        ..grid
    }
}

fn say(progress: &Progress, next: Option<&CellKey>) {
    let left = progress.seconds_left.map(|s| format!(", about {:.0} min left", s / 60.0)).unwrap_or_default();
    let Progress { done, total, failed, .. } = progress;
    let next = next.map(|key| format!("; now {}", key.folder_name())).unwrap_or_default();
    tell_err!("{done} of {total} cells done, {failed} failed{left}{next}");
}

/// Reads and encodes tasks.
struct Data<'a> {
    args: &'a Args,
    files: &'a ModelFiles,
    /// The largest number of virtual tokens that a method of the grid puts before a row.
    virtual_tokens: usize,
}

struct Rows {
    task: Task,
    train: Vec<Encoded>,
    dev: Vec<Encoded>,
}

impl Data<'_> {
    fn load(&self, task: Task) -> Outcome<Rows> {
        let args = self.args;
        let splits = self.splits(task)?;
        let config = SequenceConfig::from_files(self.files, task.num_labels())?;
        let tokenizer = common::tokenizer(self.files, config.vocab_size())?;
        // All methods of a grid see the same rows: the length leaves room for the most virtual tokens of any
        // method.
        let longest = config.max_length();
        let length = text_length(args.max_length, longest, self.virtual_tokens);
        let encoder = TextEncoder::new(tokenizer, length, longest)?;
        let (_, dev) = splits.dev.first().ok_or_else(|| format!("{task}: there is no development set"))?;
        // Each seed draws its own training rows; the measured rows are the same in all cells.
        let train = encoder.encode(&splits.train)?;
        let dev = split::measured(encoder.encode(dev)?, args.limit_dev, split::strata);
        Ok(Rows { task, train, dev })
    }

    fn splits(&self, task: Task) -> Outcome<Splits> {
        common::download::task_rows(task, self.args.data.as_deref(), self.args.model.is_none())
    }
}
