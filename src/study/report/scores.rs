//! The scores of every arm on every task, computed from the rows that its cells kept.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::cell::{CellResult, Status};
use super::super::paired::{row_scores, RowScore};
use super::super::rows::CellRows;
use super::arm::{number, Arm};
use crate::metrics::{ece, ece_floor};

/// The columns of the table, each a mean over cells.
const COLUMNS: [&str; 6] = ["accuracy", "NLL", "Brier", "ECE", "its floor", "ECE, debiased"];

/// The section about scores by rows.
pub(super) fn by_rows(cells: &[CellResult], rows: &BTreeMap<String, CellRows>) -> String {
    let mut found: BTreeMap<(&str, Arm), Vec<[f64; 6]>> = BTreeMap::new();
    for cell in cells.iter().filter(|cell| cell.status == Status::Done) {
        let Some(kept) = rows.get(&cell.key.folder_name()) else { continue };
        for treatment in kept.arms.keys() {
            let Some(scores) = row_scores(rows, &cell.key, treatment) else { continue };
            let [nll, debiased, brier, accuracy] = RowScore::ALL.map(|score| scores.plain(score));
            let [ece, floor] = calibration(kept, treatment);
            let arm = Arm::new(&cell.key.method, treatment);
            let figures = [accuracy, nll, brier, ece, floor, debiased];
            found.entry((&cell.key.task, arm)).or_default().push(figures);
        }
    }
    let mut text = format!(
        "\n## Scores by rows\n\nMeans over cells. The ECE of finitely many rows is above 0 even for a \
         calibrated model: its floor is the expected ECE if every row were right with its top probability, \
         and the debiased ECE removes part of this bias.\n\n| task | arm | cells | {} |\n|{}\n",
        COLUMNS.join(" | "),
        "---|".repeat(COLUMNS.len() + 3)
    );
    for ((task, arm), figures) in found {
        let mean = |i: usize| number(figures.iter().map(|row| row[i]).sum::<f64>() / figures.len() as f64);
        let means: Vec<String> = (0..COLUMNS.len()).map(mean).collect();
        writeln!(text, "| {task} | {arm} | {} | {} |", figures.len(), means.join(" | ")).ok();
    }
    text
}

/// The ECE in a treatment and its floor; NaN for invalid predictions.
fn calibration(rows: &CellRows, treatment: &str) -> [f64; 2] {
    let (probabilities, classes) = rows.probabilities(treatment).unwrap_or_default();
    let table: Vec<Vec<f64>> = probabilities.chunks(classes.max(1)).map(<[f64]>::to_vec).collect();
    [ece(&table, &rows.label).unwrap_or(f64::NAN), ece_floor(&table).unwrap_or(f64::NAN)]
}
