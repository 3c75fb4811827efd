//! Which columns of a table are read, and what of their values a row is made of.

use serde::{Deserialize, Serialize};

use crate::data::lines::excerpt;
use crate::data::row::Cell;
use crate::error::Error;

/// The names of the columns that are read; others are passed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    /// That of the text, or of the first text of a pair.
    pub text: String,
    /// That of the second text of a pair.
    pub text_pair: Option<String>,
    /// That of the label; none for rows to predict.
    pub label: Option<String>,
}

impl Default for Columns {
    /// `text` and `label`.
    fn default() -> Self {
        Self { text: "text".into(), text_pair: None, label: Some("label".into()) }
    }
}

impl Columns {
    /// The same texts, without labels.
    pub fn unlabelled(&self) -> Self {
        Self { label: None, ..self.clone() }
    }

    /// The names in a fixed order: text, second text, label.
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

    /// Texts and label of the values of [`Self::names`].
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

/// A label as it is spelled; none where the row has none.
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
    // A list that was written into a cell as text.
    if text.starts_with('[') && text.ends_with(']') {
        return Err(several(&excerpt(&text)));
    }
    Ok((!text.is_empty()).then_some(text))
}

/// The names that are there, for an error.
pub(super) fn no_column(name: &str, present: &[&str]) -> String {
    format!("no column {name:?}; the table has: {}", excerpt(&present.join(", ")))
}
