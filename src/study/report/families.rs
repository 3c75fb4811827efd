//! Families of paired tests, and their tables.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::super::cell::CellResult;
use super::super::paired::{PairedRows, RowScore};
use super::super::plan::Comparison;
use super::super::rows::CellRows;
use super::super::stats::{holm, TwoLevel};
use super::arm::{draws_of, is_fitted_held_out, number, of_any_task, Arm};
use crate::error::Result;

/// A test of a family.
pub(super) struct Test {
    pub arm: Arm,
    pub against: Arm,
    pub score: RowScore,
    /// The number of settings.
    settings: usize,
    /// The smallest number of seeds of a task.
    seeds: usize,
    /// The difference arm - against; `None` if there is no pair, or it is not finite.
    pub found: Option<TwoLevel>,
    /// The p-value corrected within the family.
    pub corrected: f64,
    /// The mean difference on each task, over its settings.
    by_task: Vec<(String, f64)>,
}

impl Test {
    /// Whether the arm is better, with a corrected p-value below `p`.
    pub fn better(&self, p: f64) -> bool {
        let better =
            |found: TwoLevel| (found.estimate < 0.0) == self.score.lower_is_better() && found.estimate != 0.0;
        self.found.is_some_and(better) && self.corrected < p
    }
}

/// The tests of a family over the cells that are done in both arms.
///
/// # Errors
/// If two cells of a task were measured on different rows.
pub(super) fn tests(
    cells: &[CellResult],
    rows: &BTreeMap<String, CellRows>,
    family: &[Comparison],
) -> Result<Vec<Test>> {
    let mut tests = Vec::new();
    for comparison in family {
        let Comparison { arm, against, scores } = comparison;
        let pairs = PairedRows::new(cells, rows, [arm, against], |_| true)?;
        tests.extend(scores.iter().map(|score| Test {
            arm: arm.clone(),
            against: against.clone(),
            score: *score,
            settings: pairs.settings(),
            seeds: pairs.seeds(),
            found: pairs.difference(*score),
            corrected: f64::NAN,
            by_task: pairs.by_task(*score),
        }));
    }
    let p: Vec<f64> = tests.iter().map(|test| test.found.map_or(f64::NAN, |found| found.p)).collect();
    tests.iter_mut().zip(holm(&p)).for_each(|(test, corrected)| test.corrected = corrected);
    Ok(tests)
}

/// The table of a family.
pub(super) fn table(tests: &[Test]) -> String {
    let mut text = String::from(
        "| arm | against | score | settings | seeds | difference | 95 % interval | p | p, Holm |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for test in tests {
        let Test { arm, against, score, settings, seeds, found, corrected, .. } = test;
        let figures = match found {
            None => format!("{} | - | - | -", if *settings > 0 { "not finite" } else { "no pair" }),
            Some(TwoLevel { estimate, low, high, p, .. }) => {
                format!("{estimate:+.4} | {low:+.4} to {high:+.4} | {} | {}", chance(*p), chance(*corrected))
            }
        };
        writeln!(text, "| {arm} | {against} | {score} | {settings} | {seeds} | {figures} |").ok();
    }
    text.push_str(&by_task(tests));
    text
}

/// The table of a family's differences per task; empty if there is only one task.
fn by_task(tests: &[Test]) -> String {
    let tasks: BTreeSet<&String> =
        tests.iter().flat_map(|test| &test.by_task).map(|(task, _)| task).collect();
    if tasks.len() < 2 {
        return String::new();
    }
    let names: Vec<&str> = tasks.iter().map(|task| task.as_str()).collect();
    let mut text = format!("\n| arm | against | score | {} |\n", names.join(" | "));
    text.push_str(&format!("|---|---|---|{}\n", "---|".repeat(names.len())));
    for Test { arm, against, score, by_task, .. } in tests {
        let of = |task: &&String| by_task.iter().find(|(own, _)| own == *task);
        let figure = |task| of(task).map_or("-".to_string(), |(_, difference)| format!("{difference:+.4}"));
        let figures: Vec<String> = tasks.iter().map(figure).collect();
        writeln!(text, "| {arm} | {against} | {score} | {} |", figures.join(" | ")).ok();
    }
    text
}

/// A p-value in a table. Below 1e-4 it depends on a tail that few seeds and resamples do not determine.
pub(super) fn chance(p: f64) -> String {
    if p < 1e-4 {
        "< 1e-4".to_string()
    } else {
        number(p)
    }
}

/// The explanation of the tables of tests.
pub(super) const EXPLAINED: &str =
    "Differences arm - against, paired by task, seed, learning rate, batch size and row, with equal weights \
     for tasks. The interval and p come from a two-level bootstrap over seeds and over the rows that all \
     seeds were measured on, with Student's t for few seeds. (With one seed only rows are resampled, so the \
     variation between seeds is not included.) Holm's p is corrected within the table.\n";

/// The families of a study without a plan: the draws of the tested method, or the tested arm if it has none,
/// against every way to predict with the baseline.
pub(super) fn without_a_plan(
    cells: &[CellResult],
    tested: &Arm,
    baseline: &Arm,
) -> Vec<(String, Vec<Comparison>)> {
    let own = draws_of(tested, cells).unwrap_or_else(|| tested.clone());
    let of_baseline = |arm: &Arm| arm.method == baseline.method || is_fitted_held_out(arm, baseline);
    let mut others: Vec<Arm> = of_any_task(cells).into_iter().filter(of_baseline).collect();
    // In the order of their names, which earlier reports have: it puts `tfb held-out` before `tfb`.
    others.sort_by_cached_key(Arm::to_string);
    let family = |scores: [RowScore; 2]| -> Vec<Comparison> {
        let against =
            |other: &Arm| Comparison { arm: own.clone(), against: other.clone(), scores: scores.to_vec() };
        others.iter().map(against).collect()
    };
    vec![
        ("NLL and ECE".to_string(), family([RowScore::Nll, RowScore::Ece])),
        ("Brier score and accuracy".to_string(), family([RowScore::Brier, RowScore::Accuracy])),
    ]
}

/// The section about these families.
///
/// # Errors
/// As [`tests`].
pub(super) fn section(
    cells: &[CellResult],
    rows: &BTreeMap<String, CellRows>,
    families: &[(String, Vec<Comparison>)],
) -> Result<String> {
    let mut text = format!("\n## Paired comparisons by rows\n\n{EXPLAINED}");
    for (name, family) in families {
        write!(text, "\n### {name}\n\n{}", table(&tests(cells, rows, family)?)).ok();
    }
    Ok(text)
}
