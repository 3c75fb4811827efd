//! The configuration of an encoder, as Hugging Face's `config.json` has it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::models::checks;
use crate::models::encoder::config::{self as shared, defaults as common};
use crate::util::check;

/// The family that an encoder belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// RoBERTa and its relatives: positions are counted from `pad_token_id + 1` over real tokens.
    #[serde(alias = "xlm-roberta", alias = "camembert")]
    Roberta,
    /// BERT: positions are counted from zero; the head reads a pooler.
    Bert,
    /// The discriminator of ELECTRA (Clark et al. 2020), which is the part that is fine-tuned: BERT with
    /// embeddings of their own width, and RoBERTa's head with GELU.
    Electra,
}

impl Family {
    /// The prefix of the encoder's tensors in a checkpoint with a head.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Roberta => "roberta",
            Self::Bert => "bert",
            Self::Electra => "electra",
        }
    }
}

/// The fields of `config.json` that shape the computation; others are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RobertaConfig {
    /// The family of the encoder.
    pub model_type: Family,
    /// The number of token ids.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// The width of the embeddings, if it may differ from `hidden_size` (ELECTRA).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_size: Option<usize>,
    /// The number of layers.
    pub num_hidden_layers: usize,
    /// The number of attention heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// The inner width of the feed-forward block.
    pub intermediate_size: usize,
    /// The activation of the feed-forward block; only `gelu` (the exact one) is supported.
    #[serde(default = "common::gelu")]
    pub hidden_act: String,
    /// Dropout of embeddings and of each sub-layer's output, in training.
    #[serde(default = "common::dropout")]
    pub hidden_dropout_prob: f64,
    /// Dropout of the attention probabilities, in training.
    #[serde(default = "common::dropout")]
    pub attention_probs_dropout_prob: f64,
    /// Dropout in the classification head; `hidden_dropout_prob` if absent.
    #[serde(default)]
    pub classifier_dropout: Option<f64>,
    /// The number of position embeddings; RoBERTa uses the first `pad_token_id + 1` for padding.
    pub max_position_embeddings: usize,
    /// The number of token types (segments); 2 if absent.
    #[serde(default = "defaults::type_vocab_size")]
    pub type_vocab_size: usize,
    /// The standard deviation that new weights start with.
    #[serde(default = "common::initializer_range")]
    pub initializer_range: f64,
    /// Added to the variance in every layer norm; 1e-12 if absent.
    #[serde(default = "defaults::layer_norm_eps")]
    pub layer_norm_eps: f64,
    /// The id of padding; if absent or null, as in old files, [`Self::pad_id`] returns the family's.
    #[serde(default)]
    pub pad_token_id: Option<u32>,
    /// The type of position embeddings; only `absolute` is supported.
    #[serde(default = "defaults::position_embedding_type")]
    pub position_embedding_type: String,
    /// The names of the classes; [`Self::num_labels`] counts them.
    #[serde(default = "common::id2label", deserialize_with = "shared::label_texts")]
    pub id2label: BTreeMap<usize, String>,
}

mod defaults {
    pub fn type_vocab_size() -> usize {
        2
    }
    pub fn layer_norm_eps() -> f64 {
        1e-12
    }
    pub fn position_embedding_type() -> String {
        "absolute".to_string()
    }
}

impl RobertaConfig {
    shared::config_methods!();

    /// Checks that the values fit each other and are supported.
    ///
    /// # Errors
    /// If an option is invalid or not supported; the error names the first.
    pub fn validate(&self) -> Result<()> {
        checks::sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("embedding_size", self.embedding_width()),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("type_vocab_size", self.type_vocab_size),
        ])?;
        shared::check_heads("num_attention_heads", self.num_attention_heads, self.hidden_size)?;
        shared::check_is("hidden_act", &self.hidden_act, "gelu")?;
        shared::check_is("position_embedding_type", &self.position_embedding_type, "absolute")?;
        checks::token_id("pad_token_id", self.pad_id(), self.vocab_size)?;
        check::positive("layer_norm_eps", self.layer_norm_eps)?;
        if self.max_length() == 0 {
            return Err(Error::config("max_position_embeddings", "leaves no room for a token"));
        }
        checks::rates(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("classifier_dropout", self.head_dropout()),
        ])
    }

    /// The width of the embeddings: `hidden_size` for RoBERTa and BERT, whatever the file says; for ELECTRA,
    /// `embedding_size` or 128 if it is absent.
    pub fn embedding_width(&self) -> usize {
        match self.model_type {
            Family::Electra => self.embedding_size.unwrap_or(128),
            Family::Roberta | Family::Bert => self.hidden_size,
        }
    }

    /// The longest sequence, in tokens.
    pub fn max_length(&self) -> usize {
        self.max_position_embeddings.saturating_sub(self.first_position() as usize)
    }

    /// The position of a sequence's first token.
    pub fn first_position(&self) -> u32 {
        match self.model_type {
            Family::Roberta => self.pad_id().saturating_add(1),
            Family::Bert | Family::Electra => 0,
        }
    }

    /// The id of padding: the file's, or the family's own, 1 for RoBERTa and 0 for BERT and ELECTRA.
    pub fn pad_id(&self) -> u32 {
        self.pad_token_id.unwrap_or(match self.model_type {
            Family::Roberta => 1,
            Family::Bert | Family::Electra => 0,
        })
    }

    /// Dropout in the classification head.
    pub fn head_dropout(&self) -> f64 {
        self.classifier_dropout.unwrap_or(self.hidden_dropout_prob)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn roberta_base() -> RobertaConfig {
        // The fields of roberta-base.
        let text = r#"{"model_type": "roberta", "vocab_size": 50265, "hidden_size": 768,
            "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
            "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-05,
            "pad_token_id": 1, "bos_token_id": 0, "architectures": ["RobertaForMaskedLM"]}"#;
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn roberta_reserves_the_positions_of_padding() {
        let config = roberta_base();
        config.validate().unwrap();
        assert_eq!((config.max_length(), config.first_position(), config.num_labels()), (512, 2, 2));
    }

    #[test]
    fn names_of_classes_may_be_numbers() {
        let mut whole = serde_json::to_value(roberta_base()).unwrap();
        whole["id2label"] = serde_json::json!({ "0": 0, "1": "one" });
        let config: RobertaConfig = serde_json::from_value(whole).unwrap();
        assert_eq!(config.id2label, [(0, "0".to_string()), (1, "one".to_string())].into());
    }

    #[test]
    fn a_null_padding_id_is_the_family_s_own() {
        // roberta-base's first configuration file has "pad_token_id": null.
        let config = RobertaConfig { pad_token_id: None, ..roberta_base() };
        assert_eq!((config.pad_id(), config.first_position(), config.max_length()), (1, 2, 512));
        assert_eq!(RobertaConfig { model_type: Family::Bert, ..config }.pad_id(), 0);
        let null = serde_json::to_string(&roberta_base()).unwrap();
        let null = null.replace("\"pad_token_id\":1", "\"pad_token_id\":null");
        assert_eq!(serde_json::from_str::<RobertaConfig>(&null).unwrap().pad_token_id, None);
    }

    #[test]
    fn every_null_is_as_good_as_an_absent_field() {
        let whole = serde_json::to_value(RobertaConfig { id2label: [].into(), ..roberta_base() }).unwrap();
        let read = |json: &serde_json::Value| {
            let config = RobertaConfig::parse(json.to_string().as_bytes(), Path::new("config.json"));
            config.map_err(|error| error.to_string())
        };
        for name in whole.as_object().unwrap().keys() {
            let (mut null, mut absent) = (whole.clone(), whole.clone());
            null[name] = serde_json::Value::Null;
            absent.as_object_mut().unwrap().remove(name);
            match (read(&null), read(&absent)) {
                (Ok(null), Ok(absent)) => assert_eq!(null, absent, "{name}"),
                (Err(null), Err(_)) => {
                    assert!(null.contains(&format!("missing field `{name}`")), "{name}: {null}")
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let wrong = |change: fn(&mut RobertaConfig)| {
            let mut config = roberta_base();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(wrong(|c| c.hidden_act = "relu".into()).contains("hidden_act: expected gelu, got relu"));
        assert!(wrong(|c| c.num_attention_heads = 7).contains("7 heads do not divide 768"));
        assert!(wrong(|c| c.position_embedding_type = "relative_key".into()).contains("relative_key"));
        assert!(wrong(|c| c.hidden_dropout_prob = 1.0).contains("hidden_dropout_prob"));
        assert!(wrong(|c| c.max_position_embeddings = 2).contains("max_position_embeddings"));
        assert!(wrong(|c| c.vocab_size = 0).contains("vocab_size"));
        let error = wrong(|c| c.pad_token_id = Some(50265));
        assert!(error.contains("pad_token_id: 50265 is outside a vocabulary of 50265"), "{error}");
        for bad in [0.0, -1e-5, f64::NAN, f64::INFINITY] {
            let config = RobertaConfig { layer_norm_eps: bad, ..roberta_base() };
            assert!(config.validate().unwrap_err().to_string().contains("layer_norm_eps"), "{bad}");
        }
    }

    #[test]
    fn what_a_file_leaves_out_is_what_transformers_takes() {
        // The defaults are those of transformers.BertConfig().to_dict(); a checkpoint must have these fields.
        let text = r#"{"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40}"#;
        let config: RobertaConfig = serde_json::from_str(text).unwrap();
        config.validate().unwrap();
        assert_eq!((config.layer_norm_eps, config.type_vocab_size, config.pad_id()), (1e-12, 2, 0));
        assert_eq!((config.hidden_act.as_str(), config.hidden_dropout_prob), ("gelu", 0.1));
    }

    #[test]
    fn a_malformed_file_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, "{\n\"model_type\": \"gpt2\"}").unwrap();
        let error = RobertaConfig::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("config.json, line 2") && error.contains("gpt2"), "{error}");
        let error = RobertaConfig::from_file(&dir.path().join("none.json")).unwrap_err().to_string();
        assert!(error.contains("none.json"), "{error}");
    }
}
