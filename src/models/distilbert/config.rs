//! The configuration of a DistilBERT, as Hugging Face's `config.json` has it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::models::checks;
use crate::models::encoder::config::{self as shared, defaults};

/// The fields of `config.json` that shape the computation; others are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DistilBertConfig {
    /// `distilbert`.
    pub model_type: String,
    /// The number of token ids.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub dim: usize,
    /// The number of layers.
    pub n_layers: usize,
    /// The number of attention heads; divides `dim`.
    pub n_heads: usize,
    /// The inner width of the feed-forward block.
    pub hidden_dim: usize,
    /// The activation of the feed-forward block; only `gelu` (the exact one) is supported.
    #[serde(default = "defaults::gelu")]
    pub activation: String,
    /// Dropout of embeddings and of the feed-forward block's output, in training.
    #[serde(default = "defaults::dropout")]
    pub dropout: f64,
    /// Dropout of the attention probabilities, in training.
    #[serde(default = "defaults::dropout")]
    pub attention_dropout: f64,
    /// Dropout in the classification head, in training; 0.2 if absent.
    #[serde(default = "seq_classif_dropout")]
    pub seq_classif_dropout: f64,
    /// The number of position embeddings, and the longest sequence.
    pub max_position_embeddings: usize,
    /// The standard deviation that new weights start with.
    #[serde(default = "defaults::initializer_range")]
    pub initializer_range: f64,
    /// The id of padding; 0 if absent or null.
    #[serde(default)]
    pub pad_token_id: Option<u32>,
    /// The names of the classes; [`Self::num_labels`] counts them.
    #[serde(default = "defaults::id2label", deserialize_with = "shared::label_texts")]
    pub id2label: BTreeMap<usize, String>,
}

fn seq_classif_dropout() -> f64 {
    0.2
}

impl DistilBertConfig {
    shared::config_methods!();

    /// Checks that the values fit each other and are supported.
    ///
    /// # Errors
    /// If an option is invalid or not supported; the error names the first.
    pub fn validate(&self) -> Result<()> {
        shared::check_is("model_type", &self.model_type, "distilbert")?;
        checks::sizes(&[
            ("vocab_size", self.vocab_size),
            ("dim", self.dim),
            ("n_heads", self.n_heads),
            ("hidden_dim", self.hidden_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ])?;
        shared::check_heads("n_heads", self.n_heads, self.dim)?;
        shared::check_is("activation", &self.activation, "gelu")?;
        checks::token_id("pad_token_id", self.pad_id(), self.vocab_size)?;
        checks::rates(&[
            ("dropout", self.dropout),
            ("attention_dropout", self.attention_dropout),
            ("seq_classif_dropout", self.seq_classif_dropout),
        ])
    }

    /// The id of padding: the file's, or 0.
    pub fn pad_id(&self) -> u32 {
        self.pad_token_id.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use serde_json::json;

    fn distilbert_base() -> serde_json::Value {
        // The fields of distilbert-base-uncased.
        json!({"activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1,
            "dim": 768, "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02,
            "max_position_embeddings": 512, "model_type": "distilbert", "n_heads": 12, "n_layers": 6,
            "pad_token_id": 0, "qa_dropout": 0.1, "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": false,
            "tie_weights_": true, "vocab_size": 30522})
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let read = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut json = distilbert_base();
            change(&mut json);
            DistilBertConfig::parse(json.to_string().as_bytes(), Path::new("config.json"))
        };
        let config = read(&|_| ()).unwrap();
        assert_eq!((config.num_labels(), config.clone().with_num_labels(5).num_labels()), (2, 5));
        for (name, value, said) in [
            ("activation", json!("relu"), "activation: expected gelu, got relu"),
            ("n_heads", json!(7), "7 heads do not divide 768"),
            ("dim", json!(0), "dim: expected at least 1, got 0"),
            ("model_type", json!("bert"), "model_type: expected distilbert, got bert"),
            ("pad_token_id", json!(30522), "pad_token_id: 30522 is outside a vocabulary of 30522"),
            ("seq_classif_dropout", json!(1.0), "seq_classif_dropout: expected a number in [0, 1), got 1"),
        ] {
            let error = read(&|json| json[name] = value.clone()).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains(said), "{error}");
        }
    }
}
