//! The rows of a classifier: a GLUE or SuperGLUE task, or your own tables.

use std::path::{Path, PathBuf};

use monteclora::data::encode::Encoded;
use monteclora::data::split::{at, stratified, Subset};
use monteclora::data::table::{Columns, DataSet, ProblemType, Target};
use monteclora::data::task::{Label, Splits, Task};
use monteclora::metrics::Metrics;
use monteclora::{Labels, Noise};
use serde::{Deserialize, Serialize};

use crate::common::output::tell_err;
use crate::common::Outcome;

/// The name of the rows that are measured at the end alone.
pub const TEST: &str = "test";

// Your own tables: CSV, TSV, JSON lines or parquet.
#[derive(clap::Args, Clone)]
pub struct TableOptions {
    /// A table to train on: .csv, .tsv, .jsonl, .json or .parquet, with a header or field names.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["task", "data"])]
    pub train: Option<PathBuf>,
    /// A table to measure on. Default: a part of the rows of --train.
    #[arg(long, value_name = "FILE", requires = "train")]
    pub dev: Option<PathBuf>,
    /// A table to measure on at the end alone: rows that have chosen neither the best step nor anything else.
    #[arg(long, value_name = "FILE", requires = "train")]
    pub test: Option<PathBuf>,
    /// The share of --train to measure on without --dev, drawn by the seed and stratified by class.
    #[arg(long, default_value_t = 0.2)]
    pub dev_share: f64,
    /// The text column. Default: text.
    #[arg(long)]
    pub text_column: Option<String>,
    /// The column of the second text, if rows are pairs.
    #[arg(long)]
    pub text_pair_column: Option<String>,
    /// The label column. Default: label; with --predict none, and if given, predictions are compared with it.
    #[arg(long)]
    pub label_column: Option<String>,
    /// classification or regression. Default: regression if labels have fractions, else classification.
    #[arg(long)]
    pub problem_type: Option<String>,
    /// The metric that picks the best step: accuracy, f1 (of two classes, that of --positive-class), macro_f1,
    /// weighted_f1, matthews, nll, ece or brier; for regression pearson, spearman or mse. Default: accuracy; for
    /// regression pearson; for GLUE the task's own.
    #[arg(long)]
    pub metric: Option<String>,
    /// The class that f1 is measured of, if there are two. Default: the second, in numerical or alphabetical order
    /// or that of the task.
    #[arg(long, value_name = "NAME")]
    pub positive_class: Option<String>,
}

/// How the rows of a run were read, so that a prediction reads its rows in the same way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Input {
    /// The columns of the run's tables; `None` for a benchmark's task.
    pub columns: Option<Columns>,
    /// The maximum number of tokens in a text.
    pub max_length: usize,
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

/// The training goal.
pub struct Goal {
    /// The name in `metrics.json`.
    pub name: String,
    /// The classes, or the single output of a regression.
    pub labels: Labels,
    /// The metric that picks the best step.
    pub metric: String,
    /// The columns, if the rows are from your own tables.
    pub columns: Option<Columns>,
}

impl Goal {
    /// The goal of a benchmark's task.
    pub fn of_task(task: Task, options: &TableOptions) -> Outcome<Self> {
        let metric = metric(options, task.primary_metric(), task.num_labels())?;
        Ok(Self { name: task.name().into(), labels: task.into(), metric, columns: None })
    }

    /// Reads the table `train`; returns its goal, its rows, and a line with the row counts for each class.
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
            // Stratified, because the first rows of a sorted file have one class.
            let strata =
                data.train.iter().map(|row| if let Label::Class(class) = row.label { class } else { 0 });
            let kept = stratified(&strata.collect::<Vec<_>>(), limit, noise, Subset::Training);
            data.train = at(&data.train, &kept);
        }
        let test = options.test.as_ref().map(|test| data.read_labelled(test)).transpose()?;
        let labels = Labels::from(&data.target);
        let default = if data.target == Target::Score { "pearson" } else { "accuracy" };
        let name = train.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let metric = metric(options, default, labels.len())?;
        let goal = Self { name, labels, metric, columns: Some(data.columns.clone()) };
        let mut counts = vec![format!("{:<24} {:>8} {:>8}", "label", "train", "dev")];
        counts.extend(data.counts().iter().map(|c| format!("{:<24} {:>8} {:>8}", c.name, c.train, c.dev)));
        counts.push(format!("{:<24} {:>8} {:>8}", "all rows", data.train.len(), data.dev.len()));
        let test = test.map(|rows| (TEST.to_string(), rows));
        let dev = [("dev".to_string(), data.dev)].into_iter().chain(test).collect();
        Ok((goal, Splits { train: data.train, dev }, counts))
    }
}

/// Reports how many rows may have been cut.
pub fn tell_cut(name: &str, rows: &[Encoded], length: usize) {
    let full = rows.iter().filter(|row| row.ids.len() >= length).count();
    if full > 0 {
        let total = rows.len();
        tell_err!(
            "--max-length {length}: {full} of {total} {name} rows have this length or were truncated to it"
        );
    }
}

/// Returns `--metric`, checked against the number of outputs, or the default.
fn metric(options: &TableOptions, default: &str, outputs: usize) -> Outcome<String> {
    let Some(metric) = &options.metric else { return Ok(default.to_string()) };
    let known = Metrics::names(outputs);
    match known.contains(&metric.as_str()) {
        true => Ok(metric.clone()),
        false => Err(format!("--metric: expected one of {}, got {metric}", known.join(", ")).into()),
    }
}
