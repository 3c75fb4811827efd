//! The columns to read of a table, and the conversion of their values into a row.

use serde::{Deserialize, Serialize};

use crate::data::lines::excerpt;
use crate::data::row::Cell;
use crate::error::Error;

/// The names of the columns to read; others are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    /// The column of the text, or of the first text of a pair.
    pub text: String,
    /// The column of the second text of a pair.
    pub text_pair: Option<String>,
    /// The column of the label; `None` for rows to predict.
    pub label: Option<String>,
}

impl Default for Columns {
    /// `text` and `label`.
    fn default() -> Self {
        Self { text: "text".into(), text_pair: None, label: Some("label".into()) }
    }
}

impl Columns {
    /// The same text columns, without the label.
    pub fn unlabelled(&self) -> Self {
        Self { label: None, ..self.clone() }
    }

    /// The column names in a fixed order: text, second text, label.
    pub(super) fn names(&self) -> crate::error::Result<Vec<&str>> {
        let names: Vec<&str> = std::iter::once(&self.text)
            .chain(&self.text_pair)
            .chain(&self.label)
            .map(String::as_str)
            .collect();
        match names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
            Some((_, name)) => Err(Error::config("columns", format!("{name:?} is named twice"))),
            None => Ok(names),
        }
    }

    /// Converts the values of the columns [`Self::names`] into first text, second text and label.
    pub(super) fn take(&self, cells: &[Cell]) -> Result<(String, Option<String>, Option<String>), String> {
        let mut cells = cells.iter();
        let mut next = |name: &str| cells.next().ok_or_else(|| format!("no column {name:?}"));
        let text_a = text(&self.text, next(&self.text)?)?;
        let text_b = self.text_pair.as_ref().map(|name| text(name, next(name)?)).transpose()?;
        let label = self.label.as_ref().map(|name| label(name, next(name)?)).transpose()?;
        Ok((text_a, text_b, label.flatten()))
    }
}

fn text(name: &str, cell: &Cell) -> Result<String, String> {
    match cell {
        Cell::Text(text) => Ok(text.clone()),
        Cell::Null => Err(format!("no text in column {name:?}: it is null")),
        other => Err(format!("column {name:?} holds {other}, expected a text")),
    }
}

/// The label as spelled in the file; `None` if it is null or empty.
fn label(name: &str, cell: &Cell) -> Result<Option<String>, String> {
    let several = |shown: &str| {
        format!("column {name:?} holds {shown}: rows of several classes are not supported, give each row one")
    };
    let text = match cell {
        Cell::Null => return Ok(None),
        Cell::Flag(flag) => flag.to_string(),
        Cell::Number(number) => number.clone(),
        Cell::Text(text) => text.trim().to_owned(),
        Cell::Other(other) => return Err(several(other)),
    };
    // A list written as text.
    if text.starts_with('[') && text.ends_with(']') {
        return Err(several(&excerpt(&text)));
    }
    Ok((!text.is_empty()).then_some(text))
}

/// The error message for a missing column, with the columns that are present.
pub(super) fn no_column(name: &str, present: &[&str]) -> String {
    format!("no column {name:?}; the table has: {}", excerpt(&present.join(", ")))
}
