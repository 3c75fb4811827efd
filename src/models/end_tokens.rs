//! Reads the tokens that end a text from the two files in which a model may list them.

use candle_transformers::models::llama::LlamaEosToks;
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::models::decoder::DecoderConfig;
use crate::models::hub::ModelFiles;
use crate::util::json;

impl DecoderConfig {
    /// Reads the configuration from a model's files: `config.json`, plus the end tokens in
    /// `generation_config.json`, where instruction-tuned models list the tokens that end a turn. The end token
    /// of `tokenizer_config.json` comes first if it is one of them.
    ///
    /// # Errors
    /// As [`Self::from_file`], for either file; or if the hub fails.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        #[derive(Deserialize)]
        struct Generation {
            #[serde(default)]
            eos_token_id: Option<LlamaEosToks>,
        }
        let config = files.config_path();
        let mut config =
            Self::from_value(files.config()?).map_err(|e| Error::format(config, e.to_string()))?;
        if let Some(path) = files.file("generation_config.json")? {
            let Generation { eos_token_id } = json::parse(json::read_config(&path)?, &path)?;
            let more = match eos_token_id {
                None => Vec::new(),
                Some(LlamaEosToks::Single(id)) => vec![id],
                Some(LlamaEosToks::Multiple(ids)) => ids,
            };
            for id in more {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
            config.validate().map_err(|e| Error::format(&path, e.to_string()))?;
        }
        put_first(&mut config.eos_token_ids, end_of_tokenizer(files)?);
        Ok(config)
    }
}

/// Puts the end token that the tokenizer names first: answers are trained to end with the first one, and an
/// instruction-tuned model ends its turns with the tokenizer's, whatever else ends a text.
fn put_first(ends: &mut [u32], of_tokenizer: Option<u32>) {
    if let Some(place) = ends.iter().position(|end| Some(*end) == of_tokenizer) {
        ends[..=place].rotate_right(1);
    }
}

/// The id of the end token in `tokenizer_config.json`, if it has both its text and the ids of added tokens.
fn end_of_tokenizer(files: &ModelFiles) -> Result<Option<u32>> {
    let Some(path) = files.file("tokenizer_config.json")? else { return Ok(None) };
    // A tokenizer's file may have any other form; then its end token is not known.
    let Ok(settings) = json::parse::<Value>(json::read_config(&path)?, &path) else { return Ok(None) };
    let Some(end) = json::token_text(&settings["eos_token"]) else { return Ok(None) };
    let added = settings["added_tokens_decoder"].as_object().into_iter().flatten();
    let id = added.into_iter().find(|(_, token)| json::token_text(token) == Some(end));
    Ok(id.and_then(|(id, _)| id.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn toy() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 40,
            "rms_norm_eps": 1e-5, "eos_token_id": [11, 12],
        })
    }

    #[test]
    fn what_ends_a_text_is_in_two_files() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("config.json"), toy().to_string()).unwrap();
        let none = std::collections::HashMap::<String, candle_core::Tensor>::new();
        candle_core::safetensors::save(&none, at("model.safetensors"))?;
        let files = ModelFiles::locate(dir.path().to_str().unwrap(), None)?;
        let ends = || DecoderConfig::from_files(&files).map(|config| config.eos_token_ids);
        assert_eq!(ends()?, [11, 12]);
        for (generation, expected) in [
            (json!({"eos_token_id": [13, 11]}), vec![11, 12, 13]),
            (json!({"eos_token_id": 7, "temperature": null}), vec![11, 12, 7]),
            (json!({"eos_token_id": null}), vec![11, 12]),
            (json!({}), vec![11, 12]),
        ] {
            std::fs::write(at("generation_config.json"), generation.to_string()).unwrap();
            assert_eq!(ends()?, expected, "{generation}");
        }
        for (bad, reason) in [("{\n]", ", line 2: malformed"), ("{\"eos_token_id\": 50}", "eos_token_id: 50")]
        {
            std::fs::write(at("generation_config.json"), bad).unwrap();
            let error = ends().unwrap_err().to_string();
            assert!(error.contains("generation_config.json") && error.contains(reason), "{error}");
        }
        // The end that the tokenizer names comes first, if it is one of them.
        std::fs::write(at("generation_config.json"), "{\"eos_token_id\": [12, 13]}").unwrap();
        for (tokenizer, expected) in [
            (
                json!({"eos_token": "<e>", "added_tokens_decoder": {"13": {"content": "<e>"}}}),
                vec![13, 11, 12],
            ),
            (
                json!({"eos_token": {"content": "<e>"}, "added_tokens_decoder": {"12": {"content": "<e>"}}}),
                vec![12, 11, 13],
            ),
            (
                json!({"eos_token": "<e>", "added_tokens_decoder": {"9": {"content": "<e>"}}}),
                vec![11, 12, 13],
            ),
            (json!({"eos_token": "<e>"}), vec![11, 12, 13]),
            (json!({"eos_token": 3}), vec![11, 12, 13]),
        ] {
            std::fs::write(at("tokenizer_config.json"), tokenizer.to_string()).unwrap();
            assert_eq!(ends()?, expected, "{tokenizer}");
        }
        // `config.json` may list no end token.
        let mut json = toy();
        json["eos_token_id"] = Value::Null;
        std::fs::write(at("config.json"), json.to_string()).unwrap();
        std::fs::write(at("generation_config.json"), "{\"eos_token_id\": [2, 42]}").unwrap();
        assert_eq!(ends()?, [2, 42]);
        Ok(())
    }
}
