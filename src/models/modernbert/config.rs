//! The configuration of a ModernBERT, as Hugging Face's `config.json` has it in older and newer files.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::models::checks;
use crate::models::encoder::config::{self as shared, defaults};
use crate::util::check;

/// The hidden states that a classification head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The last hidden state of the first token.
    Cls,
    /// The mean of the last hidden states of the real tokens.
    Mean,
}

/// How far the attention of a layer reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// The whole row.
    FullAttention,
    /// `local_attention / 2` tokens in each direction.
    SlidingAttention,
}

/// The rotary positions of one type of layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// How angles are scaled; only `default` is supported.
    #[serde(default = "unscaled")]
    pub rope_type: String,
    /// The base of the angles' frequencies; the layer type's default if absent.
    #[serde(default)]
    pub rope_theta: Option<f64>,
    /// The share of a head that is rotated; only 1, or absent, is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_rotary_factor: Option<f64>,
}

/// The [`Rope`] of both layer types, as in newer files. A flat one applies to each type without its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "RopeFile")]
pub struct RopeParameters {
    /// Of layers with [`LayerType::FullAttention`].
    #[serde(default)]
    pub full_attention: Option<Rope>,
    /// Of layers with [`LayerType::SlidingAttention`].
    #[serde(default)]
    pub sliding_attention: Option<Rope>,
}

/// `rope_parameters` as in files, nested or flat. Unknown fields are rejected: they would change the angles.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RopeFile {
    full_attention: Option<Rope>,
    sliding_attention: Option<Rope>,
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

impl From<RopeFile> for RopeParameters {
    fn from(file: RopeFile) -> Self {
        let RopeFile { full_attention, sliding_attention, rope_type, rope_theta, partial_rotary_factor } =
            file;
        let is_flat = rope_type.is_some() || rope_theta.is_some() || partial_rotary_factor.is_some();
        let flat = is_flat.then(|| Rope {
            rope_type: rope_type.unwrap_or_else(unscaled),
            rope_theta,
            partial_rotary_factor,
        });
        Self {
            full_attention: full_attention.or_else(|| flat.clone()),
            sliding_attention: sliding_attention.or(flat),
        }
    }
}

/// The fields of `config.json` that shape the computation; others are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModernBertConfig {
    /// `modernbert`.
    pub model_type: String,
    /// The number of token ids.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// The inner width of the feed-forward block.
    pub intermediate_size: usize,
    /// The number of layers.
    pub num_hidden_layers: usize,
    /// The number of attention heads; divides `hidden_size` into heads of even width.
    pub num_attention_heads: usize,
    /// The activation in the feed-forward block; only `gelu` (the exact one) is supported.
    #[serde(default = "defaults::gelu")]
    pub hidden_activation: String,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// The standard deviation that new weights start with.
    #[serde(default = "defaults::initializer_range")]
    pub initializer_range: f64,
    /// Added to the variance in every layer norm; 1e-5 if absent.
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    /// Whether layer norms have a bias.
    #[serde(default)]
    pub norm_bias: bool,
    /// Whether the linear layers of attention have a bias.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether the linear layers of the feed-forward block have a bias.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Whether the dense layer of the head has a bias.
    #[serde(default)]
    pub classifier_bias: bool,
    /// The activation of the head; only `gelu` is supported.
    #[serde(default = "defaults::gelu")]
    pub classifier_activation: String,
    /// The head's input; the first token if absent.
    #[serde(default = "first_token")]
    pub classifier_pooling: Pooling,
    /// Dropout of the embeddings, in training.
    #[serde(default)]
    pub embedding_dropout: f64,
    /// Dropout of the attention probabilities and of the attention block's output, in training.
    #[serde(default)]
    pub attention_dropout: f64,
    /// Dropout inside the feed-forward block, in training.
    #[serde(default)]
    pub mlp_dropout: f64,
    /// Dropout before the projection to classes, in training.
    #[serde(default)]
    pub classifier_dropout: f64,
    /// The number of tokens that a local layer sees, half of them on each side; 128 if absent.
    #[serde(default = "local_attention")]
    pub local_attention: usize,
    /// The type of each layer, in newer files.
    #[serde(default)]
    pub layer_types: Option<Vec<LayerType>>,
    /// In older files: every how many layers, from the first on, one has full attention; 3 if absent.
    #[serde(default = "every_third")]
    pub global_attn_every_n_layers: usize,
    /// The rotary positions, in newer files.
    #[serde(default)]
    pub rope_parameters: Option<RopeParameters>,
    /// In older files: the base of the frequencies in layers with full attention; 160000 if absent.
    #[serde(default)]
    pub global_rope_theta: Option<f64>,
    /// In older files: the base in local layers; 10000 if absent, the base of the other layers if null.
    #[serde(default = "local_rope_theta")]
    pub local_rope_theta: Option<f64>,
    /// Scaling of the angles; it is not supported.
    #[serde(default)]
    pub rope_scaling: Option<serde_json::Value>,
    /// The id of padding; 50283 if absent, 0 if null.
    #[serde(default = "pad_token_id")]
    pub pad_token_id: Option<u32>,
    /// The names of the classes; [`Self::num_labels`] counts them.
    #[serde(default = "defaults::id2label", deserialize_with = "shared::label_texts")]
    pub id2label: BTreeMap<usize, String>,
}

fn unscaled() -> String {
    "default".to_string()
}
fn norm_eps() -> f64 {
    1e-5
}
fn first_token() -> Pooling {
    Pooling::Cls
}
fn local_attention() -> usize {
    128
}
fn every_third() -> usize {
    3
}
fn local_rope_theta() -> Option<f64> {
    Some(10_000.0)
}
fn pad_token_id() -> Option<u32> {
    Some(50_283)
}

impl ModernBertConfig {
    shared::config_methods!("rope_parameters");

    /// Checks that the values fit each other and are supported.
    ///
    /// # Errors
    /// If an option is invalid or not supported; the error names the first.
    pub fn validate(&self) -> Result<()> {
        shared::check_is("model_type", &self.model_type, "modernbert")?;
        checks::sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("global_attn_every_n_layers", self.global_attn_every_n_layers),
        ])?;
        shared::check_heads("num_attention_heads", self.num_attention_heads, self.hidden_size)?;
        let head = self.hidden_size / self.num_attention_heads;
        if !head.is_multiple_of(2) {
            let reason = format!("expected heads of even width, got {head}");
            return Err(Error::config("num_attention_heads", reason));
        }
        shared::check_is("hidden_activation", &self.hidden_activation, "gelu")?;
        shared::check_is("classifier_activation", &self.classifier_activation, "gelu")?;
        if let Some(types) = self.layer_types.as_ref().filter(|types| types.len() != self.num_hidden_layers) {
            let reason = format!("{} types for {} layers", types.len(), self.num_hidden_layers);
            return Err(Error::config("layer_types", reason));
        }
        self.check_rope()?;
        checks::token_id("pad_token_id", self.pad_id(), self.vocab_size)?;
        check::positive("norm_eps", self.norm_eps)?;
        checks::rates(&[
            ("embedding_dropout", self.embedding_dropout),
            ("attention_dropout", self.attention_dropout),
            ("mlp_dropout", self.mlp_dropout),
            ("classifier_dropout", self.classifier_dropout),
        ])
    }

    fn check_rope(&self) -> Result<()> {
        if self.rope_scaling.is_some() {
            return Err(Error::config("rope_scaling", "scaled rotary positions are not supported here"));
        }
        for layer_type in [LayerType::FullAttention, LayerType::SlidingAttention] {
            if let Some(rope) = self.rope(layer_type) {
                shared::check_is("rope_type", &rope.rope_type, "default")?;
                if let Some(share) = rope.partial_rotary_factor.filter(|share| *share != 1.0) {
                    let reason = format!("expected 1, as in ModernBERT, got {share}");
                    return Err(Error::config("partial_rotary_factor", reason));
                }
            }
            check::positive("rope_theta", self.rope_theta(layer_type))?;
        }
        Ok(())
    }

    fn rope(&self, layer_type: LayerType) -> Option<&Rope> {
        let both = self.rope_parameters.as_ref()?;
        match layer_type {
            LayerType::FullAttention => both.full_attention.as_ref(),
            LayerType::SlidingAttention => both.sliding_attention.as_ref(),
        }
    }

    /// The base of the frequencies in layers of this type.
    pub(crate) fn rope_theta(&self, layer_type: LayerType) -> f64 {
        let global = || self.global_rope_theta.unwrap_or(160_000.0);
        let old = || match layer_type {
            LayerType::FullAttention => global(),
            LayerType::SlidingAttention => self.local_rope_theta.unwrap_or_else(global),
        };
        self.rope(layer_type).and_then(|rope| rope.rope_theta).unwrap_or_else(old)
    }

    /// The type of layer `i`.
    pub(crate) fn layer_type(&self, i: usize) -> LayerType {
        match &self.layer_types {
            Some(types) => types[i],
            None if i.is_multiple_of(self.global_attn_every_n_layers) => LayerType::FullAttention,
            None => LayerType::SlidingAttention,
        }
    }

    /// The id of padding.
    pub fn pad_id(&self) -> u32 {
        self.pad_token_id.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use serde_json::{json, Value};

    /// The `config.json` of answerdotai/ModernBERT-base, without fields that do not shape the computation.
    fn old() -> Value {
        json!({"model_type": "modernbert", "attention_bias": false, "attention_dropout": 0.0,
            "classifier_activation": "gelu", "classifier_bias": false, "classifier_dropout": 0.0,
            "classifier_pooling": "mean", "embedding_dropout": 0.0, "global_attn_every_n_layers": 3,
            "global_rope_theta": 160000.0, "hidden_activation": "gelu", "hidden_size": 768,
            "initializer_range": 0.02, "intermediate_size": 1152, "local_attention": 128,
            "local_rope_theta": 10000.0, "max_position_embeddings": 8192, "mlp_bias": false,
            "mlp_dropout": 0.0, "norm_bias": false, "norm_eps": 1e-5, "num_attention_heads": 12,
            "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute",
            "vocab_size": 50368})
    }

    fn read(json: &Value) -> Result<ModernBertConfig> {
        ModernBertConfig::parse(json.to_string().as_bytes(), Path::new("config.json"))
    }

    #[test]
    fn old_and_new_files_say_the_same() {
        let mut new = old();
        for name in ["global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"] {
            new.as_object_mut().unwrap().remove(name);
        }
        let types = (0..22).map(|i| if i % 3 == 0 { "full_attention" } else { "sliding_attention" });
        new["layer_types"] = types.collect::<Vec<_>>().into();
        new["rope_parameters"] = json!({"full_attention": {"rope_type": "default", "rope_theta": 160000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}});
        let (old, new) = (read(&old()).unwrap(), read(&new).unwrap());
        for i in 0..22 {
            let layer_type = old.layer_type(i);
            assert_eq!(layer_type, new.layer_type(i));
            assert_eq!(old.rope_theta(layer_type), new.rope_theta(layer_type));
        }
        assert_eq!(
            (old.layer_type(21), old.layer_type(20)),
            (LayerType::FullAttention, LayerType::SlidingAttention)
        );
        assert_eq!((old.classifier_pooling, old.pad_id()), (Pooling::Mean, 50283));
    }

    #[test]
    fn flat_rotary_positions_are_those_of_both_types() {
        let mut flat = old();
        flat["rope_parameters"] =
            json!({"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 1.0});
        let read = read(&flat).unwrap();
        for layer_type in [LayerType::FullAttention, LayerType::SlidingAttention] {
            assert_eq!(read.rope_theta(layer_type), 50_000.0);
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (name, value, said) in [
            ("hidden_activation", json!("silu"), "hidden_activation: expected gelu, got silu"),
            ("classifier_pooling", json!("max"), "unknown variant `max`"),
            ("layer_types", json!(["full_attention"]), "layer_types: 1 types for 22 layers"),
            ("layer_types", json!(["chunked"]), "unknown variant `chunked`"),
            ("rope_scaling", json!({"rope_type": "yarn"}), "rope_scaling: scaled rotary positions"),
            (
                "rope_parameters",
                json!({"full_attention": {"rope_type": "yarn"}}),
                "rope_type: expected default, got yarn",
            ),
            ("rope_parameters", json!({"rope_type": "linear"}), "rope_type: expected default, got linear"),
            (
                "rope_parameters",
                json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0}),
                "unknown field `factor`",
            ),
            ("rope_parameters", json!({"sliding": {"rope_theta": 1e4}}), "unknown field `sliding`"),
            ("rope_parameters", json!({"full_attention": {"factor": 4.0}}), "unknown field `factor`"),
            (
                "rope_parameters",
                json!({"sliding_attention": {"partial_rotary_factor": 0.5}}),
                "partial_rotary_factor: expected 1, as in ModernBERT, got 0.5",
            ),
            ("global_rope_theta", json!(-1.0), "rope_theta"),
            ("num_attention_heads", json!(256), "expected heads of even width, got 3"),
            ("pad_token_id", json!(50368), "pad_token_id: 50368 is outside"),
            ("mlp_dropout", json!(1.5), "mlp_dropout: expected a number in [0, 1)"),
        ] {
            let mut json = old();
            json[name] = value;
            let error = read(&json).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains(said), "{error}");
        }
    }
}
