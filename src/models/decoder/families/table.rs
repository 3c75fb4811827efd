//! The table of supported families and the readers of their configurations.

use serde_json::Value;

use super::fields::Fields;
use super::{gemma2, gemma3, llama, mistral, phi3, qwen2, qwen3, smollm3};
use crate::error::{Error, Result};
use crate::models::decoder::config::DecoderConfig;

struct Family {
    model_type: &'static str,
    /// The prefix of the family's class names in transformers.
    class: &'static str,
    read: fn(Fields) -> Result<DecoderConfig>,
}

const FAMILIES: [Family; 9] = [
    Family { model_type: "llama", class: "Llama", read: llama::read },
    Family { model_type: "qwen2", class: "Qwen2", read: qwen2::read },
    Family { model_type: "qwen3", class: "Qwen3", read: qwen3::read },
    Family { model_type: "mistral", class: "Mistral", read: mistral::read },
    Family { model_type: "smollm3", class: "SmolLM3", read: smollm3::read },
    Family { model_type: "phi3", class: "Phi3", read: phi3::read },
    Family { model_type: "gemma2", class: "Gemma2", read: gemma2::read },
    Family { model_type: "gemma3_text", class: "Gemma3Text", read: gemma3::read },
    Family { model_type: "gemma3", class: "Gemma3", read: gemma3::read_text_config },
];

/// The supported values of `model_type`.
pub(in crate::models::decoder) fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

/// The prefix of a family's class names in transformers.
pub(in crate::models::decoder) fn class(model_type: &str) -> &'static str {
    FAMILIES.iter().find(|family| family.model_type == model_type).map_or("Llama", |family| family.class)
}

/// Reads the content of a `config.json`; without a `model_type` it is read as LLaMA's.
pub(in crate::models::decoder) fn read(value: Value) -> Result<DecoderConfig> {
    let fields = Fields::new(value, "config.json")?;
    let named = fields.or("model_type", "llama".to_string())?;
    let Some(family) = FAMILIES.iter().find(|family| family.model_type == named) else {
        let known: Vec<_> = model_types().collect();
        return Err(Error::config(
            "model_type",
            format!("expected one of {}, got {named}", known.join(", ")),
        ));
    };
    (family.read)(fields)
}
