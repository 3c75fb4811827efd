//! `monteclora.json`: what PEFT's format has no place for, this crate's settings of MonteCLoRA and the names of
//! the classes that a saved head tells apart.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::adapter::AdapterFile;
use crate::error::{Error, Result};
use crate::labels::Labels;
use crate::monteclora::MonteCLoRAConfig;
use crate::util::json;

const NAMES: &str = "id2label";

/// What the text of the file `path` says; `is_monteclora`: whether PEFT's file is of a MonteCLoRA adapter.
/// Settings beside an adapter of another kind are those of one that lay here before, and so are its names.
pub(super) fn parse(
    text: &str,
    path: &Path,
    is_monteclora: bool,
) -> Result<(Option<MonteCLoRAConfig>, Option<Labels>)> {
    let mut fields: Map<String, Value> = json::parse(text, path)?;
    let names =
        fields.remove(NAMES).map(|names| Value::Object([(NAMES.to_string(), names)].into_iter().collect()));
    let names = names.map(|names| Labels::of_config(&names)).transpose();
    let names = names.map_err(|error| Error::format(path, error.to_string()))?.flatten();
    match (is_monteclora, &names) {
        (true, None) => Ok((Some(json::parse_config(text, path, &[])?), None)),
        (true, Some(_)) if fields.is_empty() => Ok((None, names)),
        (true, Some(_)) => {
            let config = serde_json::from_value(Value::Object(fields));
            let config = config.map_err(|e| Error::format(path, format!("malformed: {e}")))?;
            Ok((Some(config), names))
        }
        (false, _) => Ok((None, names.filter(|_| fields.is_empty()))),
    }
}

/// The text of the file beside this adapter; None where PEFT's format says all that there is.
pub(super) fn text(adapter: &AdapterFile) -> serde_json::Result<Option<String>> {
    #[derive(Serialize)]
    struct Own<'a> {
        #[serde(flatten)]
        config: Option<&'a MonteCLoRAConfig>,
        #[serde(skip_serializing_if = "Option::is_none")]
        id2label: Option<Value>,
    }
    let (config, id2label) = (adapter.monteclora.as_ref(), adapter.labels.as_ref().map(Labels::id2label));
    if config.is_none() && id2label.is_none() {
        return Ok(None);
    }
    Ok(Some(serde_json::to_string_pretty(&Own { config, id2label })? + "\n"))
}
