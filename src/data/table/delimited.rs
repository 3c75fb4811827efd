//! Reads tables whose fields are separated by commas, semicolons or tabs.

use std::path::Path;

use csv::{ErrorKind, Position, ReaderBuilder, StringRecord};

use super::columns::no_column;
use crate::data::row::Cell;
use crate::error::{Error, Result};

/// The callback for a row: its line, and its values in the order of the requested columns.
pub(super) type Take<'a> = dyn FnMut(usize, std::result::Result<Vec<Cell>, String>) -> Result<()> + 'a;

/// Calls `take` with the values of every row in the columns `names`. The file's delimiter is the first of
/// `delimiters` that gives a header with all of them. If tab is the only delimiter, quotes are ordinary text.
///
/// # Errors
/// If a column is missing or occurs twice, a row has more or fewer fields than the header, a quoted field is
/// not closed or contains a quote that is not doubled, or `take` fails.
pub(super) fn each_row(
    text: &str,
    path: &Path,
    delimiters: &[u8],
    names: &[&str],
    take: &mut Take,
) -> Result<()> {
    let quoted = delimiters != b"\t";
    let builder = |delimiter: u8| {
        let mut builder = ReaderBuilder::new();
        builder.delimiter(delimiter).quoting(quoted);
        builder
    };
    let mut found = Err(Error::format(path, "no header"));
    for delimiter in delimiters {
        let header = builder(*delimiter).from_reader(text.as_bytes()).headers().cloned();
        match header
            .map_err(|error| csv_error(text, path, &error))
            .and_then(|header| places(&header, names, path))
        {
            Ok(places) => {
                found = Ok((*delimiter, places));
                break;
            }
            // If no delimiter fits, report the error of the first.
            error if *delimiter == delimiters[0] => found = error.map(|places| (*delimiter, places)),
            _ => {}
        }
    }
    let (delimiter, places) = found?;
    if quoted {
        check_quotes(text, delimiter).map_err(|(line, reason)| Error::format_at(path, line, reason))?;
    }
    for record in builder(delimiter).from_reader(text.as_bytes()).into_records() {
        let record = record.map_err(|error| csv_error(text, path, &error))?;
        let line = line_of(text, record.position());
        let cell = |place: &usize| Cell::Text(record.get(*place).unwrap_or_default().to_owned());
        take(line, Ok(places.iter().map(cell).collect()))?;
    }
    Ok(())
}

/// The positions of the columns.
fn places(header: &StringRecord, names: &[&str], path: &Path) -> Result<Vec<usize>> {
    let present: Vec<&str> = header.iter().map(str::trim).collect();
    let place = |name: &&str| {
        let mut found = present.iter().enumerate().filter(|(_, present)| *present == name);
        match (found.next(), found.next()) {
            (Some((place, _)), None) => Ok(place),
            (Some(_), Some(_)) => {
                Err(Error::format_at(path, 1, format!("the header has the column {name:?} twice")))
            }
            (None, _) => Err(Error::format_at(path, 1, no_column(name, &present))),
        }
    };
    names.iter().map(place).collect()
}

/// The line on which a row begins. The reader's position is directly after the previous row, so skip empty
/// lines.
fn line_of(text: &str, position: Option<&Position>) -> usize {
    let Some(position) = position else { return 0 };
    let rest = text.as_bytes().get(position.byte() as usize..).unwrap_or_default();
    let empty = rest.iter().take_while(|byte| matches!(byte, b'\n' | b'\r'));
    position.line() as usize + empty.filter(|byte| **byte == b'\n').count()
}

fn csv_error(text: &str, path: &Path, error: &csv::Error) -> Error {
    match error.kind() {
        ErrorKind::UnequalLengths { pos, expected_len, len } => Error::format_at(
            path,
            line_of(text, pos.as_ref()),
            format!("expected {expected_len} columns, got {len}"),
        ),
        _ => Error::format(path, error.to_string()),
    }
}

/// Checks that quotes enclose whole fields. The csv reader does not: a quote that is never closed would
/// silently merge all following rows up to the next quote into one.
fn check_quotes(text: &str, delimiter: u8) -> std::result::Result<(), (usize, String)> {
    let bytes = text.as_bytes();
    let (mut at, mut line, mut starts) = (0, 1, true);
    while let Some(byte) = bytes.get(at) {
        if starts && *byte == b'"' {
            let opened = line;
            loop {
                at += 1;
                match (bytes.get(at), bytes.get(at + 1)) {
                    (Some(b'"'), Some(b'"')) => at += 1,
                    (Some(b'"'), _) => break,
                    (Some(b'\n'), _) => line += 1,
                    (Some(_), _) => {}
                    (None, _) => return Err((opened, "a quote opens a field and is never closed".into())),
                }
            }
            if let Some(next) = bytes.get(at + 1).filter(|next| ![delimiter, b'\n', b'\r'].contains(next)) {
                let reason = format!(
                    "a quoted field that begins here ends on line {line} before {:?}: double the quotes \
                     inside it",
                    char::from(*next)
                );
                return Err((opened, reason));
            }
            starts = false;
        } else {
            starts = [delimiter, b'\n', b'\r'].contains(byte);
            line += usize::from(*byte == b'\n');
        }
        at += 1;
    }
    Ok(())
}
