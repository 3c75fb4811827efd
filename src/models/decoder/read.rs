//! Reading a decoder's configuration from Hugging Face's `config.json`.

use std::path::Path;

use serde_json::Value;

use super::config::DecoderConfig;
use super::families;
use crate::error::{Error, Result};
use crate::util::json;

impl DecoderConfig {
    /// Reads and validates a `config.json` of an old or new version of transformers; `model_type` selects the
    /// family. [`Self::from_files`] also reads the end tokens in `generation_config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, is not such a configuration, is of an unknown family, or needs an
    /// unsupported feature.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::parse(json::read_config(path)?.as_bytes(), path)
    }

    /// [`Self::from_file`] from the file's bytes; `path` is only used in errors.
    pub(crate) fn parse(text: &[u8], path: &Path) -> Result<Self> {
        let value = json::parse(text, path)?;
        Self::from_value(value).map_err(|e| Error::format(path, e.to_string()))
    }

    /// [`Self::from_file`] from parsed JSON.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub fn from_value(value: Value) -> Result<Self> {
        let config = families::read(value)?;
        config.validate()?;
        Ok(config)
    }

    /// The supported families, as values of `model_type`.
    pub fn model_types() -> impl Iterator<Item = &'static str> {
        families::model_types()
    }

    /// The class in transformers of this family's model with `head`: `LlamaForCausalLM` for `ForCausalLM`.
    pub fn class_name(&self, head: &str) -> String {
        let text_alone = match (self.model_type, head) {
            // The only head without a text-only class: transformers uses `Gemma3ForCausalLM`.
            ("gemma3_text", "ForCausalLM") => "Gemma3",
            (model_type, _) => families::class(model_type),
        };
        format!("{text_alone}{head}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::RotaryScaling;
    use serde_json::json;

    /// The fields of Llama-3.2-3B.
    fn llama3() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 24, "num_key_value_heads": 8, "intermediate_size": 8192,
            "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": true,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008],
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        })
    }

    #[test]
    fn old_and_new_files_say_the_same() -> Result<()> {
        let old = DecoderConfig::from_value(llama3())?;
        assert_eq!((old.head_dim, &old.eos_token_ids), (128, &vec![128001, 128008]));
        assert_eq!(old.pad_id(), 128001);
        let mut new = llama3();
        let fields = new.as_object_mut().unwrap();
        let mut rope = fields.remove("rope_scaling").unwrap();
        rope["rope_theta"] = fields.remove("rope_theta").unwrap();
        fields.insert("rope_parameters".to_string(), rope);
        let new = DecoderConfig::from_value(new)?;
        assert_eq!(format!("{old:?}"), format!("{new:?}"));
        assert_eq!(new.rotary.theta, 500000.0);
        Ok(())
    }

    #[test]
    fn plain_positions_may_be_spelt_out() -> Result<()> {
        let mut value = llama3();
        value["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10000.0});
        // The older field, `rope_scaling`, disagrees.
        let error = DecoderConfig::from_value(value.clone()).unwrap_err().to_string();
        assert!(error.starts_with("invalid rope_scaling: there are rope_parameters as well"), "{error}");
        for same in [json!(null), json!({}), json!({"rope_type": "default"})] {
            value["rope_scaling"] = same;
            let config = DecoderConfig::from_value(value.clone())?;
            assert!(config.rotary.scaling == RotaryScaling::None);
            assert_eq!(config.rotary.theta, 10000.0);
        }
        // The same settings in both fields, spelt differently.
        value["rope_parameters"] = json!({"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0});
        value["rope_scaling"] = json!({"type": "linear", "factor": 8});
        assert!(DecoderConfig::from_value(value.clone()).is_ok());
        value["rope_scaling"]["factor"] = json!(4);
        let error = DecoderConfig::from_value(value).unwrap_err().to_string();
        assert!(error.starts_with("invalid rope_scaling: there are rope_parameters as well"), "{error}");
        Ok(())
    }

    #[test]
    fn every_null_is_as_good_as_an_absent_field() {
        let mut whole = llama3();
        for (name, value) in [
            ("attention_bias", json!(false)),
            ("mlp_bias", json!(false)),
            ("attention_dropout", json!(0.1)),
            ("initializer_range", json!(0.3)),
            ("num_labels", json!(5)),
            ("id2label", json!({"0": "a"})),
            ("pad_token_id", json!(4)),
            ("partial_rotary_factor", json!(1.0)),
        ] {
            whole[name] = value;
        }
        let read = |json: &Value| {
            let config = DecoderConfig::from_value(json.clone());
            config.map(|config| format!("{config:?}")).map_err(|error| error.to_string())
        };
        for name in whole.as_object().unwrap().keys() {
            let (mut null, mut absent) = (whole.clone(), whole.clone());
            null[name] = Value::Null;
            absent.as_object_mut().unwrap().remove(name);
            assert_eq!(read(&null), read(&absent), "{name}");
        }
        whole["rope_scaling"] = Value::Null;
        whole["rope_parameters"] = json!({"rope_type": "default", "rope_theta": null});
        assert!(read(&whole).is_ok_and(|config| config.contains("theta: 500000")), "{:?}", read(&whole));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let cases = [
            ("model_type", json!("gpt2")),
            ("hidden_act", json!("gelu")),
            ("head_dim", json!(0)),
            ("head_dim", json!(7)),
            ("num_hidden_layers", json!(5000)),
            ("head_dim", json!(u64::MAX)),
            ("num_attention_heads", json!(1u64 << 63)),
            ("num_attention_heads", json!(7)),
            ("num_key_value_heads", json!(5)),
            ("vocab_size", json!(0)),
            ("attention_dropout", json!(1.0)),
            ("rope_theta", json!(0.0)),
            ("rms_norm_eps", json!(0.0)),
            ("pad_token_id", json!(128256)),
            ("pad_token_id", json!(-2)),
            ("eos_token_id", json!(128256)),
            ("eos_token_id", json!([128001, 128256])),
            ("rope_parameters", json!("linear")),
            ("rope_parameters", json!([1.0])),
            ("partial_rotary_factor", json!(0.5)),
            ("rope_scaling", json!({"type": "dynamic", "factor": 2.0})),
            ("rope_scaling", json!({"type": "linear", "factor": 0.0})),
            ("rope_scaling", json!({"type": "linear"})),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0})),
            ("rope_scaling", json!({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]})),
            (
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8}),
            ),
        ];
        for (name, bad) in cases {
            let mut value = llama3();
            value[name] = bad;
            if name == "num_attention_heads" {
                value["head_dim"] = Value::Null;
            }
            let error = DecoderConfig::from_value(value).unwrap_err().to_string();
            assert!(error.starts_with(&format!("invalid {name}: ")), "{name}: {error}");
        }
        let mut value = llama3();
        value["rope_scaling"] = Value::Null;
        value["rope_parameters"] = json!({"rope_theta": 10000.0, "partial_rotary_factor": 0.25});
        let error = DecoderConfig::from_value(value.clone()).unwrap_err().to_string();
        assert_eq!(error, "invalid partial_rotary_factor: expected 1, got 0.25");
        value["rope_parameters"]["partial_rotary_factor"] = json!(1.0);
        value["partial_rotary_factor"] = json!(1.0);
        assert!(DecoderConfig::from_value(value).is_ok());
    }

    #[test]
    fn a_malformed_file_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, "{\n\"hidden_size\": ,}").unwrap();
        let error = DecoderConfig::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("config.json, line 2"), "{error}");
        std::fs::write(&path, r#"{"hidden_size": 3}"#).unwrap();
        let error = DecoderConfig::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("missing field"), "{error}");
    }
}
