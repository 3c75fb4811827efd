//! The report of a study, from its result files alone: `report.md`, `report.csv`, `cells.csv`, and
//! apart from them, since it differs from run to run, `costs.md`.
//!
//! Statistics are over the cells that are done. A cell that diverged or failed has no score: it is
//! counted in its row, and never dropped without a word.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use super::cell::{read_all, CellCost, CellKey, CellResult, Status};
use super::run::settings_path;
use super::stats::{median, quantile, wilcoxon};
use crate::error::{Error, Result};
use crate::files;
use crate::metrics::Metrics;

/// The method whose mean prediction the others are tested against: by this name or, where a grid has
/// none, the first that begins with it.
const TESTED: &str = "monteclora";
/// The method that costs are relative to.
const BASELINE: &str = "lora";

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
    let cells = read_all(results)?;
    std::fs::create_dir_all(out).map_err(Error::io(out))?;
    let settings = std::fs::read_to_string(settings_path(results)).unwrap_or_default();
    files::write(&out.join("report.md"), markdown(&cells, &settings).as_bytes())?;
    files::write(&out.join("report.csv"), rows_csv(&rows(&cells)).as_bytes())?;
    files::write(&out.join("cells.csv"), cells_csv(&cells).as_bytes())?;
    let costs: Vec<(CellKey, CellCost)> = cells
        .iter()
        .filter(|cell| cell.status == Status::Done)
        .filter_map(|cell| Some((cell.key.clone(), CellCost::read(results, &cell.key).transpose()?)))
        .map(|(key, cost)| Ok((key, cost?)))
        .collect::<Result<_>>()?;
    files::write(&out.join("costs.md"), costs_markdown(&costs).as_bytes())
}

/// By task and arm. An arm of a method that has no done cell on a task is its `mean`.
fn rows(cells: &[CellResult]) -> BTreeMap<(String, Arm), Row> {
    let mut arms: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for cell in cells {
        let of_method = arms.entry((&cell.key.task, &cell.key.method)).or_default();
        of_method.extend(cell.arms.keys().map(String::as_str));
        of_method.insert("mean");
    }
    let mut rows: BTreeMap<(String, Arm), Row> = BTreeMap::new();
    for cell in cells {
        let CellKey { task, method, .. } = &cell.key;
        for arm in &arms[&(task.as_str(), method.as_str())] {
            let row = rows.entry((task.clone(), (method.clone(), arm.to_string()))).or_default();
            row.metric.clone_from(&cell.metric);
            match cell.status {
                Status::Done => row.done += 1,
                Status::Diverged => row.diverged += 1,
                Status::Failed => row.failed += 1,
            }
            let metrics = cell.arms.get(*arm).filter(|_| cell.status == Status::Done);
            let Some(metrics) = metrics else { continue };
            row.scores.extend(metrics.get(&cell.metric));
            row.nll.extend(metrics.nll);
            row.ece.extend(metrics.ece);
            row.brier.extend(metrics.brier);
        }
    }
    rows
}

impl Row {
    fn best(&self) -> f64 {
        quantile(&self.scores, 1.0)
    }

    fn spread(&self) -> f64 {
        self.best() - quantile(&self.scores, 0.0)
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
            self.spread(),
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
        text.push_str(&claim(cells, &rows, &tested));
        text.push_str(&signed_ranks(cells, &rows, &tested));
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
    Some((method.to_string(), "mean".to_string()))
}

/// Whether the paper's claim holds: a smaller spread than LoRA's at no lower median.
fn claim(cells: &[CellResult], rows: &BTreeMap<(String, Arm), Row>, tested: &Arm) -> String {
    let baseline: Arm = (BASELINE.to_string(), "mean".to_string());
    let (mut table, mut holds, mut tasks) = (String::new(), 0, 0);
    for ((task, _), own) in rows.iter().filter(|((_, arm), _)| arm == tested) {
        let Some(other) = rows.get(&(task.clone(), baseline.clone())) else { continue };
        let (medians, spreads) =
            ([median(&own.scores), median(&other.scores)], [own.spread(), other.spread()]);
        let does = spreads[0] < spreads[1] && medians[0] >= medians[1];
        holds += usize::from(does);
        tasks += 1;
        let figures = [spreads, medians].concat().into_iter().map(number).collect::<Vec<_>>().join(" | ");
        writeln!(table, "| {task} | {figures} | {} |", if does { "yes" } else { "no" }).ok();
    }
    if tasks == 0 {
        return String::new();
    }
    let (own, other) = (name(tested), name(&baseline));
    let metric = over_cells(cells, tested, &baseline, &|cell, metrics| metrics.get(&cell.metric));
    let nll = over_cells(cells, tested, &baseline, &|_, metrics| metrics.nll);
    format!(
        "\n## The paper's claim\n\n{own} has a smaller spread than {other} at no lower median on {holds} of \
         {tasks} tasks. Over cells with the same settings, metric: {}; NLL: {}.\n\n| task | spread, {own} | \
         spread, {other} | median, {own} | median, {other} | holds |\n|---|---|---|---|---|---|\n{table}",
        verdict(&metric),
        verdict(&nll)
    )
}

/// Differences of two arms in the cells with the same settings.
fn over_cells(
    cells: &[CellResult],
    arm: &Arm,
    other: &Arm,
    value: &dyn Fn(&CellResult, &Metrics) -> Option<f64>,
) -> Vec<f64> {
    let of = |arm: &Arm| -> BTreeMap<String, f64> {
        let own = cells.iter().filter(|c| c.status == Status::Done && c.key.method == arm.0);
        own.filter_map(|cell| Some((settings_of(&cell.key), value(cell, cell.arms.get(&arm.1)?)?))).collect()
    };
    let theirs = of(other);
    of(arm).into_iter().filter_map(|(key, ours)| Some(ours - theirs.get(&key)?)).collect()
}

/// MonteCLoRA's mean against every other arm: over tasks, and over cells with the same settings.
fn signed_ranks(cells: &[CellResult], rows: &BTreeMap<(String, Arm), Row>, tested: &Arm) -> String {
    let others: BTreeSet<&Arm> = rows.keys().map(|(_, arm)| arm).filter(|arm| *arm != tested).collect();
    let mut text = format!(
        "\n## Wilcoxon signed-rank tests: {} against each other\n\nTwo-sided p, with the number n of \
         differences that are not zero, their median (positive: {0} is higher), and in brackets the least p \
         that n can give.\n\n| against | median over tasks | spread over tasks | metric over cells | NLL over \
         cells |\n|---|---|---|---|---|\n",
        name(tested)
    );
    for other in others {
        let over_tasks = |figure: &dyn Fn(&Row) -> f64| -> Vec<f64> {
            let of = |arm: &Arm, task: &String| rows.get(&(task.clone(), arm.clone())).map(figure);
            let tasks: BTreeSet<&String> = rows.keys().map(|(task, _)| task).collect();
            tasks.into_iter().filter_map(|task| Some(of(tested, task)? - of(other, task)?)).collect()
        };
        let columns = [
            over_tasks(&|row| median(&row.scores)),
            over_tasks(&Row::spread),
            over_cells(cells, tested, other, &|cell, metrics| metrics.get(&cell.metric)),
            over_cells(cells, tested, other, &|_, metrics| metrics.nll),
        ];
        let columns = columns.map(|differences| verdict(&differences)).join(" | ");
        writeln!(text, "| {} | {columns} |", name(other)).ok();
    }
    text
}

/// The test of those differences that are numbers: of a cell without a score, and of two infinite NLLs,
/// there is none.
fn verdict(differences: &[f64]) -> String {
    let pairs: Vec<f64> = differences.iter().copied().filter(|difference| !difference.is_nan()).collect();
    let p = |p: f64| if p < 0.001 { format!("{p:.0e}") } else { format!("{p:.3}") };
    match wilcoxon(&pairs) {
        None if pairs.is_empty() => "no pair".to_string(),
        None => format!("{} equal pairs", pairs.len()),
        Some(test) => {
            format!("p {}, n {}, {:+.4} ({})", p(test.p), test.n, median(&pairs), p(test.least_p()))
        }
    }
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
fn costs_markdown(costs: &[(CellKey, CellCost)]) -> String {
    let baseline: BTreeMap<String, &CellCost> = costs
        .iter()
        .filter(|(key, _)| key.method == BASELINE)
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
        "# Costs\n\nMultiples of {BASELINE} in the cell with the same settings, medians. They differ from run \
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
