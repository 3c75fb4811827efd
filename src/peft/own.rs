//! `monteclora.json`: data without a place in PEFT's format, namely this crate's settings of MonteCLoRA, the
//! prior of a LoRA adapter, and the class names of a saved head.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::adapter::AdapterFile;
use crate::adapter::Prior;
use crate::error::{Error, Result};
use crate::labels::Labels;
use crate::monteclora::MonteCLoRAConfig;
use crate::util::json;

const NAMES: &str = "id2label";
const PRIOR: &str = "lora_prior";

/// The contents of such a file.
type Own = (Option<MonteCLoRAConfig>, Option<Prior>, Option<Labels>);

/// Parses the text of the file `path`. `is_monteclora` says whether PEFT's file describes a MonteCLoRA
/// adapter. If it does not, a file with MonteCLoRA settings was left by an earlier adapter in the folder and
/// is ignored, including its names.
pub(super) fn parse(text: &str, path: &Path, is_monteclora: bool) -> Result<Own> {
    let malformed = |error: serde_json::Error| Error::format(path, format!("malformed: {error}"));
    let mut fields: Map<String, Value> = json::parse(text, path)?;
    let names =
        fields.remove(NAMES).map(|names| Value::Object([(NAMES.to_string(), names)].into_iter().collect()));
    let names = names.map(|names| Labels::of_config(&names)).transpose();
    let names = names.map_err(|error| Error::format(path, error.to_string()))?.flatten();
    let prior = fields.remove(PRIOR).map(serde_json::from_value).transpose().map_err(malformed)?;
    match (is_monteclora, &names) {
        (true, None) => Ok((Some(json::parse_config(text, path, &[])?), None, None)),
        (true, Some(_)) if fields.is_empty() => Ok((None, None, names)),
        (true, Some(_)) => {
            let config = serde_json::from_value(Value::Object(fields)).map_err(malformed)?;
            Ok((Some(config), None, names))
        }
        (false, _) if !fields.is_empty() => Ok((None, None, None)),
        (false, _) => Ok((None, prior, names)),
    }
}

/// The text of the file for this adapter; `None` if PEFT's format has a place for everything.
pub(super) fn text(adapter: &AdapterFile) -> serde_json::Result<Option<String>> {
    #[derive(Serialize)]
    struct Own<'a> {
        #[serde(flatten)]
        config: Option<&'a MonteCLoRAConfig>,
        #[serde(skip_serializing_if = "Option::is_none")]
        lora_prior: Option<Prior>,
        #[serde(skip_serializing_if = "Option::is_none")]
        id2label: Option<Value>,
    }
    let (config, id2label) = (adapter.monteclora.as_ref(), adapter.labels.as_ref().map(Labels::id2label));
    let lora_prior = adapter.prior;
    if config.is_none() && lora_prior.is_none() && id2label.is_none() {
        return Ok(None);
    }
    Ok(Some(serde_json::to_string_pretty(&Own { config, lora_prior, id2label })? + "\n"))
}
