//! Running the cells of a grid: each once, each in a folder of its own, from wherever it stopped.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use super::cell::{CellCost, CellKey, CellResult, Status};
use super::constants;
use super::grid::Shard;
use super::rows::CellRows;
use super::store::{settings_path, Store};
use crate::error::{Error, Result};
use crate::util::files;

/// How far a shard is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Progress {
    /// Cells of the shard.
    pub total: usize,
    /// Cells with a result, those of earlier runs among them.
    pub done: usize,
    /// Cells of these that failed or diverged.
    pub failed: usize,
    /// Seconds that the rest may take: as many as a cell took on the average in this run. None before
    /// the first.
    pub seconds_left: Option<f64>,
}

/// Runs the cells of `shard` that have no result below `dir` yet, packed or not, in their order. `settings` is what
/// they all depend on; it is kept in `settings.json`. A cell's result appears whole or not at all, so
/// that a run may be killed at any moment and begun again. Several shards may share the folder.
///
/// `progress` is told of every cell before it runs, and once at the end.
///
/// # Errors
/// If the folder belongs to a study with other settings, or a file cannot be read or written. What goes
/// wrong inside a cell is its result.
pub fn run(
    dir: &Path,
    settings: &serde_json::Value,
    cells: &[CellKey],
    shard: Shard,
    cell: &mut dyn FnMut(&CellKey) -> (CellResult, CellCost, CellRows),
    progress: &mut dyn FnMut(&Progress, Option<&CellKey>),
) -> Result<Progress> {
    claim(dir, settings)?;
    let store = Store::open(dir)?;
    let own = cells.iter().enumerate().filter(|(place, _)| shard.owns(*place)).map(|(_, key)| key);
    let mut now = Progress::default();
    let mut waiting = Vec::new();
    for key in own {
        now.total += 1;
        match store.get(key)? {
            Some(found) => count(&mut now, &found.result),
            None => waiting.push(key),
        }
    }
    let clock = Instant::now();
    for (ran, key) in waiting.iter().enumerate() {
        if ran > 0 {
            let each = clock.elapsed().as_secs_f64() / ran as f64;
            now.seconds_left = Some(each * (waiting.len() - ran) as f64);
        }
        progress(&now, Some(key));
        let (result, cost, rows) = cell(key);
        store.add(&result, &cost, &rows)?;
        count(&mut now, &result);
    }
    now.seconds_left = Some(0.0);
    progress(&now, None);
    Ok(now)
}

fn count(progress: &mut Progress, result: &CellResult) {
    progress.done += 1;
    progress.failed += usize::from(result.status != Status::Done);
}

/// Makes the folder the study's own, or checks that it is.
fn claim(dir: &Path, settings: &serde_json::Value) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let path = settings_path(dir);
    let text = format!("{settings:#}\n");
    match std::fs::read_to_string(&path) {
        Ok(found) if found == text => Ok(()),
        Ok(found) => match differing(&found, settings) {
            Some(names) if names.is_empty() => Ok(()),
            names => {
                let names = names.map(|names| format!(" ({})", names.join(", "))).unwrap_or_default();
                let reason = format!(
                    "it is of a study with other settings{names}: give another folder, or these settings"
                );
                Err(Error::format(path, reason))
            }
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => files::write(&path, text.as_bytes()),
        Err(error) => Err(Error::io(path)(error)),
    }
}

/// The names of settings that are not those of the file with this text; None if it is no object. What an older
/// version did not write down cannot differ.
fn differing(found: &str, settings: &serde_json::Value) -> Option<Vec<String>> {
    let found: serde_json::Value = serde_json::from_str(found).ok()?;
    let (found, now) = (found.as_object()?, settings.as_object()?);
    let names: BTreeSet<&String> = found.keys().chain(now.keys()).collect();
    let unknown = |name: &str| constants::NAMES.contains(&name) && !found.contains_key(name);
    let differ = names.into_iter().filter(|name| found.get(*name) != now.get(*name) && !unknown(name));
    Some(differ.cloned().collect())
}
