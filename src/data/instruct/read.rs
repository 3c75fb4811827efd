//! Reads prompts from JSON lines, a JSON array, or plain lines.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::IgnoredAny;

use super::format::{of_conversation, prompt, prompted, Format};
use super::prompted::Prompted;
use crate::data::lines::each_line;
use crate::data::records;
use crate::data::row::{self, Cell, Row};
use crate::error::{Error, Result};

/// Reads a file of JSON lines, of one JSON array or, for [`Format::Text`], of plain lines. Empty texts and
/// completions, and instructions with an empty output, of which Alpaca's file has some, are left out with a
/// warning.
///
/// # Errors
/// If the file cannot be read, is not UTF-8 or has no row with an answer, or if a row is not an object with
/// the format's fields. The error names the line, or the record of an array.
pub fn read(path: &Path, format: Format) -> Result<Vec<Prompted>> {
    let file = File::open(path).map_err(Error::io(path))?;
    read_from(file, path, format)
}

/// [`read`] from any source; `path` only names it in errors.
///
/// # Errors
/// As [`read`].
pub fn read_from(source: impl Read, path: &Path, format: Format) -> Result<Vec<Prompted>> {
    let (mut rows, mut beside) = (Vec::new(), None);
    each_row(source, path, format, |row| {
        rows.push(prompted(&row, format)?);
        if format == Format::Text {
            beside = beside.or(of_conversation(&row));
        }
        Ok(())
    })?;
    if let Some(name) = beside {
        tracing::warn!("{}: rows have a field {name:?}, which is not read: only \"text\" is", path.display());
    }
    let all = rows.len();
    let rows: Vec<Prompted> = rows.into_iter().flatten().collect();
    match (rows.len(), all - rows.len()) {
        (0, 0) => return Err(Error::format(path, "no examples")),
        (0, _) => return Err(Error::format(path, "every text or answer is empty")),
        (_, 0) => {}
        (_, left_out) => {
            tracing::warn!("{}: {left_out} rows have no text or answer and are left out", path.display())
        }
    }
    Ok(rows)
}

/// Reads the prompts of a file, for answers to them: of all rows in order, with and without an answer. A row of
/// [`Format::Text`] is a prompt itself.
///
/// # Errors
/// As [`read`], except that answers need not be there.
pub fn read_prompts(path: &Path, format: Format) -> Result<Vec<String>> {
    let file = File::open(path).map_err(Error::io(path))?;
    prompts_from(file, path, format)
}

/// [`read_prompts`] from any source; `path` only names it in errors.
///
/// # Errors
/// As [`read_prompts`].
pub fn prompts_from(source: impl Read, path: &Path, format: Format) -> Result<Vec<String>> {
    let mut prompts = Vec::new();
    each_row(source, path, format, |row| {
        prompts.push(prompt(&row, format)?);
        Ok(())
    })?;
    match prompts.is_empty() {
        true => Err(Error::format(path, "no examples")),
        false => Ok(prompts),
    }
}

/// Calls `keep` with every row of JSON lines, of a JSON array or, for [`Format::Text`], of plain lines, which
/// become rows with a `text`.
fn each_row(
    source: impl Read,
    path: &Path,
    format: Format,
    mut keep: impl FnMut(Row) -> std::result::Result<(), String>,
) -> Result<()> {
    let bytes = records::bytes(source, path)?;
    let is_text = format == Format::Text;
    match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'[') if !is_text || is_array(&bytes) => records::each_of_array(&bytes, path, keep),
        Some(b'{') => each_record(&bytes, path, keep),
        _ if is_text => each_line(&bytes[..], path, |number, line| match line.trim().is_empty() {
            true => Ok(()),
            false => keep(Row::from([("text".to_string(), Cell::Text(line.to_string()))]))
                .map_err(|reason| Error::format_at(path, number, reason)),
        }),
        _ => each_record(&bytes, path, keep),
    }
}

/// Calls `keep` with the record of each line that is not blank.
fn each_record(
    bytes: &[u8],
    path: &Path,
    mut keep: impl FnMut(Row) -> std::result::Result<(), String>,
) -> Result<()> {
    each_line(bytes, path, |number, line| match line.trim().is_empty() {
        true => Ok(()),
        false => {
            row::parse(line).and_then(&mut keep).map_err(|reason| Error::format_at(path, number, reason))
        }
    })
}

/// Whether the bytes of a text file are a JSON array: a whole one, or the beginning of one of objects, which
/// is then damaged. A plain text may begin with a bracket, too.
fn is_array(bytes: &[u8]) -> bool {
    let mut letters = bytes.iter().filter(|byte| !byte.is_ascii_whitespace());
    let of_objects = b"[{\"".iter().all(|letter| letters.next() == Some(letter));
    of_objects || serde_json::from_slice::<Vec<IgnoredAny>>(bytes).is_ok()
}
