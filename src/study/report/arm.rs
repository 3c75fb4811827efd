//! Which arms of a study are compared.

use std::collections::BTreeSet;

pub(super) use super::super::arm::Arm;
use super::super::cell::{CellKey, CellResult};
use super::super::treatment;

/// The method whose mean prediction is tested against the others: the one of this name; otherwise the first
/// of this name with options; otherwise the first whose name begins with it.
const TESTED: &str = "monteclora";
/// The main method that it is tested against, to which costs are relative: the one of this name, otherwise
/// the first of this name with options.
pub(super) const BASELINE: &str = "lora";

/// The arms of each task. Every method has at least its mean, also without a finished cell.
pub(super) fn arms(cells: &[CellResult]) -> BTreeSet<(String, Arm)> {
    let of_cell = |cell: &CellResult| {
        let CellKey { task, method, .. } = cell.key.clone();
        let own = cell.arms.keys().map(|treatment| Arm::new(&method, treatment));
        own.chain([Arm::mean_of(&method)]).map(|arm| (task.clone(), arm)).collect::<Vec<_>>()
    };
    cells.iter().flat_map(of_cell).collect()
}

/// The arms of all tasks.
pub(super) fn of_any_task(cells: &[CellResult]) -> BTreeSet<Arm> {
    arms(cells).into_iter().map(|(_, arm)| arm).collect()
}

/// The mean of every method. A method without options comes before the same one with options.
fn means<'a>(keys: impl Iterator<Item = &'a CellKey>) -> BTreeSet<Arm> {
    keys.map(|key| Arm::mean_of(&key.method)).collect()
}

/// The arm that is tested against the others, if the study has one.
pub(super) fn tested(cells: &[CellResult]) -> Option<Arm> {
    let means = means(cells.iter().map(|cell| &cell.key));
    let own = means.iter().find(|arm| arm.recipe_name() == TESTED);
    own.or(means.iter().find(|arm| arm.method.starts_with(TESTED))).cloned()
}

/// The mean of the method that the others are compared with, if there is one.
pub(super) fn baseline<'a>(keys: impl Iterator<Item = &'a CellKey>) -> Option<Arm> {
    means(keys).into_iter().find(|arm| arm.recipe_name() == BASELINE)
}

/// The draws of the tested method, if it has any.
pub(super) fn draws_of(tested: &Arm, cells: &[CellResult]) -> Option<Arm> {
    let own = |arm: &Arm| arm.method == tested.method && treatment::is_draws(&arm.treatment);
    arms(cells).into_iter().map(|(_, arm)| arm).find(own)
}

/// Whether an arm is fitted on held-out rows. It then belongs to another recipe than the baseline: to the
/// baseline's method trained on fewer rows.
pub(super) fn is_fitted_held_out(arm: &Arm, baseline: &Arm) -> bool {
    arm.method != baseline.method
        && arm.recipe_name() == baseline.recipe_name()
        && treatment::is_fitted_held_out(&arm.treatment)
}

/// A name for a cell's settings without its method.
pub(super) fn settings_of(key: &CellKey) -> String {
    CellKey { method: String::new(), ..key.clone() }.folder_name()
}

/// A figure in a table; `-` for NaN.
pub(super) fn number(value: f64) -> String {
    if value.is_nan() {
        return "-".to_string();
    }
    format!("{value:.4}")
}
