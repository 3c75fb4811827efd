//! Reads the tokens that end a text from the two files in which a model may list them.

use candle_transformers::models::llama::LlamaEosToks;
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::models::decoder::DecoderConfig;
use crate::models::hub::ModelFiles;
use crate::util::json;

impl DecoderConfig {
    /// Reads the configuration from a model's files: `config.json`, plus the end tokens in
    /// `generation_config.json`, where instruction-tuned models list the tokens that end a turn.
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
        let Some(path) = files.file("generation_config.json")? else { return Ok(config) };
        let Generation { eos_token_id } = json::parse(json::read_config(&path)?, &path)?;
        let mut ends = config.eos_token_ids.clone();
        let more = match eos_token_id {
            None => return Ok(config),
            Some(LlamaEosToks::Single(id)) => vec![id],
            Some(LlamaEosToks::Multiple(ids)) => ids,
        };
        for id in more {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        config.eos_token_ids = ends;
        config.validate().map_err(|e| Error::format(&path, e.to_string()))?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};

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
        // `config.json` may list no end token.
        let mut json = toy();
        json["eos_token_id"] = Value::Null;
        std::fs::write(at("config.json"), json.to_string()).unwrap();
        std::fs::write(at("generation_config.json"), "{\"eos_token_id\": [2, 42]}").unwrap();
        assert_eq!(ends()?, [2, 42]);
        Ok(())
    }
}
