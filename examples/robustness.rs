//! How much do results depend on hyperparameters? The paper's grid, method by method, and its report.
//!
//! `cargo run --release --example robustness -- --quick`: the bundled model on the bundled SST-2
//! excerpt, a small grid. Without `--quick` the paper's nine settings.
//!
//! `cargo run --release --example robustness -- --model DIR_OR_HUB_ID --tasks mrpc,rte --data DIR
//! --methods lora,monteclora,monteclora:n=64 --lrs 3e-4,5e-5,1e-5 --batch-sizes 8,32,64 --epochs 3
//! --seeds 1,2,3 --output OUT`: any model, any task. A run that is killed goes on where it stopped;
//! `--shard 2/4`, or a SLURM job array, takes a part of the cells.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use clap::Parser;
use common::options::text_length;
use common::Outcome;
use monteclora::data::encode::{Encoded, TextEncoder};
use monteclora::data::task::{Splits, Task};
use monteclora::models::hub::ModelFiles;
use monteclora::models::sequence::SequenceConfig;
use monteclora::peft::AdapterFile;
use monteclora::study::recipe::Recipe;
use monteclora::study::{self, CellKey, Grid, PerTask, Progress, Shard, Trial};
use monteclora::train;
use serde_json::{json, Value};

#[derive(Parser)]
struct Args {
    /// A model folder, or a hub repository. Default: the bundled model.
    #[arg(long)]
    model: Option<String>,
    /// mrpc, cola, rte, wic, boolq, sst2, qnli, qqp, mnli or stsb, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "sst2")]
    tasks: Vec<Task>,
    /// A folder with the tasks in the GLUE or SuperGLUE download layout. Default: the hub's files.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Recipes separated by commas: a name (full, lora, rslora, loraplus, lora-fa, ivon, dora, adalora, ia3, bottleneck,
    /// prompt, blob, monteclora, monteclora-sparse, monteclora-posthoc, monteclora-released) and options, as in
    /// monteclora:n=64:eps=1e-2. monteclora-posthoc:adapter=DIR starts from a LoRA adapter of
    /// the task that was made elsewhere; no colon or comma in DIR.
    #[arg(long, value_delimiter = ',')]
    methods: Option<Vec<String>>,
    /// Learning rates. Default: the paper's, or for the bundled model 2e-3,5e-4,1e-4.
    #[arg(long, value_delimiter = ',')]
    lrs: Option<Vec<f64>>,
    #[arg(long, value_delimiter = ',')]
    batch_sizes: Option<Vec<usize>>,
    #[arg(long, value_delimiter = ',', default_value = "1")]
    seeds: Vec<u64>,
    #[arg(long, default_value_t = 1)]
    epochs: usize,
    #[arg(long, default_value_t = 128)]
    max_length: usize,
    /// Train on the first rows only: a number, or one for each of some tasks, or both, as in
    /// 1000,sst2=4000.
    #[arg(long, default_value = "", hide_default_value = true)]
    limit_train: PerTask<usize>,
    /// Measure on the first rows only.
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
    /// Run a part of the cells, i/n. Default: the whole, or this member of a SLURM job array.
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
}

fn main() -> std::process::ExitCode {
    common::exit(run())
}

fn run() -> Outcome {
    common::tune_allocator();
    let mut args = Args::parse();
    if args.quick {
        args.epochs = 1;
    }
    if !args.report_only {
        run_cells(&args)?;
    }
    if args.pack {
        study::pack(&args.output)?;
    }
    study::write_report(&args.output, &args.output)?;
    #[cfg(feature = "plot")]
    study::plot::write_plots(&study::read_cells(&args.output)?, &args.output.join("plots"))?;
    println!("{}", std::fs::read_to_string(args.output.join("report.md"))?);
    Ok(())
}

fn run_cells(args: &Args) -> Outcome {
    let device = common::device(&args.device)?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => common::asset("tiny-roberta")?,
    };
    let files = common::download::model_files(&model)?;
    let grid = grid(args);
    let recipes = grid.methods.iter().map(|text| text.parse::<Recipe>());
    let recipes: Vec<Recipe> = recipes.collect::<monteclora::Result<_>>()?;
    let adapters = adapters(&recipes)?;
    if !adapters.is_empty() && grid.tasks.len() > 1 {
        return Err("--methods: an adapter made elsewhere is of one task: give one in --tasks".into());
    }
    let virtual_tokens = recipes.iter().map(|recipe| recipe.method.virtual_tokens()).max().unwrap_or(0);
    let data = Data { args, files: &files, virtual_tokens };
    let mut tasks = BTreeMap::new();
    for task in &args.tasks {
        tasks.insert(task.name(), data.load(*task)?);
    }
    let mut foreign = BTreeMap::new();
    for (_, task) in args.foreign_task.entries() {
        foreign.insert(task.name(), data.load(*task)?.dev);
    }

    let cells = grid.cells()?;
    let shard = match args.shard {
        Some(shard) => shard,
        None => Shard::from_slurm(|name| std::env::var(name).ok())?,
    };
    let mut cell = |key: &CellKey| {
        let rows = &tasks[key.task.as_str()];
        // A task is not foreign to itself.
        let other = args.foreign_task.get(rows.task).filter(|other| **other != rows.task);
        let foreign = other.map(|other| &foreign[other.name()]);
        let trial = Trial {
            files: &files,
            task: rows.task,
            train: &rows.train,
            held_out: &rows.held_out,
            dev: &rows.dev,
            foreign: foreign.map_or(&[], Vec::as_slice),
            epochs: args.epochs,
            draws: args.draws,
            device: &device,
        };
        common::reset_peak_memory();
        trial.run(key)
    };
    study::run(&args.output, &settings(args, &model, &adapters), &cells, shard, &mut cell, &mut say)?;
    Ok(())
}

/// The adapters made elsewhere that recipes start from, by their folders, with a checksum of their
/// tensors: read before any cell is run, and cells of others are no part of the same study.
fn adapters(recipes: &[Recipe]) -> Outcome<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for dir in recipes.iter().filter_map(|recipe| recipe.adapter.as_ref()) {
        let file = AdapterFile::read(dir)?;
        let mut numbers = Vec::new();
        for tensor in
            file.layers.values().flat_map(|layer| [&layer.a, &layer.b]).chain(file.saved_modules.values())
        {
            let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            numbers.extend(values.into_iter().map(f32::to_bits));
        }
        found.insert(dir.display().to_string(), train::fingerprint(numbers));
    }
    Ok(found)
}

/// What all cells depend on beside their own keys.
fn settings(args: &Args, model: &str, adapters: &BTreeMap<String, String>) -> Value {
    let model = Path::new(model).file_name().map_or(model.into(), |name| name.to_string_lossy());
    let of = |task: &Option<Task>| task.map(Task::name).unwrap_or_default();
    let limits: Vec<_> = args.limit_train.entries().iter().map(|(task, rows)| (of(task), rows)).collect();
    let foreign = args.foreign_task.entries().iter().map(|(task, other)| (of(task), other.name()));
    let mut settings = json!({
        "model": model, "epochs": args.epochs, "max_length": args.max_length,
        "limit_train": limits, "limit_dev": args.limit_dev, "draws": args.draws,
        "foreign_task": foreign.collect::<Vec<_>>(), "version": env!("CARGO_PKG_VERSION"),
    });
    if !adapters.is_empty() {
        settings["adapters"] = json!(adapters);
    }
    settings
}

fn grid(args: &Args) -> Grid {
    let methods = match (&args.methods, args.quick) {
        (Some(methods), _) => methods.clone(),
        (None, true) => ["lora", "full", "monteclora"].map(String::from).to_vec(),
        (None, false) => study::recipe::NAMES.map(String::from).to_vec(),
    };
    let tasks = args.tasks.iter().map(ToString::to_string).collect();
    let mut grid = Grid { seeds: args.seeds.clone(), ..Grid::paper(tasks, methods) };
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
    eprintln!("{done} of {total} cells done, {failed} failed{left}{next}");
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
    held_out: Vec<Encoded>,
    dev: Vec<Encoded>,
}

impl Data<'_> {
    fn load(&self, task: Task) -> Outcome<Rows> {
        let args = self.args;
        let splits = self.splits(task)?;
        let config = SequenceConfig::from_file(self.files.config_path(), task.num_labels())?;
        let tokenizer = common::tokenizer(self.files, config.vocab_size())?;
        // All methods of a grid see the same rows, whatever room one of them wants.
        let longest = config.max_length();
        let length = text_length(args.max_length, longest, self.virtual_tokens);
        let encoder = TextEncoder::new(tokenizer, length, longest)?;
        let first = |rows: usize, limit: Option<usize>| rows.min(limit.unwrap_or(rows));
        let (_, dev) = splits.dev.first().ok_or_else(|| format!("{task}: there is no development set"))?;
        // One training row in twenty is held out, to fit temperatures and prior precisions on.
        let used = first(splits.train.len(), args.limit_train.get(task).copied());
        let mut train = encoder.encode(&splits.train[..used])?;
        let held_out = train.split_off(used - used / 20);
        let dev = encoder.encode(&dev[..first(dev.len(), args.limit_dev)])?;
        Ok(Rows { task, train, held_out, dev })
    }

    fn splits(&self, task: Task) -> Outcome<Splits> {
        match (&self.args.data, &self.args.model) {
            (Some(dir), _) => Ok(task.load_folder(dir)?),
            (None, None) if task == Task::Sst2 => Ok(task.load_folder(Path::new(&common::asset("sst2")?))?),
            (None, _) => common::download::hub_splits(task),
        }
    }
}
