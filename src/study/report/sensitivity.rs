//! How much scores depend on the learning rate, and how much they vary between seeds.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::cell::{CellResult, Status};
use super::super::paired::{row_scores, PairedRows, RowScore};
use super::super::rows::CellRows;
use super::super::stats::{mean_regret, pitman_morgan, within_variance};
use super::arm::{number, of_any_task, Arm};
use super::families::chance;
use super::pairs::spread;
use crate::error::Result;
use crate::metrics::{quantile, Metrics};

/// Task, seed and batch size.
type Group<'a> = (&'a str, u64, usize);
/// A score of an arm by group and learning rate.
type Groups<'a> = BTreeMap<Group<'a>, Vec<(f64, f64)>>;

/// The scores of an arm. Infinite scores are kept: without them the arm would seem less sensitive than it is.
fn groups<'a>(
    cells: &'a [CellResult],
    arm: &Arm,
    score: impl Fn(&CellResult, &Metrics) -> Option<f64>,
) -> Groups<'a> {
    let mut groups = Groups::new();
    for cell in cells.iter().filter(|cell| cell.status == Status::Done && cell.key.method == arm.method) {
        let score = cell.arms.get(&arm.treatment).and_then(|metrics| score(cell, metrics));
        if let Some(score) = score {
            let key = (cell.key.task.as_str(), cell.key.seed, cell.key.batch_size);
            groups.entry(key).or_default().push((cell.key.lr, score));
        }
    }
    groups
}

/// How much the NLL of two arms varies over learning rates.
pub(super) struct Compared {
    /// The variances within task, seed and batch size.
    pub variances: [f64; 2],
    /// The p-value of equal variances, if there are enough rates.
    pub p: Option<f64>,
}

/// Compares how much the NLL of two arms varies over learning rates, in the settings that are done in both.
/// The test is of the means over seeds: seeds at one rate share what the rate does, and are no further
/// evidence about it. `None` if an NLL is infinite or there is too little to compare.
pub(super) fn compared(cells: &[CellResult], arm: &Arm, against: &Arm) -> Option<Compared> {
    let [own, other] = [arm, against].map(|arm| groups(cells, arm, |_, metrics| metrics.nll));
    let mut by_seed: Vec<Vec<[f64; 2]>> = Vec::new();
    // By task and batch size, and then by rate (positive, so that bits are in order): the pairs of the seeds.
    let mut by_rate = BTreeMap::<(&str, usize), BTreeMap<u64, Vec<(u64, [f64; 2])>>>::new();
    for ((task, seed, batch_size), own) in &own {
        let others = other.get(&(*task, *seed, *batch_size)).map_or(&[][..], Vec::as_slice);
        let partner = |(lr, own): &(f64, f64)| {
            others.iter().find(|(other, _)| other == lr).map(|(_, other)| (lr.to_bits(), [*own, *other]))
        };
        let pairs: Vec<(u64, [f64; 2])> = own.iter().filter_map(partner).collect();
        let rates = by_rate.entry((task, *batch_size)).or_default();
        pairs.iter().for_each(|(lr, pair)| rates.entry(*lr).or_default().push((*seed, *pair)));
        by_seed.push(pairs.into_iter().map(|(_, pair)| pair).collect());
    }
    let means = by_rate.values().map(means_of_whole_seeds);
    let test = pitman_morgan(&means.collect::<Vec<_>>());
    Some(Compared { variances: pitman_morgan(&by_seed)?.variances, p: test.map(|test| test.p) })
}

/// The mean pair of each rate, over the seeds that have one at every rate: others would add to some rates what
/// sets their seed apart.
fn means_of_whole_seeds(rates: &BTreeMap<u64, Vec<(u64, [f64; 2])>>) -> Vec<[f64; 2]> {
    let has = |pairs: &Vec<(u64, [f64; 2])>, seed: u64| pairs.iter().any(|(other, _)| *other == seed);
    let is_whole = |seed: u64| rates.values().all(|pairs| has(pairs, seed));
    let mean = |pairs: &Vec<(u64, [f64; 2])>| {
        let whole: Vec<[f64; 2]> =
            pairs.iter().filter(|(seed, _)| is_whole(*seed)).map(|(_, pair)| *pair).collect();
        let mean = |k: usize| whole.iter().map(|pair| pair[k]).sum::<f64>() / whole.len() as f64;
        (!whole.is_empty()).then(|| [mean(0), mean(1)])
    };
    rates.values().filter_map(mean).collect()
}

/// The section about the learning rate; empty if no arm has two learning rates.
pub(super) fn sensitivity(cells: &[CellResult], baseline: &Arm) -> String {
    let mut table = String::new();
    for arm in &of_any_task(cells) {
        let scores = |score: fn(&CellResult, &Metrics) -> Option<f64>| -> Vec<Vec<f64>> {
            let of_rates = |group: Vec<(f64, f64)>| group.into_iter().map(|(_, score)| score).collect();
            groups(cells, arm, score)
                .into_values()
                .map(of_rates)
                .filter(|group: &Vec<f64>| group.len() > 1)
                .collect()
        };
        let nll = scores(|_, metrics| metrics.nll);
        if nll.is_empty() {
            continue;
        }
        let sd = within_variance(&nll).sqrt();
        let accuracy = scores(|_, metrics| metrics.accuracy);
        let figures = [sd, mean_regret(&nll, true), mean_regret(&accuracy, false), mean_spread(cells, arm)];
        let test = match compared(cells, arm, baseline).filter(|_| arm != baseline) {
            None => "- | -".to_string(),
            Some(found) => {
                let p = found.p.map_or("-".to_string(), chance);
                format!("{} | {p}", number(found.variances[0] / found.variances[1]))
            }
        };
        writeln!(table, "| {arm} | {} | {test} |", figures.map(number).join(" | ")).ok();
    }
    if table.is_empty() {
        return String::new();
    }
    format!(
        "\n## Dependence on the learning rate\n\nStandard deviation of the NLL over learning rates within \
         task, seed and batch size; mean regret, the cost of a rate chosen at random compared to the best \
         rate of the same method; the paper's spread (best - worst of the metric over all cells of a task), \
         averaged over tasks. A method that is bad at every rate has a small spread, so read it together \
         with the scores. The ratio of variances is to that of {baseline} in the same settings; p is of the \
         Pitman-Morgan test of their means over seeds.\n\n| arm | sd of NLL | regret, NLL | regret, accuracy | spread \
         | ratio of variances | p |\n|---|---|---|---|---|---|---|\n{table}"
    )
}

/// The paper's spread of the task's metric, averaged over tasks.
fn mean_spread(cells: &[CellResult], arm: &Arm) -> f64 {
    let mut tasks: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for ((task, ..), group) in groups(cells, arm, |cell, metrics| metrics.get(&cell.metric)) {
        tasks.entry(task).or_default().extend(group.into_iter().map(|(_, score)| score));
    }
    tasks.values().map(|scores| spread(scores)).sum::<f64>() / tasks.len() as f64
}

/// The section about chance: how far two seeds of the baseline are apart in the same setting, and how many
/// cells of the tested arm are further than that from the baseline's cell with the same seed. Empty with one
/// seed.
///
/// # Errors
/// If two cells of a task were measured on different rows.
pub(super) fn seeds(
    cells: &[CellResult],
    rows: &BTreeMap<String, CellRows>,
    tested: &Arm,
    baseline: &Arm,
) -> Result<String> {
    let pairs = PairedRows::new(cells, rows, [tested, baseline], |_| true)?;
    let mut table = String::new();
    for task in pairs.tasks() {
        for score in RowScore::ALL {
            let apart = apart(cells, rows, baseline, task, score);
            if apart.is_empty() {
                continue;
            }
            let (middle, limit) = (quantile(&apart, 0.5), quantile(&apart, 0.95));
            let differences = pairs.differences(task, score);
            let beyond = differences.iter().filter(|difference| difference.abs() > limit).count();
            let share = format!("{beyond} of {}", differences.len());
            let figures = [middle, limit].map(number).join(" | ");
            writeln!(table, "| {task} | {score} | {} | {figures} | {share} |", apart.len()).ok();
        }
    }
    if table.is_empty() {
        return Ok(table);
    }
    let [own, other] = [tested, baseline];
    Ok(format!(
        "\n## Chance: {other} against itself\n\nDistances between two seeds of {other} in the same setting, \
         and the number of cells of {own} that are further from the cell of {other} with the same seed than \
         95 % of these distances. If the two differ by chance alone, this is at most one cell in twenty, \
         since the same seed means the same rows and the same initial values.\n\n| task | score | pairs of \
         seeds | median distance | 95 % of distances | {own} beyond |\n|---|---|---|---|---|---|\n{table}"
    ))
}

/// The distances between all pairs of seeds of an arm in the same setting.
fn apart(
    cells: &[CellResult],
    rows: &BTreeMap<String, CellRows>,
    arm: &Arm,
    task: &str,
    score: RowScore,
) -> Vec<f64> {
    let mut settings: BTreeMap<(u64, usize), Vec<f64>> = BTreeMap::new();
    let own = |cell: &&CellResult| cell.key.task == task && cell.key.method == arm.method;
    for cell in cells.iter().filter(own).filter(|cell| cell.status == Status::Done) {
        if let Some(scores) = row_scores(rows, &cell.key, &arm.treatment) {
            let setting = (cell.key.lr.to_bits(), cell.key.batch_size);
            settings.entry(setting).or_default().push(scores.plain(score));
        }
    }
    let distances = |scores: &Vec<f64>| {
        let pair = |i: usize| scores[..i].iter().map(|other| (scores[i] - other).abs()).collect::<Vec<f64>>();
        (1..scores.len()).flat_map(pair).collect::<Vec<f64>>()
    };
    settings.values().flat_map(distances).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_that_lacks_a_rate_is_in_no_mean() {
        let rate = |seeds: &[(u64, f64)]| seeds.iter().map(|(seed, x)| (*seed, [*x, -x])).collect::<Vec<_>>();
        let mut rates =
            BTreeMap::from([(1, rate(&[(6, 1.0), (7, 3.0), (8, 50.0)])), (2, rate(&[(6, 2.0), (7, 4.0)]))]);
        assert_eq!(means_of_whole_seeds(&rates), [[2.0, -2.0], [3.0, -3.0]]);
        rates.insert(3, rate(&[(8, 1.0)]));
        assert!(means_of_whole_seeds(&rates).is_empty());
    }
}
