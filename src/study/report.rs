//! The report of a study, from its result files alone: `report.md`, `report.csv`, `cells.csv`, and
//! apart from them, since it differs from run to run, `costs.md`.
//!
//! Statistics are over the cells that are done. A cell that diverged or failed has no score: it is
//! counted in its row, and never dropped without a word.

mod calibration;
mod claim;
mod pairs;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use super::cell::{CellCost, CellKey, CellResult, Status};
use super::stats::{median, quantile};
use super::store::{read_cells, settings_path};
use crate::error::{Error, Result};
use crate::util::files;

/// The method whose mean prediction the others are tested against: by this name or, where a grid has
/// none, the first that begins with it.
const TESTED: &str = "monteclora";
/// The method that it is tested against above all, and that costs are relative to: by this name or, where
/// a grid has none, the first with options of its own.
const BASELINE: &str = "lora";

/// The prediction that every method has: of the parameters, or of the posterior's mean.
const MEAN: &str = "mean";

/// A method and a way to predict with it.
type Arm = (String, String);

/// The cells of one arm on one task.
#[derive(Debug, Default)]
struct Row {
    metric: String,
    scores: Vec<f64>,
    nll: Vec<f64>,
    ece: Vec<f64>,
    brier: Vec<f64>,
    done: usize,
    diverged: usize,
    failed: usize,
}

/// Writes the report of the results below `results` into the folder `out`: the same bytes for the same
/// results, except in `costs.md`.
///
/// # Errors
/// If a result cannot be read, or a file cannot be written.
pub fn write_report(results: &Path, out: &Path) -> Result<()> {
    let stored = read_cells(results)?.into_iter();
    let (cells, costs): (Vec<CellResult>, Vec<_>) = stored.map(|cell| (cell.result, cell.cost)).unzip();
    std::fs::create_dir_all(out).map_err(Error::io(out))?;
    let settings = std::fs::read_to_string(settings_path(results)).unwrap_or_default();
    files::write(&out.join("report.md"), markdown(&cells, &settings).as_bytes())?;
    files::write(&out.join("report.csv"), rows_csv(&rows(&cells)).as_bytes())?;
    files::write(&out.join("cells.csv"), cells_csv(&cells).as_bytes())?;
    let done = cells.iter().zip(costs).filter(|(cell, _)| cell.status == Status::Done);
    let costs: Vec<(&CellKey, CellCost)> = done.filter_map(|(cell, cost)| Some((&cell.key, cost?))).collect();
    files::write(&out.join("costs.md"), costs_markdown(&costs).as_bytes())
}

/// The arms of each task. That of a method that has no done cell on a task is its mean.
fn arms(cells: &[CellResult]) -> BTreeSet<(String, Arm)> {
    let of_cell = |cell: &CellResult| {
        let CellKey { task, method, .. } = cell.key.clone();
        let arms = cell.arms.keys().cloned().chain([MEAN.to_string()]);
        arms.map(|arm| (task.clone(), (method.clone(), arm))).collect::<Vec<_>>()
    };
    cells.iter().flat_map(of_cell).collect()
}

/// By task and arm.
fn rows(cells: &[CellResult]) -> BTreeMap<(String, Arm), Row> {
    let mut rows: BTreeMap<(String, Arm), Row> =
        arms(cells).into_iter().map(|key| (key, Row::default())).collect();
    for ((task, (method, arm)), row) in &mut rows {
        for cell in cells.iter().filter(|cell| cell.key.task == *task && cell.key.method == *method) {
            row.add(cell, arm);
        }
    }
    rows
}

impl Row {
    fn add(&mut self, cell: &CellResult, arm: &str) {
        self.metric.clone_from(&cell.metric);
        match cell.status {
            Status::Done => self.done += 1,
            Status::Diverged => self.diverged += 1,
            Status::Failed => self.failed += 1,
        }
        let metrics = cell.arms.get(arm).filter(|_| cell.status == Status::Done);
        let Some(metrics) = metrics else { return };
        self.scores.extend(metrics.get(&cell.metric));
        self.nll.extend(metrics.nll);
        self.ece.extend(metrics.ece);
        self.brier.extend(metrics.brier);
    }

    fn best(&self) -> f64 {
        quantile(&self.scores, 1.0)
    }

    fn quartile_range(&self) -> f64 {
        quantile(&self.scores, 0.75) - quantile(&self.scores, 0.25)
    }

    /// Best, median (the paper's extrinsic robustness), spread, inter-quartile range, intrinsic
    /// robustness (1 / median NLL), and the medians of NLL, ECE and Brier.
    fn figures(&self) -> [f64; 8] {
        let nll = median(&self.nll);
        [
            self.best(),
            median(&self.scores),
            pairs::spread(&self.scores),
            self.quartile_range(),
            nll.recip(),
            nll,
            median(&self.ece),
            median(&self.brier),
        ]
    }
}

const FIGURES: [&str; 8] = ["best", "median", "spread", "IQR", "1/NLL", "NLL", "ECE", "Brier"];

fn markdown(cells: &[CellResult], settings: &str) -> String {
    let rows = rows(cells);
    let mut text = String::from("# Robustness report\n");
    if !settings.is_empty() {
        write!(text, "\n```json\n{}\n```\n", settings.trim_end()).ok();
    }
    text.push_str(
        "\nOver the cells of each row: best, median (extrinsic robustness), spread (best - worst) and \
         inter-quartile range of the task's metric; 1 / median NLL (intrinsic robustness); medians of NLL, \
         ECE (15 bins) and Brier score. Cells that diverged or failed are counted, and have no score.\n",
    );
    let tasks: BTreeSet<&String> = rows.keys().map(|(task, _)| task).collect();
    for task in &tasks {
        let of_task = rows.iter().filter(|((other, _), _)| other == *task);
        let metric = of_task.clone().next().map(|(_, row)| row.metric.as_str()).unwrap_or_default();
        write!(
            text,
            "\n## {task} ({metric})\n\n| method | {} | done | diverged | failed |\n",
            FIGURES.join(" | ")
        )
        .ok();
        text.push_str(&format!("|---|{}\n", "---|".repeat(FIGURES.len() + 3)));
        for ((_, arm), row) in of_task {
            let figures = row.figures().map(number).join(" | ");
            writeln!(
                text,
                "| {} | {figures} | {} | {} | {} |",
                name(arm),
                row.done,
                row.diverged,
                row.failed
            )
            .ok();
        }
    }
    if tasks.len() > 1 {
        text.push_str(&overall(&rows, tasks.len()));
    }
    if let Some(tested) = tested(cells) {
        if let Some(baseline) = baseline(cells.iter().map(|cell| &cell.key)) {
            let baseline = (baseline, MEAN.to_string());
            text.push_str(&claim::claim(cells, &tested, &baseline));
            text.push_str(&calibration::calibration(cells, &tested, &baseline));
        }
        text.push_str(&pairs::signed_ranks(cells, &tested));
    }
    text.push_str(&foreign(cells));
    text
}

/// The means over tasks of what a row says, for the arms that every task has.
fn overall(rows: &BTreeMap<(String, Arm), Row>, tasks: usize) -> String {
    let mut text = format!("\n## Mean over {tasks} tasks\n\n| method | {} |\n", FIGURES.join(" | "));
    text.push_str(&format!("|---|{}\n", "---|".repeat(FIGURES.len())));
    let mut sums: BTreeMap<&Arm, Vec<[f64; 8]>> = BTreeMap::new();
    for ((_, arm), row) in rows {
        sums.entry(arm).or_default().push(row.figures());
    }
    for (arm, figures) in sums.into_iter().filter(|(_, figures)| figures.len() == tasks) {
        let mean = |i: usize| figures.iter().map(|figures| figures[i]).sum::<f64>() / tasks as f64;
        let means: Vec<String> = (0..FIGURES.len()).map(|i| number(mean(i))).collect();
        writeln!(text, "| {} | {} |", name(arm), means.join(" | ")).ok();
    }
    text
}

/// The arm that is tested against the others, if the grid has one.
fn tested(cells: &[CellResult]) -> Option<Arm> {
    let mut methods: Vec<&String> = cells.iter().map(|cell| &cell.key.method).collect();
    methods.sort();
    let first = methods.iter().find(|method| method.starts_with(TESTED));
    let method = methods.iter().find(|method| **method == TESTED).or(first)?;
    Some((method.to_string(), MEAN.to_string()))
}

/// The method that others are compared with, if there is one.
fn baseline<'a>(keys: impl Iterator<Item = &'a CellKey>) -> Option<String> {
    let mut methods: Vec<&String> = keys.map(|key| &key.method).collect();
    methods.sort(); // without options it comes first
    let plain = |method: &str| method.split(':').next() == Some(BASELINE);
    methods.into_iter().find(|method| plain(method)).cloned()
}

/// How well rows of another task are told from those of a task.
fn foreign(cells: &[CellResult]) -> String {
    let mut found: BTreeMap<(&str, &str, &str), Vec<f64>> = BTreeMap::new();
    for cell in cells {
        for (score, auroc) in &cell.ood {
            found.entry((&cell.key.task, &cell.key.method, score)).or_default().push(*auroc);
        }
    }
    if found.is_empty() {
        return String::new();
    }
    let mut text = String::from(
        "\n## Out of domain\n\nAUROC of telling the foreign task's rows by their uncertainty: median over \
         cells.\n\n| task | method | score | AUROC |\n|---|---|---|---|\n",
    );
    for ((task, method, score), values) in found {
        writeln!(text, "| {task} | {method} | {score} | {} |", number(median(&values))).ok();
    }
    text
}

fn rows_csv(rows: &BTreeMap<(String, Arm), Row>) -> String {
    let mut text = format!("task,method,arm,metric,{},done,diverged,failed\n", FIGURES.join(","));
    for ((task, (method, arm)), row) in rows {
        let figures = row.figures().map(|figure| figure.to_string()).join(",");
        let Row { metric, done, diverged, failed, .. } = row;
        let (task, method, arm) = (field(task), field(method), field(arm));
        writeln!(text, "{task},{method},{arm},{metric},{figures},{done},{diverged},{failed}").ok();
    }
    text
}

fn cells_csv(cells: &[CellResult]) -> String {
    let mut text = String::from("task,method,lr,batch_size,seed,status,arm,metric,value,nll,ece,brier\n");
    let cell = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    for CellResult { key, status, metric, arms, .. } in cells {
        let CellKey { task, method, lr, batch_size, seed } = key;
        let (task, method) = (field(task), field(method));
        let status = format!("{status:?}").to_lowercase();
        let start = format!("{task},{method},{lr},{batch_size},{seed},{status}");
        if arms.is_empty() {
            writeln!(text, "{start},,{metric},,,,").ok();
        }
        for (arm, m) in arms {
            let scores = [m.get(metric), m.nll, m.ece, m.brier].map(cell).join(",");
            writeln!(text, "{start},{},{metric},{scores}", field(arm)).ok();
        }
    }
    text
}

/// A field of a CSV file: in quotes where it holds a comma, as a recipe may.
fn field(text: &str) -> String {
    match text.contains([',', '"', '\n']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_string(),
    }
}

/// Times of a step and of training, and memory, as multiples of LoRA's in the cell with the same settings.
fn costs_markdown(costs: &[(&CellKey, CellCost)]) -> String {
    let name = baseline(costs.iter().map(|(key, _)| *key)).unwrap_or_else(|| BASELINE.to_string());
    let baseline: BTreeMap<String, &CellCost> = costs
        .iter()
        .filter(|(key, _)| key.method == name)
        .map(|(key, cost)| (settings_of(key), cost))
        .collect();
    let mut found: BTreeMap<&str, [Vec<f64>; 3]> = BTreeMap::new();
    for (key, cost) in costs {
        let [times, training, memory] = found.entry(&key.method).or_default();
        let Some(base) = baseline.get(&settings_of(key)) else { continue };
        times.push(cost.step_seconds_median / base.step_seconds_median);
        training.push(cost.seconds / base.seconds);
        memory.extend(cost.peak_rss_mb.zip(base.peak_rss_mb).map(|(own, base)| own / base));
    }
    let mut text = format!(
        "# Costs\n\nMultiples of {name} in the cell with the same settings, medians. They differ from run \
         to run, as a shared machine does.\n\n| method | cells | step | training | peak memory |\n|---|---|---|---|---|\n"
    );
    for (method, columns) in found {
        let medians = columns.each_ref().map(|values| number(median(values))).join(" | ");
        writeln!(text, "| {method} | {} | {medians} |", columns[0].len()).ok();
    }
    text
}

/// A cell but for its method.
fn settings_of(key: &CellKey) -> String {
    CellKey { method: String::new(), ..key.clone() }.folder_name()
}

fn name((method, arm): &Arm) -> String {
    format!("{method} ({arm})")
}

fn number(value: f64) -> String {
    match value.is_nan() {
        true => "-".to_string(),
        false => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests;
