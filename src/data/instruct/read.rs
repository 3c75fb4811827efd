//! Reads prompts from JSON lines, a JSON array, or plain lines.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::IgnoredAny;

use super::format::{of_conversation, prompted, Format};
use super::prompted::Prompted;
use crate::data::lines::each_line;
use crate::data::records;
use crate::data::row::{self, Row};
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
    let bytes = records::bytes(source, path)?;
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    let (mut rows, mut beside) = (Vec::new(), None);
    let keep = |record: Row| {
        rows.push(prompted(&record, format)?);
        if format == Format::Text {
            beside = beside.or(of_conversation(&record));
        }
        Ok(())
    };
    match first {
        Some(b'[') if format != Format::Text || is_array(&bytes) => {
            records::each_of_array(&bytes, path, keep)?;
        }
        Some(b'{') if format == Format::Text => each_record(&bytes, path, keep)?,
        _ if format == Format::Text => each_line(&bytes[..], path, |_, line| {
            if !line.trim().is_empty() {
                rows.push(Some(Prompted { answer: line.to_string(), ..Prompted::default() }));
            }
            Ok(())
        })?,
        _ => each_record(&bytes, path, keep)?,
    }
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
