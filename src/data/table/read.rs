//! Reads the rows of a table in any of the supported formats.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};

use super::columns::Columns;
use super::delimited;
use crate::data::lines::{each_line, no_text};
use crate::data::row::{self, Cell, Row};
use crate::error::{Error, Result};

/// A row as spelled in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The text, or the first of a pair.
    pub text_a: String,
    /// The second text of a pair.
    pub text_b: Option<String>,
    /// The label without surrounding white space; `None` if there is none.
    pub label: Option<String>,
    /// The line on which the row begins, or its number in a file without lines; from 1.
    place: usize,
}

/// The rows of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The file.
    pub path: PathBuf,
    /// Its rows, at least one.
    pub records: Vec<Record>,
    by_line: bool,
}

impl Table {
    /// The error for a record.
    pub(super) fn fault(&self, record: &Record, reason: &str) -> Error {
        fault(&self.path, self.by_line, record.place, reason)
    }
}

/// Reads the columns of a table. The file name's extension determines the format:
///
/// - `.csv`: a header, then rows separated by commas (or by semicolons or tabs, whichever the header uses);
///   quoted fields may contain delimiters, line ends and doubled quotes;
/// - `.tsv`, `.txt`: a header, then rows separated by tabs; quotes are ordinary text;
/// - `.jsonl`, `.ndjson`, `.json`: one JSON object per line, or one array of objects;
/// - `.parquet`: columns of plain values; classes with names (`ClassLabel` of Hugging Face's datasets) are
///   read by name.
///
/// Texts are UTF-8.
///
/// # Errors
/// If the file cannot be read, has another extension, lacks a column or has no row, or if a row is malformed,
/// has no text or has several labels. The error names the file, the line or row, and the columns present.
pub fn read(path: impl AsRef<Path>, columns: &Columns) -> Result<Table> {
    let path = path.as_ref();
    if ending(path) == "parquet" {
        return non_empty(parquet(path, columns)?);
    }
    read_from(File::open(path).map_err(Error::io(path))?, path, columns)
}

/// [`read`] from any source of text; `path` names it in errors and determines the format by its extension.
///
/// # Errors
/// As [`read`].
pub fn read_from(mut source: impl Read, path: &Path, columns: &Columns) -> Result<Table> {
    let (names, ending) = (columns.names()?, ending(path));
    if !["csv", "tsv", "txt", "jsonl", "ndjson", "json"].contains(&ending.as_str()) {
        let reason = "expected a file that ends in .csv, .tsv, .txt, .jsonl, .ndjson, .json or .parquet";
        return Err(Error::format(path, reason));
    }
    let mut bytes = Vec::new();
    source.read_to_end(&mut bytes).map_err(Error::io(path))?;
    let text = text_of(&bytes, path)?;
    let by_line = !(ending.starts_with("json") && text.trim_start().starts_with('['));
    let mut table = Table { path: path.to_owned(), records: Vec::new(), by_line };
    let mut take = |place: usize, cells: std::result::Result<Vec<Cell>, String>| {
        let row = cells.and_then(|cells| columns.take(&cells));
        let (text_a, text_b, label) = row.map_err(|reason| fault(path, by_line, place, &reason))?;
        table.records.push(Record { text_a, text_b, label, place });
        Ok(())
    };
    match ending.as_str() {
        "csv" => delimited::each_row(text, path, b",;\t", &names, &mut take)?,
        "tsv" | "txt" => delimited::each_row(text, path, b"\t", &names, &mut take)?,
        _ if by_line => each_line(text.as_bytes(), path, |number, line| {
            if line.trim().is_empty() {
                return Ok(());
            }
            take(number, row::parse(line).and_then(|row| cells(&row, &names)))
        })?,
        _ => {
            let mut json = serde_json::Deserializer::from_str(text);
            let mut take = |place, row: Row| take(place, cells(&row, &names));
            let read = Rows(&mut take).deserialize(&mut json).and_then(|rows| json.end().map(|()| rows));
            read.map_err(|error| {
                Error::format_at(path, error.line(), format!("not a JSON array of objects: {error}"))
            })??;
        }
    }
    non_empty(table)
}

fn ending(path: &Path) -> String {
    path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase()
}

fn non_empty(table: Table) -> Result<Table> {
    match table.records.is_empty() {
        true => Err(Error::format(&table.path, "no rows")),
        false => Ok(table),
    }
}

/// The error for the row at `place`: its line, or its number.
fn fault(path: &Path, by_line: bool, place: usize, reason: &str) -> Error {
    if by_line {
        Error::format_at(path, place, reason)
    } else {
        Error::format(path, format!("row {place}: {reason}"))
    }
}

fn cells(row: &Row, names: &[&str]) -> std::result::Result<Vec<Cell>, String> {
    names.iter().map(|name| row::field(row, name).cloned()).collect()
}

/// Reads the objects of an array one at a time: as a tree they would take many times the memory of their
/// text.
struct Rows<'a>(&'a mut dyn FnMut(usize, Row) -> Result<()>);

impl<'de> DeserializeSeed<'de> for Rows<'_> {
    /// The first error of the callback, if any.
    type Value = Result<()>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = Result<()>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> std::result::Result<Self::Value, A::Error> {
        let (mut place, mut outcome) = (0, Ok(()));
        while let Some(row) = rows.next_element::<Row>()? {
            place += 1;
            if outcome.is_ok() {
                outcome = (self.0)(place, row);
            }
        }
        Ok(outcome)
    }
}

/// The text of a file, without a byte order mark.
fn text_of<'a>(bytes: &'a [u8], path: &Path) -> Result<&'a str> {
    if let Some(reason) = no_text(bytes) {
        return Err(Error::format(path, reason));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        Error::format_at(path, line, "not UTF-8: save the table as UTF-8, not as Latin-1 or Windows-1252")
    })
}

#[cfg(feature = "parquet")]
fn parquet(path: &Path, columns: &Columns) -> Result<Table> {
    use crate::data::parquet;

    let names = columns.names()?;
    let classes = columns.label.as_ref().map(|label| parquet::class_names(path, label)).transpose()?;
    let classes = classes.flatten();
    let mut records = Vec::new();
    parquet::each_row(path, &names, &mut |place, fields| {
        let mut cells =
            fields.iter().map(|field| parquet::cell(field)).collect::<std::result::Result<Vec<_>, _>>()?;
        if let (Some(names), Some(Cell::Number(number))) = (&classes, cells.last()) {
            let named = match number.parse::<usize>() {
                Ok(class) => Cell::Text(
                    names
                        .get(class)
                        .ok_or_else(|| {
                            format!("class {class}, but the file's metadata names {} classes", names.len())
                        })?
                        .clone(),
                ),
                // Such files use -1 for a missing label.
                Err(_) if number == "-1" => Cell::Null,
                Err(_) => {
                    return Err(format!("class {number}: expected a number from 0, or -1 for no label"))
                }
            };
            if let Some(last) = cells.last_mut() {
                *last = named;
            }
        }
        let (text_a, text_b, label) = columns.take(&cells)?;
        let size = text_a.len() + text_b.as_ref().map_or(0, String::len) + size_of::<Record>();
        records.push(Record { text_a, text_b, label, place });
        Ok(size)
    })?;
    Ok(Table { path: path.to_owned(), records, by_line: false })
}

#[cfg(not(feature = "parquet"))]
fn parquet(path: &Path, _: &Columns) -> Result<Table> {
    Err(Error::format(path, "a parquet file needs this crate's feature `parquet`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(text: &str, pair: Option<&str>, label: Option<&str>) -> Columns {
        Columns { text: text.into(), text_pair: pair.map(Into::into), label: label.map(Into::into) }
    }

    fn parse(name: &str, bytes: impl AsRef<[u8]>) -> Result<Table> {
        read_from(bytes.as_ref(), Path::new(name), &columns("t", None, Some("l")))
    }

    fn rows(table: &Table) -> Vec<(&str, Option<&str>)> {
        table.records.iter().map(|record| (record.text_a.as_str(), record.label.as_deref())).collect()
    }

    fn failure(name: &str, bytes: impl AsRef<[u8]>) -> String {
        parse(name, bytes).unwrap_err().to_string()
    }

    #[test]
    fn every_format_gives_the_same_rows() -> Result<()> {
        let expected = [("a, \"b\"", Some("x")), ("c", None), ("d\u{e9}", Some("1"))];
        for (name, text) in [
            ("x.csv", "\u{feff}id,t,l\r\n1,\"a, \"\"b\"\"\", x \r\n2,c,\r\n\r\n3,d\u{e9},1\r\n"),
            ("x.csv", "t;l\n\"a, \"\"b\"\"\";x\nc;\nd\u{e9};1\n"),
            ("x.CSV", "t\tl\n\"a, \"\"b\"\"\"\tx\nc\t\nd\u{e9}\t1"),
            ("x.tsv", "l\tt\nx\ta, \"b\"\n\tc\n1\td\u{e9}\n"),
            ("x.jsonl", "{\"t\": \"a, \\\"b\\\"\", \"l\": \"x\"}\n\n{\"t\": \"c\", \"l\": null}\n{\"l\": 1, \"t\": \"d\u{e9}\"}"),
            ("x.json", "[{\"t\": \"a, \\\"b\\\"\", \"l\": \"x\"}, {\"t\": \"c\", \"l\": \"\"},\n {\"l\": 1, \"t\": \"d\u{e9}\"}]"),
        ] {
            assert_eq!(rows(&parse(name, text)?), expected, "{name}: {text}");
        }
        // A quoted field may contain a line end; the line number of the next row counts it.
        let table = parse("x.csv", "t,l\n\"one\ntwo\",a\nthree,b\n")?;
        assert_eq!((rows(&table)[0].0, table.records[1].place), ("one\ntwo", 4));
        let pair = columns("t", Some("u"), None);
        let table = read_from(&b"u,t\nsecond,first\n"[..], Path::new("x.csv"), &pair)?;
        assert_eq!(
            (table.records[0].text_a.as_str(), table.records[0].text_b.as_deref()),
            ("first", Some("second"))
        );
        Ok(())
    }

    #[test]
    fn what_is_wrong_is_told_with_file_and_line() {
        for (name, text, expected) in [
            ("x.csv", "a,b\n1,2\n", "x.csv, line 1: no column \"t\"; the table has: a, b"),
            ("x.csv", "t,l,t\n", "x.csv, line 1: the header has the column \"t\" twice"),
            ("x.csv", "t,l\na,b\n\nc,d,e\n", "x.csv, line 4: expected 2 columns, got 3"),
            ("x.csv", "t,l\na,b\n\"c,d\ne,f\n", "x.csv, line 3: a quote opens a field and is never closed"),
            ("x.csv", "t,l\na,[1, 2]\n", "x.csv, line 2: expected 2 columns, got 3"),
            (
                "x.tsv",
                "t\tl\na\t['x', 'y']\n",
                "x.tsv, line 2: column \"l\" holds ['x', 'y']: rows of several",
            ),
            (
                "x.jsonl",
                "{\"t\": \"a\", \"l\": [1]}",
                "x.jsonl, line 1: column \"l\" holds an array: rows of several",
            ),
            ("x.jsonl", "{\"t\": null, \"l\": 1}", "x.jsonl, line 1: no text in column \"t\": it is null"),
            ("x.jsonl", "{\"t\": 5, \"l\": 1}", "x.jsonl, line 1: column \"t\" holds 5, expected a text"),
            ("x.jsonl", "{\"t\": \"a\"}", "x.jsonl, line 1: no field \"l\"; the object has: t"),
            (
                "x.json",
                "[{\"t\": \"a\", \"l\": {}}]",
                "x.json: row 1: column \"l\" holds an object: rows of several",
            ),
            ("x.json", "[{]", "x.json, line 1: not a JSON array of objects"),
            ("x.csv", "t,l\n", "x.csv: no rows"),
            ("x.csv", "", "x.csv, line 1: no column \"t\""),
            ("x.xlsx", "t,l\n", "x.xlsx: expected a file that ends in .csv"),
        ] {
            let message = failure(name, text);
            assert!(message.starts_with(expected), "{text:?}: {message}");
        }
        let bytes = |bytes: &[u8]| failure("x.csv", bytes);
        assert!(bytes(b"t,l\na,b\n\xe9,c\n").starts_with("x.csv, line 3: not UTF-8"));
        assert!(bytes(b"\xff\xfet\0").contains("it is UTF-16: save it as UTF-8"));
        assert!(bytes(b"PK\x03\x04..").contains("a zip or a spreadsheet"));
        assert!(bytes(b"\x1f\x8b..").contains("compressed by gzip"));
        let twice = read_from(&b"t\na\n"[..], Path::new("x.csv"), &columns("t", None, Some("t")));
        assert_eq!(twice.unwrap_err().to_string(), "invalid columns: \"t\" is named twice");
    }

    #[test]
    fn a_quote_that_would_swallow_rows_is_refused() {
        // The csv crate, like pandas with the Python engine, makes one row of the first two.
        let message = failure("x.csv", "t,l\n\"He said no,a\n\"Yes\" she said,b\n");
        let expected =
            "x.csv, line 2: a quoted field that begins here ends on line 3 before 'Y': double the quotes \
                        inside it";
        assert_eq!(message, expected);
        // In a field that does not begin with a quote, quotes are ordinary text.
        assert_eq!(rows(&parse("x.csv", "t,l\n5\" disk,a\n").unwrap()), [("5\" disk", Some("a"))]);
        assert_eq!(rows(&parse("x.tsv", "t\tl\n\"open\ta\n").unwrap()), [("\"open", Some("a"))]);
    }
}
