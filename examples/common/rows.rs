//! The rows of a classifier: a task of GLUE or SuperGLUE, or tables of one's own.

use std::path::{Path, PathBuf};

use monteclora::data::split::{at, stratified, Draw};
use monteclora::data::table::{Columns, DataSet, ProblemType, Target};
use monteclora::data::task::{Label, Splits, Task};
use monteclora::metrics::Metrics;
use monteclora::{Labels, Noise};
use serde::{Deserialize, Serialize};

use super::Outcome;

// Tables of one's own: CSV, TSV, JSON lines or parquet.
#[derive(clap::Args, Clone)]
pub struct TableOptions {
    /// A table to train on: .csv, .tsv, .jsonl, .json or .parquet, with a header or names.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["task", "data"])]
    pub train: Option<PathBuf>,
    /// A table to measure on. Default: a part of the rows of --train.
    #[arg(long, value_name = "FILE", requires = "train")]
    pub dev: Option<PathBuf>,
    /// The share of --train that is measured on where there is no --dev, drawn by the seed, classes in their
    /// proportions.
    #[arg(long, default_value_t = 0.2)]
    pub dev_share: f64,
    /// The column of the text. Default: text.
    #[arg(long)]
    pub text_column: Option<String>,
    /// The column of the second text, where rows are pairs.
    #[arg(long)]
    pub text_pair_column: Option<String>,
    /// The column of the label. Default: label; with --predict none, and if given its labels are compared.
    #[arg(long)]
    pub label_column: Option<String>,
    /// classification or regression. Default: numbers with fractions are scores, all else is classes.
    #[arg(long)]
    pub problem_type: Option<String>,
    /// What the best step is chosen by: accuracy, f1, macro_f1, weighted_f1, matthews, nll, ece or brier; of a regression
    /// pearson, spearman or mse. Default: accuracy, of a regression pearson, of GLUE the task's own.
    #[arg(long)]
    pub metric: Option<String>,
}

/// How the rows of a run were read: what a prediction needs to read others alike.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Input {
    /// The columns of the run's tables; those of GLUE are its own.
    pub columns: Option<Columns>,
    /// The most tokens of a text.
    pub max_length: usize,
}

impl Input {
    /// The file in a run's folder.
    pub const FILE: &str = "input.json";

    /// Of the run that the folder `trained` belongs to: itself, or its `adapter/` or `model/`.
    pub fn find(trained: &Path) -> Outcome<Option<Self>> {
        let whole = trained.canonicalize().unwrap_or_else(|_| trained.to_owned());
        for folder in [Some(&*whole), whole.parent()].into_iter().flatten() {
            let path = folder.join(Self::FILE);
            if path.is_file() {
                let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
                return Ok(Some(
                    serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?,
                ));
            }
        }
        Ok(None)
    }
}

impl TableOptions {
    /// The columns of a table to train on.
    pub fn columns(&self) -> Columns {
        let defaults = Columns::default();
        Columns {
            text: self.text_column.clone().unwrap_or(defaults.text),
            text_pair: self.text_pair_column.clone(),
            label: self.label_column.clone().or(defaults.label),
        }
    }
}

/// What is trained for.
pub struct Goal {
    /// What it is called in `metrics.json`.
    pub name: String,
    /// The classes, or the one output of a regression.
    pub labels: Labels,
    /// The metric that picks the best step.
    pub metric: String,
    /// The columns of tables of one's own.
    pub columns: Option<Columns>,
}

impl Goal {
    /// A task of a benchmark.
    pub fn of_task(task: Task, options: &TableOptions) -> Outcome<Self> {
        let metric = metric(options, task.primary_metric(), task.num_labels())?;
        Ok(Self { name: task.name().into(), labels: task.into(), metric, columns: None })
    }

    /// The rows of the table `train`, and how many labels of each class there are, a line each.
    pub fn of_tables(
        options: &TableOptions,
        train: &Path,
        limit: Option<usize>,
        noise: Noise,
    ) -> Outcome<(Self, Splits, Vec<String>)> {
        let problem = options.problem_type.as_deref().map(str::parse::<ProblemType>).transpose()?;
        let data = DataSet::read(train, &options.columns(), problem)?;
        let mut data = match &options.dev {
            Some(dev) => data.with_dev(dev)?,
            None => data.hold_out(options.dev_share, noise)?,
        };
        if let Some(limit) = limit {
            // The first rows of a sorted file are of one class.
            let strata =
                data.train.iter().map(|row| if let Label::Class(class) = row.label { class } else { 0 });
            let kept = stratified(&strata.collect::<Vec<_>>(), limit, noise, Draw::Training);
            data.train = at(&data.train, &kept);
        }
        let labels = Labels::from(&data.target);
        let default = if data.target == Target::Score { "pearson" } else { "accuracy" };
        let name = train.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let metric = metric(options, default, labels.len())?;
        let goal = Self { name, labels, metric, columns: Some(data.columns.clone()) };
        let mut counts = vec![format!("{:<24} {:>8} {:>8}", "label", "train", "dev")];
        counts.extend(data.counts().iter().map(|c| format!("{:<24} {:>8} {:>8}", c.name, c.train, c.dev)));
        counts.push(format!("{:<24} {:>8} {:>8}", "all rows", data.train.len(), data.dev.len()));
        Ok((goal, Splits { train: data.train, dev: vec![("dev".into(), data.dev)] }, counts))
    }
}

/// `--metric` or the default, if such a task has it.
fn metric(options: &TableOptions, default: &str, outputs: usize) -> Outcome<String> {
    let Some(metric) = &options.metric else { return Ok(default.to_string()) };
    let known = Metrics::names(outputs);
    match known.contains(&metric.as_str()) {
        true => Ok(metric.clone()),
        false => Err(format!("--metric: expected one of {}, got {metric}", known.join(", ")).into()),
    }
}
