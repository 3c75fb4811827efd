//! The storage of a study's cells: while it runs, a folder per cell (`result.json`, `cost.json` and, if the
//! cell kept its rows, `rows.safetensors`); once packed, a line per cell in `cells.jsonl`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::cell::{CellCost, CellKey, CellResult, Status};
use super::rows::CellRows;
use crate::error::{Error, Result};
use crate::util::{files, json};

/// The finished cells of a packed study, one JSON object per line, in the order of their folders' names.
const PACKED: &str = "cells.jsonl";
/// The result of a cell, in its folder.
const RESULT: &str = "result.json";
/// The cost of a cell, in its folder.
const COST: &str = "cost.json";
/// The predictions of a cell for every row (`row`, `label`, log-probabilities), if it kept them. In a packed
/// study, the file has those of all cells, with the cell's folder as the prefix of tensor names.
const ROWS: &str = "rows.safetensors";

/// A finished cell as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredCell {
    /// The result.
    pub result: CellResult,
    /// The cost, if known.
    pub cost: Option<CellCost>,
}

/// Reads the finished cells of the study in the folder `dir`, packed or not, in the order of their folders'
/// names.
///
/// # Errors
/// If the folder or a file of a cell cannot be read, a line of `cells.jsonl` is damaged (the error names it),
/// the packed result of a cell differs from the one in its folder, or a folder does not have the name of its
/// cell.
pub fn read_cells(dir: &Path) -> Result<Vec<StoredCell>> {
    Ok(Store::open(dir)?.all()?.into_values().collect())
}

/// Reads the rows that the finished cells of the study in the folder `dir` kept, packed or not, by the names
/// of the cells' folders ([`CellKey::folder_name`]). Cells with several tasks are split as by
/// [`CellResult::by_task`].
///
/// # Errors
/// As [`read_cells`], and if a file of rows cannot be read or is malformed.
pub fn read_rows(dir: &Path) -> Result<BTreeMap<String, CellRows>> {
    let cells = Store::open(dir)?.all()?;
    let mut found = BTreeMap::new();
    let mut take = |path: &Path, cells: &[(&CellResult, String)]| -> Result<()> {
        let Some(bytes) = present(path, fs::read(path))? else { return Ok(()) };
        let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::format(path, e.to_string()))?;
        for (cell, prefix) in cells {
            for own in cell.by_task() {
                let task = if cell.tasks.is_empty() { String::new() } else { format!("{}/", own.key.task) };
                let rows = CellRows::read(&file, &format!("{prefix}{task}"), path)?;
                found.extend(rows.map(|rows| (own.key.folder_name(), rows)));
            }
        }
        Ok(())
    };
    let packed: Vec<_> = cells.iter().map(|(name, cell)| (&cell.result, format!("{name}/"))).collect();
    take(&dir.join(ROWS), &packed)?;
    for (name, cell) in &cells {
        take(&dir.join(name).join(ROWS), &[(&cell.result, String::new())])?;
    }
    Ok(found)
}

/// Packs the finished cells of the study in the folder `dir`: `cells.jsonl` and, if cells kept their rows,
/// one `rows.safetensors` replace the folders of the cells. The same cells give the same bytes; cells packed
/// earlier are kept. Returns the number of packed cells.
///
/// The study can be continued and reported as before. If packing is killed half-way, nothing is lost: pack
/// again. No process may run the study at the same time.
///
/// # Errors
/// As [`read_cells`], and if there is no cell, another process is packing, or a file cannot be written.
pub fn pack(dir: &Path) -> Result<usize> {
    fs::metadata(dir).map_err(Error::io(dir))?;
    let _lock = files::lock(dir)?;
    files::remove_stale(dir)?;
    let cells = Store::open(dir)?.all()?;
    if cells.is_empty() {
        return Err(Error::format(dir, "there is no finished cell to pack"));
    }
    let mut lines = String::new();
    for cell in cells.values() {
        lines.push_str(&line(&dir.join(PACKED), cell)?);
    }
    pack_rows(dir, cells.keys())?;
    files::write(&dir.join(PACKED), lines.as_bytes())?;
    cells.keys().try_for_each(|name| remove(&dir.join(name)))?;
    Ok(cells.len())
}

/// The path of a study's settings.
pub(super) fn settings_path(dir: &Path) -> PathBuf {
    dir.join("settings.json")
}

/// The cells of a study. Packed cells are read when it is opened, the others on demand.
pub(super) struct Store {
    dir: PathBuf,
    packed: BTreeMap<String, StoredCell>,
}

impl Store {
    /// # Errors
    /// If `cells.jsonl` exists and cannot be read.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(PACKED);
        let mut packed = BTreeMap::new();
        let text = present(&path, fs::read_to_string(&path))?.unwrap_or_default();
        for (line, number) in text.lines().zip(1..) {
            let damaged = |e: serde_json::Error| {
                let text = e.to_string();
                // serde's line number is relative to this line: drop it.
                let reason = text.rsplit_once(" at line ").map_or(&*text, |(reason, _)| reason);
                Error::format_at(&path, number, format!("malformed: {reason}"))
            };
            let cell: StoredCell = serde_json::from_str(line).map_err(damaged)?;
            let name = cell.result.key.folder_name();
            if packed.contains_key(&name) {
                return Err(Error::format_at(&path, number, format!("{name} comes twice")));
            }
            packed.insert(name, cell);
        }
        Ok(Self { dir: dir.to_path_buf(), packed })
    }

    /// Returns a cell, if it is finished.
    ///
    /// # Errors
    /// If a file cannot be read, or contains another cell.
    pub fn get(&self, key: &CellKey) -> Result<Option<StoredCell>> {
        let name = key.folder_name();
        match self.named(&name)? {
            Some(StoredCell { result, .. }) if result.key != *key => {
                let reason = format!("expected the result of {key:?}, got {:?}", result.key);
                Err(Error::format(self.dir.join(name), reason))
            }
            found => Ok(found),
        }
    }

    /// Writes a cell into its own folder. Each file is written completely or not at all, the result last, so
    /// that a cell with a result is complete.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn add(&self, result: &CellResult, cost: &CellCost, rows: &CellRows) -> Result<()> {
        let folder = self.dir.join(result.key.folder_name());
        fs::create_dir_all(&folder).map_err(Error::io(&*folder))?;
        // Remove the result of an earlier failed run, which does not belong to the new rows.
        present(&folder.join(RESULT), fs::remove_file(folder.join(RESULT)))?;
        let write = |path: PathBuf, text: Result<String>| files::write(&path, text?.as_bytes());
        if rows.is_empty() {
            present(&folder.join(ROWS), fs::remove_file(folder.join(ROWS)))?;
        } else {
            rows.write(&folder.join(ROWS))?;
        }
        write(folder.join(COST), line(&folder, cost))?;
        write(folder.join(RESULT), line(&folder, result))
    }

    /// All finished cells by their folders' names. A copy of a cell under another name is an error, since it
    /// would count twice.
    fn all(&self) -> Result<BTreeMap<String, StoredCell>> {
        let mut names: BTreeSet<String> = self.packed.keys().cloned().collect();
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&*self.dir))? {
            // The names of cells' folders are valid UTF-8; skip other names.
            names.extend(entry.map_err(Error::io(&*self.dir))?.file_name().into_string());
        }
        let mut cells = BTreeMap::new();
        for name in names {
            let Some(cell) = self.named(&name)? else { continue };
            let own = cell.result.key.folder_name();
            if own != name {
                let reason = format!("it holds the result of {own}: move it out of the study's folder");
                return Err(Error::format(self.dir.join(name), reason));
            }
            cells.insert(name, cell);
        }
        Ok(cells)
    }

    /// The cell in the folder of this name, or packed from it. A failed cell is run again, so the result in a
    /// folder replaces a packed failure.
    fn named(&self, name: &str) -> Result<Option<StoredCell>> {
        let folder = self.dir.join(name);
        let (path, packed) = (folder.join(RESULT), self.packed.get(name));
        let found = read::<CellResult>(&path)?;
        let packed = packed.filter(|cell| found.is_none() || cell.result.status != Status::Failed);
        match (packed, found) {
            (Some(packed), Some(result)) if packed.result != result => {
                Err(Error::format(path, format!("it differs from the result of this cell in {PACKED}")))
            }
            // A killed packing may leave an incomplete folder; the packed line is complete.
            (Some(packed), _) => Ok(Some(packed.clone())),
            (None, Some(result)) => Ok(Some(StoredCell { result, cost: read(&folder.join(COST))? })),
            (None, None) => Ok(None),
        }
    }
}

/// Adds the rows of these cells to those that were packed earlier.
fn pack_rows<'a>(dir: &Path, names: impl Iterator<Item = &'a String>) -> Result<()> {
    let place = dir.join(ROWS);
    let mut sources = Vec::new();
    // Read first, so that rows in a folder, from the cell's last run, replace them.
    if let Some(bytes) = present(&place, fs::read(&place))? {
        sources.push((String::new(), place.clone(), bytes));
    }
    let packed = sources.len();
    for name in names {
        let path = dir.join(name).join(ROWS);
        if let Some(bytes) = present(&path, fs::read(&path))? {
            sources.push((format!("{name}/"), path, bytes));
        }
    }
    if sources.len() == packed {
        return Ok(());
    }
    let mut tensors = BTreeMap::new();
    for (prefix, path, bytes) in &sources {
        let file = SafeTensors::deserialize(bytes).map_err(|e| Error::format(path, e.to_string()))?;
        tensors.extend(file.tensors().into_iter().map(|(name, view)| (format!("{prefix}{name}"), view)));
    }
    files::write_safetensors(&place, tensors)
}

/// Removes a packed cell's files and, if nothing else is in it, its folder.
fn remove(folder: &Path) -> Result<()> {
    files::remove_stale(folder)?;
    for path in [RESULT, COST, ROWS].map(|file| folder.join(file)) {
        present(&path, fs::remove_file(&path))?;
    }
    fs::remove_dir(folder).ok();
    Ok(())
}

/// A value as a line of JSON. `path` appears in errors.
fn line(path: &Path, value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string(value).map_err(|e| Error::format(path, e.to_string()))?;
    Ok(format!("{text}\n"))
}

/// Reads a JSON file; `None` if there is no file.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = present(path, fs::read_to_string(path))?;
    text.map(|text| json::parse(text, path)).transpose()
}

/// Turns the result of an operation on the file `path` into `None` if there is no such file.
fn present<T>(path: &Path, done: std::io::Result<T>) -> Result<Option<T>> {
    match done {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(Error::io(path)(error)),
    }
}

#[cfg(test)]
mod tests;
