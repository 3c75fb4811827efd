//! The outcome of a plan: its families of tests, and whether its criteria of success are met.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::super::cell::{CellKey, CellResult, Status};
use super::super::paired::{PairedRows, RowScore};
use super::super::plan::{Criterion, Plan, Variation};
use super::super::rows::CellRows;
use super::super::stats::TwoLevel;
use super::arm::{number, Arm};
use super::families::{self, chance, Test, EXPLAINED};
use super::sensitivity;
use crate::error::Result;

/// The outcome of a criterion of success.
#[derive(Debug, Clone, PartialEq)]
enum Verdict {
    Met,
    NotMet(String),
    Undecided(String),
}

/// The section about a plan; `crc` is the checksum of its file.
///
/// # Errors
/// If two cells of a task were measured on different rows.
pub(super) fn section(
    cells: &[CellResult],
    rows: &BTreeMap<String, CellRows>,
    plan: &Plan,
    crc: &str,
) -> Result<String> {
    let planned = plan.cells()?;
    // Ignore other cells in the folder, which the plan does not have.
    let cells: Vec<CellResult> = cells.iter().filter(|cell| planned.contains(&cell.key)).cloned().collect();
    let cells = cells.as_slice();
    let ended = Ended::new(&planned, cells, rows);
    let mut text = format!(
        "\n## Plan: {}\n\nThe study was written down before it was run; CRC-32 of the file: {crc}. Of {} planned cells {} \
         are done, {} diverged, {} failed, {} have not run.\n\n{EXPLAINED}",
        plan.name,
        planned.len(),
        ended.count(&planned, Some(Status::Done)),
        ended.count(&planned, Some(Status::Diverged)),
        ended.count(&planned, Some(Status::Failed)),
        ended.count(&planned, None),
    );
    let mut families = BTreeMap::new();
    for (name, family) in &plan.families {
        let tests = families::tests(cells, rows, family)?;
        write!(text, "\n### Family: {name}\n\n{}", families::table(&tests)).ok();
        families.insert(name.as_str(), tests);
    }
    if plan.success.is_empty() {
        return Ok(text);
    }
    text.push_str("\n### Success\n\n| what must hold | found | verdict |\n|---|---|---|\n");
    let mut verdicts = Vec::new();
    for criterion in &plan.success {
        let (found, verdict) = match criterion {
            Criterion::Better { family, p } => {
                let tests = families.get(family.as_str()).map(Vec::as_slice).unwrap_or_default();
                better(&ended, tests, *p)
            }
            Criterion::Sensitivity { arm, against, most, of } => {
                sensitive(&ended, [arm, against], *most, *of)
            }
            Criterion::NotWorse { arm, against, score, lr, by } => {
                not_worse(&ended, [arm, against], *score, *lr, *by)?
            }
        };
        writeln!(text, "| {} | {found} | {} |", words(criterion), verdict.text()).ok();
        verdicts.push(verdict);
    }
    let all = if verdicts.iter().all(|verdict| *verdict == Verdict::Met) {
        "All criteria for success in the plan are met."
    } else if verdicts.iter().any(|verdict| matches!(verdict, Verdict::NotMet(_))) {
        "Not all criteria for success in the plan are met."
    } else {
        "Whether the criteria for success in the plan are met is undecided."
    };
    write!(text, "\n**{all}**\n").ok();
    Ok(text)
}

impl Verdict {
    fn text(&self) -> String {
        match self {
            Self::Met => "met".to_string(),
            Self::NotMet(why) => format!("not met: {why}"),
            Self::Undecided(why) => format!("undecided: {why}"),
        }
    }
}

fn decided(holds: bool, otherwise: &str) -> Verdict {
    if holds {
        Verdict::Met
    } else {
        Verdict::NotMet(otherwise.to_string())
    }
}

/// The planned cells, and how they ended.
struct Ended<'a> {
    planned: &'a [CellKey],
    cells: &'a [CellResult],
    rows: &'a BTreeMap<String, CellRows>,
    status: BTreeMap<String, Status>,
}

impl<'a> Ended<'a> {
    fn new(planned: &'a [CellKey], cells: &'a [CellResult], rows: &'a BTreeMap<String, CellRows>) -> Self {
        let names: BTreeSet<String> = planned.iter().map(CellKey::folder_name).collect();
        let ended = cells.iter().map(|cell| (cell.key.folder_name(), cell.status));
        let status = ended.filter(|(name, _)| names.contains(name)).collect();
        Self { planned, cells, rows, status }
    }

    fn count(&self, planned: &[CellKey], status: Option<Status>) -> usize {
        planned.iter().filter(|key| self.status.get(&key.folder_name()).copied() == status).count()
    }

    /// The number of cells that are done but did not keep the rows of this treatment.
    fn without_rows(&self, keys: &[CellKey], treatment: &str) -> usize {
        let lacks = |key: &&CellKey| {
            let name = key.folder_name();
            let kept = self.rows.get(&name).is_some_and(|rows| rows.arms.contains_key(treatment));
            self.status.get(&name) == Some(&Status::Done) && !kept
        };
        keys.iter().filter(lacks).count()
    }

    /// The verdict on pairs of arms, if the cells behind it are complete. Missing or failed cells, or cells
    /// without rows, make it undecided. If cells of the first arm of a pair diverged, the criterion is not
    /// met, since its worst cells have no score.
    fn or(&self, planned: &[CellKey], pairs: &[[&Arm; 2]], verdict: Verdict) -> Verdict {
        // Several arms of one method share the same cells.
        let of = |methods: &BTreeSet<&String>| -> Vec<CellKey> {
            planned.iter().filter(|key| methods.contains(&key.method)).cloned().collect()
        };
        let arms: BTreeSet<&Arm> = pairs.iter().flatten().copied().collect();
        let lost = arms.iter().map(|arm| self.without_rows(&of(&[&arm.method].into()), &arm.treatment));
        let lost: usize = lost.sum();
        let own = of(&pairs.iter().map(|[own, _]| &own.method).collect());
        let all = of(&arms.iter().map(|arm| &arm.method).collect());
        let open = self.count(&all, None) + self.count(&all, Some(Status::Failed));
        match (self.count(&own, Some(Status::Diverged)), open) {
            (0, 0) if lost > 0 => Verdict::Undecided(format!("{lost} of its cells lack their rows")),
            (0, 0) => verdict,
            (0, open) => Verdict::Undecided(format!("{open} of its cells have not run, or failed")),
            (diverged, _) => Verdict::NotMet(format!("{diverged} of its cells diverged")),
        }
    }
}

/// What was found about [`Criterion::Better`], and the verdict.
fn better(ended: &Ended, tests: &[Test], p: f64) -> (String, Verdict) {
    let found = tests.iter().filter(|test| test.better(p)).count();
    let verdict = decided(found == tests.len(), "not every test finds it better");
    let pairs: Vec<[&Arm; 2]> = tests.iter().map(|test| [&test.arm, &test.against]).collect();
    let largest = tests.iter().map(|test| test.corrected).fold(f64::NAN, f64::max);
    let largest = if largest.is_nan() { "-".to_string() } else { chance(largest) };
    let text = format!("{found} of {}, largest p {largest}", tests.len());
    (text, ended.or(ended.planned, &pairs, verdict))
}

/// What was found about [`Criterion::Sensitivity`], and the verdict.
fn sensitive(ended: &Ended, arms: [&Arm; 2], most: f64, of: Variation) -> (String, Verdict) {
    let (found, verdict) = match sensitivity::compared(ended.cells, arms[0], arms[1]) {
        None => nothing(),
        Some(found) => {
            let ratio = found.variances[0] / found.variances[1];
            let ratio = if of == Variation::Deviation { ratio.sqrt() } else { ratio };
            (
                format!("{}, p {}", number(ratio), found.p.map_or("-".to_string(), chance)),
                decided(ratio <= most, "it depends more on the learning rate"),
            )
        }
    };
    (found, ended.or(ended.planned, &[arms], verdict))
}

/// What was found about [`Criterion::NotWorse`], and the verdict.
///
/// # Errors
/// If two cells of a task were measured on different rows.
fn not_worse(
    ended: &Ended,
    arms: [&Arm; 2],
    score: RowScore,
    lr: Option<f64>,
    by: f64,
) -> Result<(String, Verdict)> {
    let wanted = |key: &CellKey| lr.is_none_or(|lr| key.lr == lr);
    let pairs = PairedRows::new(ended.cells, ended.rows, arms, wanted)?;
    let (found, verdict) = match pairs.difference(score) {
        None if pairs.settings() > 0 => {
            ("not finite".to_string(), Verdict::Undecided("a difference is not finite".to_string()))
        }
        None => nothing(),
        Some(found) => (
            format!("{:+.4} ({:+.4} to {:+.4})", found.estimate, found.low, found.high),
            worse_by_at_most(&found, by, score.lower_is_better()),
        ),
    };
    let planned: Vec<CellKey> = ended.planned.iter().filter(|key| wanted(key)).cloned().collect();
    Ok((found, ended.or(&planned, &[arms], verdict)))
}

/// The outcome of a criterion for which no two cells can be compared.
fn nothing() -> (String, Verdict) {
    ("no pair".to_string(), Verdict::Undecided("there is nothing to compare".to_string()))
}

/// Whether the whole interval of a difference is at most `by` worse. If only the estimate is, chance alone
/// may have kept it there.
fn worse_by_at_most(found: &TwoLevel, by: f64, lower_is_better: bool) -> Verdict {
    let (estimate, end) =
        if lower_is_better { (found.estimate, found.high) } else { (-found.estimate, -found.low) };
    if end <= by {
        Verdict::Met
    } else if estimate <= by {
        Verdict::Undecided("the interval reaches further".to_string())
    } else {
        Verdict::NotMet("it is worse by more".to_string())
    }
}

/// A criterion in words.
fn words(criterion: &Criterion) -> String {
    match criterion {
        Criterion::Better { family, p } => {
            format!("every test of the family {family} better, Holm's p < {p}")
        }
        Criterion::Sensitivity { arm, against, most, of } => {
            let of = match of {
                Variation::Variance => "variance",
                Variation::Deviation => "standard deviation",
            };
            format!("{of} of the NLL over learning rates, {arm} at most {most} of {against}'s")
        }
        Criterion::NotWorse { arm, against, score, lr, by } => {
            let at = lr.map(|lr| format!(" at {lr}")).unwrap_or_default();
            format!("{score}{at}, {arm} at most {by} worse than {against}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_worse_is_met_by_a_whole_interval_only() {
        let found = |estimate: f64| TwoLevel {
            estimate,
            error: 0.01,
            df: 10.0,
            low: estimate - 0.02,
            high: estimate + 0.02,
            p: 0.5,
        };
        for (estimate, lower_is_better, verdict) in [
            (-0.01, true, "met"),
            (0.0, true, "undecided: the interval reaches further"),
            (0.02, true, "not met: it is worse by more"),
            (0.01, false, "met"),
            (0.0, false, "undecided: the interval reaches further"),
            (-0.02, false, "not met: it is worse by more"),
        ] {
            assert_eq!(
                worse_by_at_most(&found(estimate), 0.015, lower_is_better).text(),
                verdict,
                "{estimate}"
            );
        }
    }
}
