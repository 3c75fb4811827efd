//! The report of a study, from its result files only: `report.md`, `report.csv` and `cells.csv`, and
//! separately `costs.md`, which differs from run to run.
//!
//! Statistics are over the cells that are done. Cells that diverged or failed have no score; they are counted
//! in their row and never dropped silently.

mod arm;
mod calibration;
mod claim;
mod costs;
mod csv;
mod families;
mod figures;
mod pairs;
mod plan;
mod scores;
mod sensitivity;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use super::cell::{CellCost, CellKey, CellResult, Status};
use super::plan::Plan;
use super::rows::CellRows;
use super::store::{read_cells, read_rows, settings_path};
use crate::error::{Error, Result};
use crate::metrics::median;
use crate::util::files;
use arm::{baseline, number, tested, Arm};
use figures::{rows, ArmFigures, FIGURES};

/// Writes the report of the results in the folder `results` into the folder `out`. The same results give the
/// same bytes, except in `costs.md`.
///
/// # Errors
/// If a result or its rows cannot be read, two cells of a task were measured on different rows, the plan in
/// the settings is invalid, or a file cannot be written.
pub fn write_report(results: &Path, out: &Path) -> Result<()> {
    let stored = read_cells(results)?.into_iter();
    let (cells, costs): (Vec<CellResult>, Vec<_>) = stored.map(|cell| (cell.result, cell.cost)).unzip();
    std::fs::create_dir_all(out).map_err(Error::io(out))?;
    let done = cells.iter().zip(costs).filter(|(cell, _)| cell.status == Status::Done);
    let costs: Vec<(&CellKey, CellCost)> = done.filter_map(|(cell, cost)| Some((&cell.key, cost?))).collect();
    files::write(&out.join("costs.md"), costs::costs_markdown(&costs).as_bytes())?;
    let cells: Vec<CellResult> = cells.iter().flat_map(CellResult::by_task).collect();
    let settings = std::fs::read_to_string(settings_path(results)).unwrap_or_default();
    let kept = read_rows(results)?;
    let plan = match serde_json::from_str(&settings) {
        Ok(settings) => Plan::of_settings(&settings, &settings_path(results))?,
        Err(_) => None, // settings that are not JSON are only quoted
    };
    let tested = plan.as_ref().and_then(|(plan, _)| plan.tested()).or_else(|| tested(&cells));
    let text = markdown(&cells, &settings, tested.as_ref())
        + &by_rows(&cells, &kept, tested.as_ref(), plan.as_ref())?;
    files::write(&out.join("report.md"), text.as_bytes())?;
    files::write(&out.join("report.csv"), csv::rows_csv(&rows(&cells)).as_bytes())?;
    files::write(&out.join("cells.csv"), csv::cells_csv(&cells).as_bytes())
}

fn markdown(cells: &[CellResult], settings: &str, tested: Option<&Arm>) -> String {
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
            let ArmFigures { done, diverged, failed, .. } = row;
            writeln!(text, "| {arm} | {figures} | {done} | {diverged} | {failed} |").ok();
        }
    }
    if tasks.len() > 1 {
        text.push_str(&overall(&rows, tasks.len()));
    }
    if let Some(tested) = tested {
        if let Some(baseline) = baseline(cells.iter().map(|cell| &cell.key)) {
            text.push_str(&claim::claim(cells, tested, &baseline));
            text.push_str(&calibration::calibration(cells, tested, &baseline));
        }
        text.push_str(&pairs::signed_ranks(cells, tested));
    }
    text.push_str(&foreign(cells));
    text
}

/// The sections that need rows or a plan; empty if no cell kept rows and there is no plan.
fn by_rows(
    cells: &[CellResult],
    rows: &BTreeMap<String, CellRows>,
    tested: Option<&Arm>,
    plan: Option<&(Plan, String)>,
) -> Result<String> {
    let mut text = String::new();
    let baseline = baseline(cells.iter().map(|cell| &cell.key));
    if !rows.is_empty() {
        text.push_str(&scores::by_rows(cells, rows));
    }
    if let (false, Some(baseline)) = (rows.is_empty(), &baseline) {
        text.push_str(&sensitivity::sensitivity(cells, baseline));
        if let Some(tested) = tested {
            text.push_str(&sensitivity::seeds(cells, rows, tested, baseline)?);
            if plan.is_none() {
                let families = families::without_a_plan(cells, tested, baseline);
                text.push_str(&families::section(cells, rows, &families)?);
            }
        }
    }
    if let Some((plan, crc)) = plan {
        text.push_str(&plan::section(cells, rows, plan, crc)?);
    }
    Ok(text)
}

/// The section of means over tasks, for the arms that every task has.
fn overall(rows: &BTreeMap<(String, Arm), ArmFigures>, tasks: usize) -> String {
    let mut text = format!("\n## Mean over {tasks} tasks\n\n| method | {} |\n", FIGURES.join(" | "));
    text.push_str(&format!("|---|{}\n", "---|".repeat(FIGURES.len())));
    let mut sums: BTreeMap<&Arm, Vec<[f64; 8]>> = BTreeMap::new();
    for ((_, arm), row) in rows {
        sums.entry(arm).or_default().push(row.figures());
    }
    for (arm, figures) in sums.into_iter().filter(|(_, figures)| figures.len() == tasks) {
        let mean = |i: usize| figures.iter().map(|figures| figures[i]).sum::<f64>() / tasks as f64;
        let means: Vec<String> = (0..FIGURES.len()).map(|i| number(mean(i))).collect();
        writeln!(text, "| {arm} | {} |", means.join(" | ")).ok();
    }
    text
}

/// The section about out-of-domain detection: how well rows of another task are recognised.
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

#[cfg(test)]
mod row_tests;
#[cfg(test)]
mod tests;
