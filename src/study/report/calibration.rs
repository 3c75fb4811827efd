//! NLL and ECE of posterior draws against the mean, and against methods that calibrate a LoRA without draws.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::super::cell::CellResult;
use super::super::treatment::{self, MEAN};
use super::arm::{draws_of, is_fitted_held_out, number, of_any_task, Arm};
use super::pairs::{differences, signed_rank_test, Pairs, ECE, NLL};
use crate::metrics::median;

/// The ways to predict with the baseline, in the order of the table.
const TREATMENTS: [&str; 6] = [
    MEAN,
    treatment::TEMPERATURE,
    treatment::LAST_LAYER_LAPLACE,
    treatment::LAPLACE,
    treatment::MC_DROPOUT,
    treatment::CHECKPOINTS,
];

/// The section about calibration, over the settings that are done in both arms of each row; empty if there
/// are no draws.
pub(super) fn calibration(cells: &[CellResult], tested: &Arm, baseline: &Arm) -> String {
    let Some(draws) = draws_of(tested, cells) else { return String::new() };
    let mut others = TREATMENTS.map(|treatment| Arm::new(&baseline.method, treatment)).to_vec();
    others.splice(1..1, of_any_task(cells).into_iter().filter(|arm| is_fitted_held_out(arm, baseline)));
    // The tested arm may be the draws themselves.
    let mean = Arm::mean_of(&tested.method);
    let pairs: Vec<(&Arm, Pairs)> =
        std::iter::once(&mean).chain(&others).map(|arm| (arm, Pairs::new(cells, &draws, arm))).collect();
    let mut text = format!(
        "\n## Calibration: {draws} against the mean and the treatments of {}\n\nMedians over the settings that \
         are done in both, and the signed-rank test of their differences (positive: {draws} is higher, which is \
         worse).\n\n| task | against | settings | NLL, draws | NLL, other | test | ECE, draws | ECE, other | test \
         |\n|{}\n",
        baseline.method,
        "---|".repeat(9)
    );
    let tasks: BTreeSet<&str> = pairs.iter().flat_map(|(_, pairs)| pairs.tasks()).collect();
    for task in &tasks {
        for (arm, pairs) in &pairs {
            let columns = [NLL, ECE].map(|score| pairs.scores(task, score));
            let settings = columns[0][0].len();
            if settings == 0 {
                continue;
            }
            let columns = columns.map(|scores| {
                let [own, other] = scores.each_ref().map(|scores| number(median(scores)));
                format!("{own} | {other} | {}", signed_rank_test(&differences(&scores)))
            });
            writeln!(text, "| {task} | {arm} | {settings} | {} |", columns.join(" | ")).ok();
        }
    }
    if tasks.len() > 1 {
        for (arm, pairs) in &pairs {
            let columns = [NLL, ECE].map(|score| pairs.over_cells(score));
            let settings = columns[0].len();
            if settings == 0 {
                continue;
            }
            let columns = columns.map(|differences| format!("- | - | {}", signed_rank_test(&differences)));
            writeln!(text, "| all | {arm} | {settings} | {} |", columns.join(" | ")).ok();
        }
    }
    if tasks.is_empty() {
        String::new()
    } else {
        text
    }
}
