//! The costs of the methods of a study.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::super::cell::{CellCost, CellKey};
use super::arm::{baseline, number, settings_of, BASELINE};
use crate::metrics::median;

/// The table of step time, training time and memory, as multiples of the baseline's in the cell with the same
/// settings.
pub(super) fn costs_markdown(costs: &[(&CellKey, CellCost)]) -> String {
    let name = baseline(costs.iter().map(|(key, _)| *key)).map_or(BASELINE.to_string(), |arm| arm.method);
    let baseline: BTreeMap<String, &CellCost> = costs
        .iter()
        .filter(|(key, _)| key.method == name)
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
        "# Costs\n\nMultiples of {name} in the cell with the same settings, medians. They vary from run \
         to run with the load of the machine.\n\n| method | cells | step | training | peak memory |\n\
         |---|---|---|---|---|\n"
    );
    for (method, columns) in found {
        let medians = columns.each_ref().map(|values| number(median(values))).join(" | ");
        writeln!(text, "| {method} | {} | {medians} |", columns[0].len()).ok();
    }
    text
}
