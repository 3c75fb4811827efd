//! The arms of a study: which ones are compared, and their names in tables.

use std::collections::BTreeSet;

pub(super) use super::super::cell::Arm;
use super::super::cell::{CellKey, CellResult};
use super::super::treatment::MEAN;

/// The method whose mean prediction is tested against the others: the one of this name; otherwise the first
/// of this name with options; otherwise the first whose name begins with it.
const TESTED: &str = "monteclora";
/// The main method that it is tested against, to which costs are relative: the one of this name, otherwise
/// the first of this name with options.
pub(super) const BASELINE: &str = "lora";

/// The arms of each task. Every method has at least [`MEAN`], also without a finished cell.
pub(super) fn arms(cells: &[CellResult]) -> BTreeSet<(String, Arm)> {
    let of_cell = |cell: &CellResult| {
        let CellKey { task, method, .. } = cell.key.clone();
        let arms = cell.arms.keys().cloned().chain([MEAN.to_string()]);
        arms.map(|arm| (task.clone(), (method.clone(), arm))).collect::<Vec<_>>()
    };
    cells.iter().flat_map(of_cell).collect()
}

/// The arm that is tested against the others, if the study has one.
pub(super) fn tested(cells: &[CellResult]) -> Option<Arm> {
    let mut methods: Vec<&String> = cells.iter().map(|cell| &cell.key.method).collect();
    methods.sort();
    // The method without options sorts first.
    let own = methods.iter().find(|method| method.split(':').next() == Some(TESTED));
    let method = own.or(methods.iter().find(|method| method.starts_with(TESTED)))?;
    Some((method.to_string(), MEAN.to_string()))
}

/// The method that the others are compared with, if there is one.
pub(super) fn baseline<'a>(keys: impl Iterator<Item = &'a CellKey>) -> Option<String> {
    let mut methods: Vec<&String> = keys.map(|key| &key.method).collect();
    methods.sort(); // the method without options sorts first
    let plain = |method: &str| method.split(':').next() == Some(BASELINE);
    methods.into_iter().find(|method| plain(method)).cloned()
}

/// A name for a cell's settings without its method.
pub(super) fn settings_of(key: &CellKey) -> String {
    CellKey { method: String::new(), ..key.clone() }.folder_name()
}

/// The name of an arm in tables.
pub(super) fn name((method, arm): &Arm) -> String {
    format!("{method} ({arm})")
}

/// A figure in a table; `-` for NaN.
pub(super) fn number(value: f64) -> String {
    if value.is_nan() {
        return "-".to_string();
    }
    format!("{value:.4}")
}
