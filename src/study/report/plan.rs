//! The outcome of a plan: its families of tests, and whether its criteria of success are met.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::super::cell::{CellKey, CellResult, Status};
use super::super::paired::PairedRows;
use super::super::plan::{arm, Criterion, Plan, Variation};
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
                better(tests, *p, &planned, &ended)?
            }
            Criterion::Sensitivity { arm: own, against, most, of } => {
                sensitive(cells, [own, against], *most, *of, &planned, &ended)?
            }
            Criterion::NotWorse { arm: own, against, score, lr, by } => {
                let wanted = |key: &CellKey| lr.is_none_or(|lr| key.lr == lr);
                let arms = [arm(own)?, arm(against)?];
                let pairs = PairedRows::new(cells, rows, [&arms[0], &arms[1]], wanted)?;
                let planned: Vec<CellKey> = planned.iter().filter(|key| wanted(key)).cloned().collect();
                let (found, verdict) = match pairs.difference(*score) {
                    None if pairs.settings() > 0 => {
                        let why = "a difference is not finite".to_string();
                        ("not finite".to_string(), Verdict::Undecided(why))
                    }
                    None => {
                        ("no pair".to_string(), Verdict::Undecided("there is nothing to compare".to_string()))
                    }
                    Some(found) => {
                        let text =
                            format!("{:+.4} ({:+.4} to {:+.4})", found.estimate, found.low, found.high);
                        (text, not_worse(&found, *by, score.lower_is_better()))
                    }
                };
                (found, ended.or(&planned, &[arms], verdict))
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

/// Whether the whole interval of a difference is at most `by` worse. If only the estimate is, chance alone
/// may have kept it there.
fn not_worse(found: &TwoLevel, by: f64, lower_is_better: bool) -> Verdict {
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

/// How the planned cells ended.
struct Ended<'a> {
    status: BTreeMap<String, Status>,
    rows: &'a BTreeMap<String, CellRows>,
}

impl<'a> Ended<'a> {
    fn new(planned: &[CellKey], cells: &[CellResult], rows: &'a BTreeMap<String, CellRows>) -> Self {
        let names: BTreeSet<String> = planned.iter().map(CellKey::folder_name).collect();
        let ended = cells.iter().map(|cell| (cell.key.folder_name(), cell.status));
        Self { status: ended.filter(|(name, _)| names.contains(name)).collect(), rows }
    }

    fn count(&self, planned: &[CellKey], status: Option<Status>) -> usize {
        planned.iter().filter(|key| self.status.get(&key.folder_name()).copied() == status).count()
    }

    /// The number of cells that are done but did not keep this arm's rows.
    fn without_rows(&self, keys: &[CellKey], arm: &str) -> usize {
        let lacks = |key: &&CellKey| {
            let name = key.folder_name();
            let kept = self.rows.get(&name).is_some_and(|rows| rows.arms.contains_key(arm));
            self.status.get(&name) == Some(&Status::Done) && !kept
        };
        keys.iter().filter(lacks).count()
    }

    /// The verdict on pairs of arms, if the cells behind it are complete. Missing or failed cells, or cells
    /// without rows, make it undecided. If cells of the first arm of a pair diverged, the criterion is not
    /// met, since its worst cells have no score.
    fn or(&self, planned: &[CellKey], pairs: &[[Arm; 2]], verdict: Verdict) -> Verdict {
        // Several arms of one method share the same cells.
        let of = |methods: &BTreeSet<&String>| -> Vec<CellKey> {
            planned.iter().filter(|key| methods.contains(&key.method)).cloned().collect()
        };
        let arms: BTreeSet<&Arm> = pairs.iter().flatten().collect();
        let lost = arms.iter().map(|arm| self.without_rows(&of(&[&arm.0].into()), &arm.1)).sum::<usize>();
        let own = of(&pairs.iter().map(|[own, _]| &own.0).collect());
        let all = of(&arms.iter().map(|arm| &arm.0).collect());
        let open = self.count(&all, None) + self.count(&all, Some(Status::Failed));
        match (self.count(&own, Some(Status::Diverged)), open) {
            (0, 0) if lost > 0 => Verdict::Undecided(format!("{lost} of its cells lack their rows")),
            (0, 0) => verdict,
            (0, open) => Verdict::Undecided(format!("{open} of its cells have not run, or failed")),
            (diverged, _) => Verdict::NotMet(format!("{diverged} of its cells diverged")),
        }
    }
}

fn better(tests: &[Test], p: f64, planned: &[CellKey], ended: &Ended) -> Result<(String, Verdict)> {
    let found = tests.iter().filter(|test| test.better(p)).count();
    let verdict = decided(found == tests.len(), "not every test finds it better");
    let pairs = tests.iter().map(|test| Ok([arm(&test.arm)?, arm(&test.against)?]));
    let verdict = ended.or(planned, &pairs.collect::<Result<Vec<_>>>()?, verdict);
    let largest = tests.iter().map(|test| test.corrected).fold(f64::NAN, f64::max);
    let largest = if largest.is_nan() { "-".to_string() } else { chance(largest) };
    Ok((format!("{found} of {}, largest p {largest}", tests.len()), verdict))
}

fn sensitive(
    cells: &[CellResult],
    [own, against]: [&String; 2],
    most: f64,
    of: Variation,
    planned: &[CellKey],
    ended: &Ended,
) -> Result<(String, Verdict)> {
    let arms = [arm(own)?, arm(against)?];
    let (found, verdict) = match sensitivity::compared(cells, &arms[0], &arms[1]) {
        None => ("no pair".to_string(), Verdict::Undecided("there is nothing to compare".to_string())),
        Some(found) => {
            let ratio = found.variances[0] / found.variances[1];
            let ratio = if of == Variation::Deviation { ratio.sqrt() } else { ratio };
            (
                format!("{}, p {}", number(ratio), found.p.map_or("-".to_string(), chance)),
                decided(ratio <= most, "it depends more on the learning rate"),
            )
        }
    };
    Ok((found, ended.or(planned, &[arms], verdict)))
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
            assert_eq!(not_worse(&found(estimate), 0.015, lower_is_better).text(), verdict, "{estimate}");
        }
    }
}
