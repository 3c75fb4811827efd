//! Runs the cells of a grid, each once and in its own folder, and resumes where a run stopped.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use super::cell::{CellCost, CellKey, CellResult, Status};
use super::checksums;
use super::grid::Shard;
use super::rows::CellRows;
use super::store::{settings_path, Store};
use crate::error::{Error, Result};
use crate::util::files;

/// The progress of a shard.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Progress {
    /// The number of cells in the shard.
    pub total: usize,
    /// The number of cells with a result, including those of earlier runs.
    pub done: usize,
    /// The number of these cells that failed or diverged.
    pub failed: usize,
    /// The estimated seconds for the remaining cells, from the mean time per cell in this run. `None` before
    /// the first cell is complete.
    pub seconds_left: Option<f64>,
}

/// Runs the cells of `shard` that have no result in the folder `dir` yet, packed or not, in order. `settings`
/// is everything that all cells depend on, and is stored in `settings.json`. A cell's result is written
/// completely or not at all, so a run may be killed and restarted at any time. Several shards may share the
/// folder. A cell that failed (full disk, lost device) is retried by the next run; one that diverged is not,
/// since it would diverge again.
///
/// `progress` is called before every cell, and once at the end.
///
/// # Errors
/// If the folder belongs to a study with other settings, or a file cannot be read or written. Errors inside a
/// cell are its result.
pub fn run(
    dir: &Path,
    settings: &Value,
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
            Some(found) if found.result.status != Status::Failed => count(&mut now, &found.result),
            _ => waiting.push(key),
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

/// Writes the study's settings into the folder, or checks that they agree with the stored ones. A grid may
/// grow by methods and tasks, whose settings are then added.
fn claim(dir: &Path, settings: &Value) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let path = settings_path(dir);
    let write = |settings: &Value| files::write(&path, format!("{settings:#}\n").as_bytes());
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return write(settings),
        Err(error) => return Err(Error::io(path)(error)),
    };
    let found: Value = serde_json::from_str(&text).unwrap_or_default();
    let names = differing(&found, settings);
    if !found.is_object() || !names.is_empty() {
        let names = if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) };
        let reason =
            format!("it belongs to a study with other settings{names}: give another folder, or its settings");
        return Err(Error::format(path, reason));
    }
    match checksums::joined(&found, settings) {
        Some(joined) => write(&joined),
        None => Ok(()),
    }
}

/// The names of settings that differ from the stored ones. A setting that an older version did not store does
/// not differ.
fn differing(found: &Value, settings: &Value) -> Vec<String> {
    let (Some(found), Some(now)) = (found.as_object(), settings.as_object()) else { return Vec::new() };
    let names: BTreeSet<&String> = found.keys().chain(now.keys()).collect();
    let differ = names.into_iter().filter(|name| {
        let (found, now) = (found.get(*name), now.get(*name));
        found != now && !checksums::agree(name, found, now)
    });
    differ.cloned().collect()
}
