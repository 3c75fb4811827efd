//! Arms of a study: what is compared with what, and what tables call it.

use std::collections::BTreeSet;

pub(super) use super::super::cell::Arm;
use super::super::cell::{CellKey, CellResult};

/// The method whose mean prediction the others are tested against: by this name or, where a grid has
/// none, the first of it with options, or else the first that begins with it.
const TESTED: &str = "monteclora";
/// The method that it is tested against above all, and that costs are relative to: by this name or, where
/// a grid has none, the first with options of its own.
pub(super) const BASELINE: &str = "lora";

/// The prediction that every method has: of the parameters, or of the posterior's mean.
pub(super) const MEAN: &str = "mean";

/// The arms of each task. That of a method that has no done cell on a task is its mean.
pub(super) fn arms(cells: &[CellResult]) -> BTreeSet<(String, Arm)> {
    let of_cell = |cell: &CellResult| {
        let CellKey { task, method, .. } = cell.key.clone();
        let arms = cell.arms.keys().cloned().chain([MEAN.to_string()]);
        arms.map(|arm| (task.clone(), (method.clone(), arm))).collect::<Vec<_>>()
    };
    cells.iter().flat_map(of_cell).collect()
}

/// The arm that is tested against the others, if the grid has one.
pub(super) fn tested(cells: &[CellResult]) -> Option<Arm> {
    let mut methods: Vec<&String> = cells.iter().map(|cell| &cell.key.method).collect();
    methods.sort();
    // Without options it comes first.
    let own = methods.iter().find(|method| method.split(':').next() == Some(TESTED));
    let method = own.or(methods.iter().find(|method| method.starts_with(TESTED)))?;
    Some((method.to_string(), MEAN.to_string()))
}

/// The method that others are compared with, if there is one.
pub(super) fn baseline<'a>(keys: impl Iterator<Item = &'a CellKey>) -> Option<String> {
    let mut methods: Vec<&String> = keys.map(|key| &key.method).collect();
    methods.sort(); // without options it comes first
    let plain = |method: &str| method.split(':').next() == Some(BASELINE);
    methods.into_iter().find(|method| plain(method)).cloned()
}

/// A cell but for its method.
pub(super) fn settings_of(key: &CellKey) -> String {
    CellKey { method: String::new(), ..key.clone() }.folder_name()
}

/// What tables call an arm.
pub(super) fn name((method, arm): &Arm) -> String {
    format!("{method} ({arm})")
}

/// A figure in a table; nothing has none.
pub(super) fn number(value: f64) -> String {
    if value.is_nan() {
        return "-".to_string();
    }
    format!("{value:.4}")
}
