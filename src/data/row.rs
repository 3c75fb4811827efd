//! A row of JSON data: its plain values by name.
//!
//! Nested values are skipped while reading: as a tree they would take a hundred times the memory of their
//! text.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::lines::excerpt;

/// The values of a row by name.
pub(super) type Row = BTreeMap<String, Cell>;

/// A value of a row.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cell {
    Null,
    Flag(bool),
    Text(String),
    /// The text of the number: a whole number written as a fraction keeps its point (`1.0`).
    Number(String),
    /// A value of an unsupported type, as described in errors.
    Other(String),
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Text(text) => write!(f, "{:?}", excerpt(text)),
            Self::Number(text) | Self::Other(text) => f.write_str(text),
        }
    }
}

/// Parses a line of JSON.
pub(super) fn parse(line: &str) -> Result<Row, String> {
    serde_json::from_str(line).map_err(|error| format!("not a JSON object: {error}"))
}

/// The value of the field `name`; the error lists the fields that are present.
pub(super) fn field<'a>(row: &'a Row, name: &str) -> Result<&'a Cell, String> {
    row.get(name).ok_or_else(|| {
        let present: Vec<&str> = row.keys().map(String::as_str).collect();
        format!("no field {name:?}; the object has: {}", excerpt(&present.join(", ")))
    })
}

/// The text of the field `name`.
pub(super) fn text<'a>(row: &'a Row, name: &str) -> Result<&'a str, String> {
    match field(row, name)? {
        Cell::Text(text) => Ok(text),
        _ => Err(format!("field {name:?} is not a string")),
    }
}

/// Whether the field `name` is there and neither null, a blank string nor an empty array.
pub(super) fn says(row: &Row, name: &str) -> bool {
    match row.get(name) {
        None | Some(Cell::Null) => false,
        Some(Cell::Text(text)) => !text.trim().is_empty(),
        Some(Cell::Other(kind)) => kind != "an empty array",
        Some(_) => true,
    }
}

impl<'de> Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Cells)
    }
}

struct Cells;

impl<'de> Visitor<'de> for Cells {
    type Value = Cell;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Cell, E> {
        Ok(Cell::Null)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Cell, E> {
        Ok(Cell::Flag(flag))
    }

    fn visit_str<E>(self, text: &str) -> Result<Cell, E> {
        Ok(Cell::Text(text.to_owned()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Cell, E> {
        Ok(Cell::Number(number.to_string()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Cell, E> {
        Ok(Cell::Number(number.to_string()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Cell, E> {
        Ok(Cell::Number(format!("{number:?}")))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Cell, A::Error> {
        let mut name = "an empty array";
        while items.next_element::<IgnoredAny>()?.is_some() {
            name = "an array";
        }
        Ok(Cell::Other(name.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Cell, A::Error> {
        while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Cell::Other("an object".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_values_are_kept_and_others_named() {
        let row =
            parse(r#"{"a": "x", "b": true, "c": null, "d": [1, [2]], "e": {"f": 1}, "g": -1.5}"#).unwrap();
        let shown: Vec<String> = row.values().map(ToString::to_string).collect();
        assert_eq!(shown, ["\"x\"", "true", "null", "an array", "an object", "-1.5"]);
        assert_eq!((text(&row, "a"), row["c"] == Cell::Null), (Ok("x"), true));
        assert!(text(&row, "d").unwrap_err().contains("not a string"));
        assert!(field(&row, "z").unwrap_err().ends_with("the object has: a, b, c, d, e, g"));
    }
}
