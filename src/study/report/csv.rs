//! The tables of a report as CSV: one with a row per arm, and one with a row per arm of each cell.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::cell::{CellKey, CellResult};
use super::arm::Arm;
use super::figures::{ArmFigures, FIGURES};

pub(super) fn rows_csv(rows: &BTreeMap<(String, Arm), ArmFigures>) -> String {
    let mut text = format!("task,method,arm,metric,{},done,diverged,failed\n", FIGURES.join(","));
    for ((task, Arm { method, treatment }), row) in rows {
        let figures = row.figures().map(|figure| figure.to_string()).join(",");
        let ArmFigures { metric, done, diverged, failed, .. } = row;
        let (task, method, treatment) = (field(task), field(method), field(treatment));
        writeln!(text, "{task},{method},{treatment},{metric},{figures},{done},{diverged},{failed}").ok();
    }
    text
}

pub(super) fn cells_csv(cells: &[CellResult]) -> String {
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
        for (treatment, m) in arms {
            let scores = [m.get(metric), m.nll, m.ece, m.brier].map(cell).join(",");
            writeln!(text, "{start},{},{metric},{scores}", field(treatment)).ok();
        }
    }
    text
}

/// A field of a CSV file, in quotes if it contains a comma, as a recipe may.
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_string()
    }
}
