//! The configuration of a DeBERTa-v3, as Hugging Face's `config.json` has it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::models::checks;
use crate::models::encoder::config::{self as shared, defaults};
use crate::models::encoder::Buckets;
use crate::util::check;

/// The fields of `config.json` that shape the computation; others are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DebertaConfig {
    /// `deberta-v2`; DeBERTa-v3 is the variant with shared projections.
    pub model_type: String,
    /// The number of token ids.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// The number of layers.
    pub num_hidden_layers: usize,
    /// The number of attention heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// The inner width of the feed-forward block.
    pub intermediate_size: usize,
    /// The activation of the feed-forward block; only `gelu` (the exact one) is supported.
    #[serde(default = "defaults::gelu")]
    pub hidden_act: String,
    /// Dropout of embeddings, relative positions and each sub-layer's output, in training.
    #[serde(default = "defaults::dropout")]
    pub hidden_dropout_prob: f64,
    /// Dropout of the attention probabilities, in training.
    #[serde(default = "defaults::dropout")]
    pub attention_probs_dropout_prob: f64,
    /// Dropout before the pooler, in training.
    #[serde(default)]
    pub pooler_dropout: f64,
    /// The activation of the pooler; only `gelu` is supported.
    #[serde(default = "defaults::gelu")]
    pub pooler_hidden_act: String,
    /// Dropout before the projection to classes; `hidden_dropout_prob` if absent.
    #[serde(default)]
    pub cls_dropout: Option<f64>,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// The distance from which on there are no further buckets; `max_position_embeddings` if below 1.
    #[serde(default = "unlimited")]
    pub max_relative_positions: i64,
    /// The number of buckets of distances on each side; if below 1, each distance has its own bucket.
    #[serde(default = "unlimited")]
    pub position_buckets: i64,
    /// Whether attention uses relative positions; only `true` is supported.
    #[serde(default)]
    pub relative_attention: bool,
    /// Whether words also have absolute positions; only `false` is supported.
    #[serde(default = "yes")]
    pub position_biased_input: bool,
    /// Whether relative positions share the projections of queries and keys; only `true` is supported.
    #[serde(default)]
    pub share_att_key: bool,
    /// The terms of the scores beside content-to-content, as a list or a string separated by `|`. Only `c2p`
    /// and `p2c` together are supported.
    #[serde(default)]
    pub pos_att_type: Value,
    /// `layer_norm` if the relative positions are normalised, otherwise `none`.
    #[serde(default = "none")]
    pub norm_rel_ebd: String,
    /// The width of a convolution beside the first layer; only 0 is supported.
    #[serde(default)]
    pub conv_kernel_size: usize,
    /// The number of token types; only 0 is supported.
    #[serde(default)]
    pub type_vocab_size: usize,
    /// The width of the word embeddings; only `hidden_size` is supported.
    #[serde(default)]
    pub embedding_size: Option<usize>,
    /// The width of a head; only `hidden_size / num_attention_heads` is supported.
    #[serde(default)]
    pub attention_head_size: Option<usize>,
    /// Added to the variance in every layer norm; 1e-7 if absent.
    #[serde(default = "layer_norm_eps")]
    pub layer_norm_eps: f64,
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

fn unlimited() -> i64 {
    -1
}
fn yes() -> bool {
    true
}
fn none() -> String {
    "none".to_string()
}
fn layer_norm_eps() -> f64 {
    1e-7
}

impl DebertaConfig {
    shared::config_methods!();

    /// Checks that the values fit each other and are supported.
    ///
    /// # Errors
    /// If an option is invalid or not supported; the error names the first.
    pub fn validate(&self) -> Result<()> {
        shared::check_is("model_type", &self.model_type, "deberta-v2")?;
        checks::sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ])?;
        shared::check_heads("num_attention_heads", self.num_attention_heads, self.hidden_size)?;
        shared::check_is("hidden_act", &self.hidden_act, "gelu")?;
        shared::check_is("pooler_hidden_act", &self.pooler_hidden_act, "gelu")?;
        self.check_version()?;
        self.check_positions()?;
        checks::token_id("pad_token_id", self.pad_id(), self.vocab_size)?;
        check::positive("layer_norm_eps", self.layer_norm_eps)?;
        checks::rates(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("pooler_dropout", self.pooler_dropout),
            ("cls_dropout", self.head_dropout()),
        ])
    }

    /// Rejects the options of larger DeBERTa-v2 models that v3 does not have.
    fn check_version(&self) -> Result<()> {
        let only = |option: &str, expected: &str, got: String| {
            shared::check_is(option, &got, expected).map_err(|_| {
                let reason = format!("expected {expected} as in DeBERTa-v3, got {got}");
                Error::config(option, reason)
            })
        };
        only("relative_attention", "true", self.relative_attention.to_string())?;
        only("position_biased_input", "false", self.position_biased_input.to_string())?;
        only("share_att_key", "true", self.share_att_key.to_string())?;
        only("conv_kernel_size", "0", self.conv_kernel_size.to_string())?;
        only("type_vocab_size", "0", self.type_vocab_size.to_string())?;
        let width = self.embedding_size.unwrap_or(self.hidden_size);
        only("embedding_size", &self.hidden_size.to_string(), width.to_string())?;
        let head = self.hidden_size / self.num_attention_heads;
        only("attention_head_size", &head.to_string(), self.attention_head_size.unwrap_or(head).to_string())?;
        let text = match &self.pos_att_type {
            Value::Array(terms) => terms.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("|"),
            terms => terms.as_str().unwrap_or_default().to_lowercase(),
        };
        let mut terms: Vec<&str> = text.split('|').map(str::trim).collect();
        terms.sort_unstable();
        only("pos_att_type", "c2p|p2c", terms.join("|"))?;
        if !["none", "layer_norm"].contains(&self.norm_rel_ebd.as_str()) {
            let reason = format!("expected none or layer_norm, got {}", self.norm_rel_ebd);
            return Err(Error::config("norm_rel_ebd", reason));
        }
        Ok(())
    }

    fn check_positions(&self) -> Result<()> {
        let Buckets { log, max_distance } = self.buckets();
        // Bounds the size of the table, which is computed before it is compared with that in the weights.
        if max_distance > 1 << 24 {
            let reason = format!("{max_distance} is more than 2^24");
            return Err(Error::config("max_relative_positions", reason));
        }
        match log {
            Some(buckets) if buckets < 4 || max_distance <= buckets / 2 + 1 => {
                let reason = format!(
                    "{buckets} buckets do not fit distances below {max_distance}: expected at least 4 \
                     buckets, and a distance limit above half their number plus 1"
                );
                Err(Error::config("position_buckets", reason))
            }
            _ => Ok(()),
        }
    }

    /// The mapping of distances to relative-position embeddings.
    pub(crate) fn buckets(&self) -> Buckets {
        let positive = |value: i64| usize::try_from(value).ok().filter(|value| *value > 0);
        Buckets {
            log: positive(self.position_buckets),
            max_distance: positive(self.max_relative_positions).unwrap_or(self.max_position_embeddings),
        }
    }

    /// Dropout before the projection to classes.
    pub fn head_dropout(&self) -> f64 {
        self.cls_dropout.unwrap_or(self.hidden_dropout_prob)
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

    fn read(change: impl Fn(&mut Value)) -> Result<DebertaConfig> {
        // The file of microsoft/deberta-v3-base.
        let mut json = json!({"model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
            "intermediate_size": 3072, "max_position_embeddings": 512, "relative_attention": true,
            "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": true,
            "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1,
            "position_biased_input": false, "num_attention_heads": 12, "num_hidden_layers": 12,
            "type_vocab_size": 0, "vocab_size": 128100});
        change(&mut json);
        DebertaConfig::parse(json.to_string().as_bytes(), Path::new("config.json"))
    }

    #[test]
    fn the_file_of_deberta_v3_is_read() {
        let config = read(|_| ()).unwrap();
        let buckets = config.buckets();
        assert_eq!((buckets.log, buckets.max_distance, buckets.span()), (Some(256), 512, 256));
        assert_eq!((config.pad_id(), config.num_labels(), config.head_dropout()), (0, 2, 0.1));
        let listed = read(|json| json["pos_att_type"] = json!(["c2p", "p2c"])).unwrap();
        assert_eq!(listed.buckets().span(), 256);
    }

    #[test]
    fn what_deberta_v3_has_not_is_refused_by_name() {
        for (name, value, said) in [
            ("conv_kernel_size", json!(3), "conv_kernel_size: expected 0 as in DeBERTa-v3, got 3"),
            ("share_att_key", json!(false), "share_att_key: expected true as in DeBERTa-v3, got false"),
            ("position_biased_input", json!(true), "position_biased_input: expected false"),
            ("relative_attention", json!(false), "relative_attention: expected true"),
            ("pos_att_type", json!(["c2p"]), "pos_att_type: expected c2p|p2c as in DeBERTa-v3, got c2p"),
            ("pos_att_type", json!(3), "pos_att_type: expected c2p|p2c"),
            ("type_vocab_size", json!(2), "type_vocab_size: expected 0"),
            ("embedding_size", json!(128), "embedding_size: expected 768"),
            ("attention_head_size", json!(32), "attention_head_size: expected 64"),
            ("norm_rel_ebd", json!("rms"), "norm_rel_ebd: expected none or layer_norm, got rms"),
            ("position_buckets", json!(2), "position_buckets: 2 buckets do not fit distances below 512"),
            ("position_buckets", json!(1024), "position_buckets: 1024 buckets do not fit"),
            ("max_relative_positions", json!(1i64 << 40), "max_relative_positions: 1099511627776 is more"),
            ("pooler_hidden_act", json!("tanh"), "pooler_hidden_act: expected gelu, got tanh"),
            ("layer_norm_eps", json!(0.0), "layer_norm_eps"),
            ("model_type", json!("deberta"), "model_type: expected deberta-v2, got deberta"),
        ] {
            let error = read(|json| json[name] = value.clone()).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains(said), "{error}");
        }
    }
}
