//! How much do results depend on hyperparameters? The paper's grid, method by method, and its report.
//!
//! `cargo run --release --example robustness -- --quick`: the bundled model on the bundled SST-2
//! excerpt, a small grid. Without `--quick` the paper's nine settings.
//!
//! `cargo run --release --example robustness -- --model DIR_OR_HUB_ID --tasks mrpc,rte --data DIR
//! --methods lora,monteclora,monteclora:n=64 --lrs 3e-4,5e-5,1e-5 --batch-sizes 8,32,64 --epochs 3
//! --seeds 1,2,3 --output OUT`: any model, any task. A run that is killed goes on where it stopped;
//! `--shard 2/4`, or a SLURM job array, takes a part of the cells.
//!
//! `cargo run --release --example robustness -- --plan FILE --model DIR --data DIR --output OUT`: the
//! study that the file says, and whether what it counts as success was found.
//!
//! `--train TRAIN.json --data DIR --tasks piqa,winogrande`: a language model, trained once a cell and measured
//! on every task; `--tasks gsm8k` without a model: the bundled one and rows.

#![deny(clippy::print_stdout, clippy::print_stderr)] // a closed pipe is no bug: `tell`

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Parser;
use common::given::Given;
use common::language::{LanguageData, LanguageOptions, Limits, BUNDLED};
use common::options::text_length;
use common::output::{tell, tell_err};
use common::processes::{self, Processes};
use common::tasks::BenchmarkOptions;
use common::Outcome;
use monteclora::data::encode::{Encoded, TextEncoder};
use monteclora::data::split::{self, Draw};
use monteclora::data::task::{Splits, Task};
use monteclora::models::hub::ModelFiles;
use monteclora::models::sequence::SequenceConfig;
use monteclora::noise::Noise;
use monteclora::study::recipe::Recipe;
use monteclora::study::{self, CellKey, Grid, PerTask, Plan, Progress, Shard, Trial};
use monteclora::Error;
use serde_json::{json, Value};

/// How much do results depend on hyperparameters? A grid of methods, learning rates, batch sizes and seeds, cell by
/// cell, and its report. A run that is killed goes on where it stopped.
#[derive(Parser)]
#[command(name = "robustness", version, after_help = EXAMPLES)]
struct Args {
    /// A study as a JSON file says it (`study::Plan`): its tasks, methods, rates, seeds, rows and tests. A folder
    /// that it was run into knows it: --report-only needs no file.
    #[arg(long, conflicts_with_all = ["tasks", "methods", "lrs", "batch_sizes", "seeds", "epochs", "max_length",
        "limit_train", "limit_dev", "foreign_task", "draws", "quick", "train", "report_only"])]
    plan: Option<PathBuf>,
    /// A model folder, or a hub repository. Default: the bundled model.
    #[arg(long)]
    model: Option<String>,
    /// mrpc, cola, rte, wic, boolq, sst2, qnli, qqp, mnli or stsb, separated by commas; of a language model
    /// folders of --data.
    #[arg(long, value_delimiter = ',', default_value = "sst2")]
    tasks: Vec<String>,
    /// A folder with the tasks in the GLUE or SuperGLUE download layout; of a language model with a folder
    /// for each. Default: the hub's files.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Recipes separated by commas: a name (full, lora, map, rslora, loraplus, lora-fa, ivon, dora, adalora, ia3,
    /// bottleneck, prompt, blob, monteclora, monteclora-calibrated, monteclora-sparse, monteclora-posthoc,
    /// monteclora-released) and options, as in monteclora:n=64:eps=1e-2; lora:held-out=0.15 keeps 15 % of its
    /// rows to fit a temperature on. monteclora-posthoc:adapter=DIR starts from a LoRA adapter of
    /// the task that was made elsewhere; no colon or comma in DIR.
    #[arg(long, value_delimiter = ',')]
    methods: Option<Vec<String>>,
    /// Learning rates. Default: the paper's, or for the bundled model 2e-3,5e-4,1e-4.
    #[arg(long, value_delimiter = ',')]
    lrs: Option<Vec<f64>>,
    /// Batch sizes. Default: the paper's.
    #[arg(long, value_delimiter = ',')]
    batch_sizes: Option<Vec<usize>>,
    /// Seeds, each with rows of its own.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    seeds: Vec<u64>,
    /// Passes over the training rows: a number, or one for each of some tasks, or both, as in 20,mrpc=15.
    #[arg(long, default_value = "1")]
    epochs: PerTask<usize>,
    /// The most tokens of a row.
    #[arg(long, default_value_t = 128)]
    max_length: usize,
    /// Train on so many rows: a number, or one for each of some tasks, or both, as in 1000,sst2=4000. Each
    /// seed has its own, stratified by label.
    #[arg(long, default_value = "", hide_default_value = true)]
    limit_train: PerTask<usize>,
    /// Measure on so many rows, stratified by label, the same in every cell. Default: all.
    #[arg(long)]
    limit_dev: Option<usize>,
    /// Rows of this task are to be told from those of the others, or of some tasks alone, as in sst2=cola.
    #[arg(long, default_value = "", hide_default_value = true)]
    foreign_task: PerTask<Task>,
    /// Posterior draws, and passes of MC dropout.
    #[arg(long, default_value_t = 10)]
    draws: usize,
    /// A small grid: two learning rates, one batch size, three methods, one epoch.
    #[arg(long)]
    quick: bool,
    /// Run a part of the cells, i/n. Default: the whole, or this process's share of several,
    /// or this member of a SLURM job array.
    #[arg(long)]
    shard: Option<Shard>,
    /// Only write the report of the results there are.
    #[arg(long)]
    report_only: bool,
    /// Keep the finished cells as lines of one file, cells.jsonl, in place of a folder each; with
    /// --report-only those that there are. A packed study goes on as any other.
    #[arg(long)]
    pack: bool,
    /// cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// The folder of the results and the report.
    #[arg(long, default_value = "target/robustness")]
    output: PathBuf,
    #[command(flatten)]
    language: LanguageOptions,
}

impl Args {
    /// Says which of the options that were given change nothing.
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
            given.without_effect(&own, "it is of a language model's study (--train)");
            BenchmarkOptions::tell_unread(given, &[]);
        }
    }

    /// Whether the tasks are those of a language model.
    fn is_language(&self) -> bool {
        self.language.train.is_some() || (self.model.is_none() && self.tasks == [BUNDLED])
    }

    fn glue_tasks(&self) -> Outcome<Vec<Task>> {
        let task =
            |name: &String| name.parse::<Task>().map_err(|e| format!("{e}; of a language model say --train"));
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
            // However they are spelt; of a plan they are known to be some.
            args.tasks = args.glue_tasks()?.iter().map(|task| task.name().to_string()).collect();
        }
        let shard = processes.share(args.shard()?);
        if args.pack && !shard.is_whole() {
            return Err("--pack: others may run the study: pack it with --report-only afterwards".into());
        }
        args.shard = Some(shard);
        args.device = processes.device_name(&args.device);
        processes.join(&args.device)?;
        run_cells(&args, plan)?;
    }
    // The last of several processes writes the report of all.
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
                format!("--plan: it is of the model {}, not {}", plan.model, short_name(&model)).into()
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
        return Err("--methods: an adapter made elsewhere is of one task: give one in --tasks".into());
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
    // A task that is foreign to another may come to be trained on, too.
    let strangers = foreign.iter().map(|(name, rows)| (format!("{name}, foreign"), [&[][..], &rows[..]]));
    let own = tasks.iter().map(|(name, rows)| (name.to_string(), [&rows.train[..], &rows.dev]));
    extend(&mut settings, study::checksums_of_data(strangers.chain(own)));
    study::run(&args.output, &settings, &cells, args.shard()?, &mut cell, &mut say)?;
    Ok(())
}

/// The cells of a language model: one training, all tasks.
fn run_language(
    args: &Args,
    cells: &[CellKey],
    files: &ModelFiles,
    mut settings: Value,
    virtual_tokens: usize,
) -> Outcome {
    // One training serves all tasks.
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
    /// Takes what a plan says.
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

/// The last part of a model's folder or repository.
fn short_name(model: &str) -> String {
    Path::new(model).file_name().map_or(model.into(), |name| name.to_string_lossy()).into_owned()
}

/// What all cells depend on beside their own keys.
fn settings(args: &Args, model: &str, plan: Option<&(Plan, String)>) -> Outcome<Value> {
    // Older versions trained on the first rows and held out the last, and drew from a posterior without pairs: their cells
    // are of another study.
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
        // Temperatures are fitted on what a LoRA was not trained on.
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
        // The bundled model is small and starts from little: it wants higher rates.
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
    /// The most that a method of the grid puts before a row.
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
        // All methods of a grid see the same rows, whatever room one of them wants.
        let longest = config.max_length();
        let length = text_length(args.max_length, longest, self.virtual_tokens);
        let encoder = TextEncoder::new(tokenizer, length, longest)?;
        let (_, dev) = splits.dev.first().ok_or_else(|| format!("{task}: there is no development set"))?;
        // Of the training rows each seed has its own; all cells are measured on the same.
        let train = encoder.encode(&splits.train)?;
        let dev = encoder.encode(dev)?;
        let limit = args.limit_dev.unwrap_or(dev.len());
        let measured = split::stratified(&split::strata(&dev), limit, Noise::new(0), Draw::Measured);
        Ok(Rows { task, train, dev: split::at(&dev, &measured) })
    }

    fn splits(&self, task: Task) -> Outcome<Splits> {
        match (&self.args.data, &self.args.model) {
            (Some(dir), _) => Ok(task.load_folder(dir)?),
            (None, None) if task == Task::Sst2 => Ok(task.load_folder(Path::new(&common::asset("sst2")?))?),
            (None, _) => common::download::hub_splits(task),
        }
    }
}
