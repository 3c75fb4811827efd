//! The paper's claim, per task and over all tasks: a smaller spread than LoRA's at no lower median.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::cell::{CellResult, Status};
use super::arm::{number, settings_of, Arm};
use super::pairs::{difference, signed_rank_test, spread, Pairs, METRIC, NLL};
use crate::metrics::median;

/// The section about the claim; empty if no task has cells of both arms.
pub(super) fn claim(cells: &[CellResult], tested: &Arm, baseline: &Arm) -> String {
    let pairs = Pairs::new(cells, tested, baseline);
    let (mut table, mut all) = (String::new(), Vec::new());
    for (task, runs) in both_ran(cells, tested, baseline) {
        let scores = pairs.scores(task, METRIC);
        let settings = scores[0].len();
        let spreads = scores.each_ref().map(|scores| spread(scores));
        let medians = scores.each_ref().map(|scores| median(scores));
        let holds = holds(spreads, medians, settings, &runs);
        let figures = [spreads, medians].concat().into_iter().map(number).collect::<Vec<_>>().join(" | ");
        let ended = runs.each_ref().map(Runs::ended).join(" | ");
        writeln!(table, "| {task} | {settings} | {figures} | {ended} | {holds} |").ok();
        all.push(holds);
    }
    if all.is_empty() {
        return String::new();
    }
    let count = |start: &str| all.iter().filter(|holds| holds.starts_with(start)).count();
    let (own, other) = (tested, baseline);
    let mut text = format!(
        "\n## The paper's claim\n\n{own} has a smaller spread than {other} at no lower median on {} of {} tasks, \
         {} undecided. Spreads and medians are over the settings (learning rate, batch size, seed) that are \
         done in both. A diverged cell has no score: where {own} has more of them than {other}, the claim \
         does not hold, whatever the other scores.\n\n| task | settings | spread, {own} | spread, {other} | \
         median, {own} | median, {other} | done, {own} | done, {other} | holds |\n|{}\n{table}",
        count("yes"),
        all.len(),
        count("undecided"),
        "---|".repeat(9),
    );
    let tests = [
        ("median, over tasks", pairs.over_tasks(METRIC, median), pairs.over_tasks(NLL, median)),
        ("spread, over tasks", pairs.over_tasks(METRIC, spread), pairs.over_tasks(NLL, spread)),
        ("settings of all tasks", pairs.over_cells(METRIC), pairs.over_cells(NLL)),
    ];
    write!(
        text,
        "\nWilcoxon signed-rank tests of the differences {own} - {other}: two-sided p, the number n that are not \
         zero, their median, and in brackets the least p that n can give.\n\n| pairs | metric | NLL |\n\
         |---|---|---|\n"
    )
    .ok();
    for (what, metric, nll) in tests {
        writeln!(text, "| {what} | {} | {} |", signed_rank_test(&metric), signed_rank_test(&nll)).ok();
    }
    text
}

/// How the cells of one arm on one task ended.
#[derive(Default)]
struct Runs {
    statuses: BTreeMap<String, Status>,
}

impl Runs {
    fn count(&self, status: Status) -> usize {
        self.statuses.values().filter(|other| **other == status).count()
    }

    /// The number of diverged cells in settings that the other arm ran as well, so that a half-finished grid
    /// counts against neither.
    fn diverged_beside(&self, other: &Self) -> usize {
        let both = self.statuses.iter().filter(|(settings, _)| other.statuses.contains_key(*settings));
        both.filter(|(_, status)| **status == Status::Diverged).count()
    }

    fn ended(&self) -> String {
        let mut text = format!("{}/{}", self.count(Status::Done), self.statuses.len());
        for (status, word) in [(Status::Diverged, "diverged"), (Status::Failed, "failed")] {
            match self.count(status) {
                0 => {}
                count => text.push_str(&format!(", {count} {word}")),
            }
        }
        text
    }
}

/// The tasks on which both arms have cells.
fn both_ran<'a>(cells: &'a [CellResult], tested: &Arm, baseline: &Arm) -> BTreeMap<&'a str, [Runs; 2]> {
    let mut tasks: BTreeMap<&str, [Runs; 2]> = BTreeMap::new();
    for CellResult { key, status, .. } in cells {
        let Some(arm) = [tested, baseline].iter().position(|arm| arm.method == key.method) else { continue };
        let runs = &mut tasks.entry(&key.task).or_default()[arm];
        runs.statuses.insert(settings_of(key), *status);
    }
    tasks.retain(|_, runs| runs.iter().all(|runs| !runs.statuses.is_empty()));
    tasks
}

/// Whether the claim holds on a task. Diverged and failed cells are not in the figures, so the verdict is
/// undecided if they might be the reason for the result.
fn holds(spreads: [f64; 2], medians: [f64; 2], settings: usize, [own, other]: &[Runs; 2]) -> &'static str {
    let (own_diverged, others_diverged) = (own.diverged_beside(other), other.diverged_beside(own));
    let lost = |runs: &Runs| runs.statuses.len() - runs.count(Status::Done);
    if own_diverged > others_diverged {
        return "no: more of its cells diverged";
    }
    if settings < 2 {
        return "undecided: fewer than two settings";
    }
    if spreads == [0.0, 0.0] {
        return "undecided: every setting gives the same";
    }
    let [spread, median] = [spreads, medians].map(|[own, other]| difference(own, other));
    if spread < 0.0 && median >= 0.0 {
        if lost(own) > lost(other) {
            "undecided: more of its cells have no score"
        } else {
            "yes"
        }
    } else if own_diverged < others_diverged {
        // The other's figures lack the settings in which it diverged, so its spread may be too small.
        "undecided: more of the other's cells diverged"
    } else {
        "no"
    }
}
