//! Reads prompts from JSON lines, a JSON array, or plain lines.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, SeqAccess, Visitor};

use super::format::{prompted, Format};
use super::prompted::Prompted;
use crate::data::lines::{each_line, no_text};
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
pub fn read_from(mut source: impl Read, path: &Path, format: Format) -> Result<Vec<Prompted>> {
    let mut bytes = Vec::new();
    source.read_to_end(&mut bytes).map_err(Error::io(path))?;
    if let Some(reason) = no_text(&bytes) {
        return Err(Error::format(path, reason));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes); // the byte order mark of UTF-8
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    let mut rows = Vec::new();
    match first {
        Some(b'[') if format != Format::Text || is_array(bytes) => {
            let mut json = serde_json::Deserializer::from_slice(bytes);
            let read = Records(format).deserialize(&mut json).and_then(|rows| json.end().map(|()| rows));
            let read = read
                .map_err(|e| Error::format_at(path, e.line(), format!("not a JSON array of objects: {e}")))?;
            rows = read.map_err(|reason| Error::format(path, reason))?;
        }
        first => each_line(bytes, path, |number, line| {
            if line.trim().is_empty() {
                return Ok(());
            }
            let row = if format == Format::Text && first != Some(&b'{') {
                Ok(Some(Prompted { answer: line.to_string(), ..Prompted::default() }))
            } else {
                row::parse(line).and_then(|record| prompted(&record, format))
            };
            rows.push(row.map_err(|reason| Error::format_at(path, number, reason))?);
            Ok(())
        })?,
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

/// Whether the bytes of a text file are a JSON array: a whole one, or the beginning of one of objects, which
/// is then damaged. A plain text may begin with a bracket, too.
fn is_array(bytes: &[u8]) -> bool {
    let mut letters = bytes.iter().filter(|byte| !byte.is_ascii_whitespace());
    let of_objects = b"[{\"".iter().all(|letter| letters.next() == Some(letter));
    of_objects || serde_json::from_slice::<Vec<IgnoredAny>>(bytes).is_ok()
}

/// Reads the records of a JSON array one at a time, so that only one is in memory. The inner result is the
/// error of the first invalid record, if any.
struct Records(Format);

impl<'de> DeserializeSeed<'de> for Records {
    type Value = std::result::Result<Vec<Option<Prompted>>, String>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Records {
    type Value = std::result::Result<Vec<Option<Prompted>>, String>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut records: A) -> std::result::Result<Self::Value, A::Error> {
        let mut rows = Vec::new();
        while let Some(record) = records.next_element::<Row>()? {
            match prompted(&record, self.0) {
                Ok(row) => rows.push(row),
                Err(reason) => {
                    // Read to the end, so that invalid JSON further down is reported instead.
                    while records.next_element::<IgnoredAny>()?.is_some() {}
                    return Ok(Err(format!("record {}: {reason}", rows.len() + 1)));
                }
            }
        }
        Ok(Ok(rows))
    }
}
