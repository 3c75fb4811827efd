//! The configuration of a decoder, as Hugging Face's `config.json` has it.

use std::path::Path;

use candle_transformers::models::llama::{self as candle_llama, Config, LlamaEosToks};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::util::{check, json};

/// `candle-transformers`' configuration and what training needs beyond it.
#[derive(Debug, Clone)]
pub struct DecoderConfig {
    /// The fields that shape the computation.
    pub decoder: Config,
    /// The id of padding, where the model has one.
    pub pad_token_id: Option<u32>,
    /// The number of outputs of a classification head.
    pub num_labels: usize,
    /// Dropout of the attention probabilities, in training.
    pub attention_dropout: f64,
    /// The standard deviation that new weights start with.
    pub initializer_range: f64,
}

/// What `candle-transformers` does not read.
#[derive(Deserialize)]
struct Extra {
    #[serde(default)]
    pad_token_id: Option<i64>,
    #[serde(default)]
    id2label: Option<Map<String, Value>>,
    #[serde(default)]
    num_labels: Option<usize>,
    #[serde(default)]
    attention_dropout: Option<f64>,
    #[serde(default)]
    initializer_range: Option<f64>,
    #[serde(default)]
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    head_dim: Option<usize>,
    #[serde(default)]
    model_type: Option<String>,
    #[serde(default)]
    partial_rotary_factor: Option<f64>,
}

impl DecoderConfig {
    /// Reads and checks a `config.json`, of old and of new versions of transformers. [`Self::from_files`] reads what
    /// else a model says of the end of a text.
    ///
    /// # Errors
    /// If the file cannot be read, is not such a configuration, or asks for what is not supported.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::parse(json::read_config(path)?.as_bytes(), path)
    }

    /// The same from the file's bytes; `path` only names it in errors.
    pub(crate) fn parse(text: &[u8], path: &Path) -> Result<Self> {
        let value = json::parse(text, path)?;
        Self::from_value(value).map_err(|e| Error::format(path, e.to_string()))
    }

    /// The same from the parsed text.
    ///
    /// # Errors
    /// As [`Self::from_file`].
    pub fn from_value(mut value: Value) -> Result<Self> {
        let malformed = |e: serde_json::Error| Error::config("config.json", e.to_string());
        json::drop_nulls(&mut value, &["rope_parameters", "rope_scaling"]);
        let extra: Extra = serde_json::from_value(value.clone()).map_err(malformed)?;
        extra.check(&value)?;
        classic_rope(&mut value)?;
        let decoder: candle_llama::LlamaConfig = serde_json::from_value(value).map_err(malformed)?;
        let labels = extra.id2label.as_ref().map(Map::len).or(extra.num_labels);
        let config = Self {
            decoder: decoder.into_config(false),
            pad_token_id: extra.pad_id()?,
            num_labels: labels.unwrap_or(2),
            attention_dropout: extra.attention_dropout.unwrap_or(0.0),
            initializer_range: extra.initializer_range.unwrap_or(0.02),
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks that the values fit each other.
    ///
    /// # Errors
    /// Names the first option at fault.
    pub fn validate(&self) -> Result<()> {
        let c = &self.decoder;
        let sizes = [
            ("vocab_size", c.vocab_size),
            ("hidden_size", c.hidden_size),
            ("intermediate_size", c.intermediate_size),
            ("num_attention_heads", c.num_attention_heads),
            ("num_key_value_heads", c.num_key_value_heads),
            ("max_position_embeddings", c.max_position_embeddings),
            ("num_labels", self.num_labels),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::config(*name, "must be positive"));
        }
        let heads = c.num_attention_heads;
        if !c.hidden_size.is_multiple_of(heads.saturating_mul(2)) {
            let reason = format!("{heads} heads do not divide {} into even widths", c.hidden_size);
            return Err(Error::config("num_attention_heads", reason));
        }
        if !heads.is_multiple_of(c.num_key_value_heads) {
            let reason = format!("{} do not divide {heads} heads", c.num_key_value_heads);
            return Err(Error::config("num_key_value_heads", reason));
        }
        if !(0.0..1.0).contains(&self.attention_dropout) {
            let reason = format!("expected [0, 1), got {}", self.attention_dropout);
            return Err(Error::config("attention_dropout", reason));
        }
        let ends = self.eos_token_ids().into_iter().map(|id| ("eos_token_id", id));
        let mut special = self.pad_token_id.map(|id| ("pad_token_id", id)).into_iter().chain(ends);
        if let Some((name, id)) = special.find(|(_, id)| *id as usize >= c.vocab_size) {
            return Err(Error::config(name, format!("{id} is outside a vocabulary of {}", c.vocab_size)));
        }
        check::positive("rms_norm_eps", c.rms_norm_eps)?;
        let positive = |value: f32| value > 0.0 && value.is_finite();
        if !positive(c.rope_theta) {
            return Err(Error::config(
                "rope_theta",
                format!("expected a positive number, got {}", c.rope_theta),
            ));
        }
        match &c.rope_scaling {
            Some(rope) if matches!(rope.rope_type, candle_llama::Llama3RopeType::Llama3) => {
                let (low, high) = (rope.low_freq_factor, rope.high_freq_factor);
                let fits = positive(rope.factor) && positive(low) && high > low;
                if fits && rope.original_max_position_embeddings > 0 {
                    return Ok(());
                }
                let reason = format!(
                    "llama3 wants a positive factor, 0 < low_freq_factor < high_freq_factor and an \
                     original length, got {rope:?}"
                );
                Err(Error::config("rope_scaling", reason))
            }
            _ => Ok(()),
        }
    }

    /// The width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.decoder.hidden_size / self.decoder.num_attention_heads
    }

    /// The tokens that end a text.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        match &self.decoder.eos_token_id {
            None => Vec::new(),
            Some(LlamaEosToks::Single(id)) => vec![*id],
            Some(LlamaEosToks::Multiple(ids)) => ids.clone(),
        }
    }

    /// The id that fills a batch. It is masked, so that any id serves where the model has none.
    pub fn pad_id(&self) -> u32 {
        self.pad_token_id.or_else(|| self.eos_token_ids().first().copied()).unwrap_or(0)
    }

    /// The same configuration with `n` outputs of a classification head.
    pub fn with_num_labels(mut self, n: usize) -> Self {
        self.num_labels = n;
        self
    }
}

impl Extra {
    fn pad_id(&self) -> Result<Option<u32>> {
        match self.pad_token_id {
            // Some checkpoints write -1 for "none".
            None | Some(-1) => Ok(None),
            Some(id) => match u32::try_from(id) {
                Ok(id) => Ok(Some(id)),
                Err(_) => Err(Error::config("pad_token_id", format!("{id} is no token id"))),
            },
        }
    }

    /// Refuses by name what would silently compute something else.
    fn check(&self, value: &Value) -> Result<()> {
        if let Some(other) = self.model_type.as_deref().filter(|kind| *kind != "llama") {
            return Err(Error::config("model_type", format!("expected llama, got {other}")));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(Error::config("hidden_act", format!("expected silu, got {act}")));
        }
        for (name, set) in [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)] {
            if set {
                return Err(Error::config(name, "linear layers with a bias are not supported"));
            }
        }
        whole_rotary(self.partial_rotary_factor)?;
        let size = |name: &str| value.get(name).and_then(Value::as_u64).unwrap_or(0) as usize;
        let (hidden, heads) = (size("hidden_size"), size("num_attention_heads"));
        match self.head_dim {
            Some(dim) if dim.checked_mul(heads) != Some(hidden) => {
                let reason = format!("{heads} heads of {dim} do not make a hidden_size of {hidden}");
                Err(Error::config("head_dim", reason))
            }
            _ => Ok(()),
        }
    }
}

/// Refuses rotary positions on a part of each head.
fn whole_rotary(factor: Option<f64>) -> Result<()> {
    match factor {
        Some(factor) if factor != 1.0 => {
            Err(Error::config("partial_rotary_factor", format!("expected 1, got {factor}")))
        }
        _ => Ok(()),
    }
}

/// Writes the rotary settings where `candle-transformers` looks for them: transformers 5 keeps
/// them in `rope_parameters`, older versions in `rope_theta` and `rope_scaling`, whose kind was
/// called `type` at first.
fn classic_rope(value: &mut Value) -> Result<()> {
    let Some(fields) = value.as_object_mut() else {
        return Err(Error::config("config.json", "expected an object"));
    };
    match fields.remove("rope_parameters") {
        Some(Value::Object(mut rope)) => {
            if let Some(theta) = rope.remove("rope_theta") {
                fields.insert("rope_theta".to_string(), theta);
            }
            match rope.remove("partial_rotary_factor") {
                None | Some(Value::Null) => {}
                Some(factor) => whole_rotary(Some(factor.as_f64().unwrap_or(f64::NAN)))?,
            }
            fields.insert("rope_scaling".to_string(), Value::Object(rope));
        }
        None | Some(Value::Null) => {}
        Some(other) => {
            return Err(Error::config("rope_parameters", format!("expected an object, got {other}")));
        }
    }
    let Some(Value::Object(rope)) = fields.get_mut("rope_scaling") else {
        return Ok(());
    };
    if let Some(kind) = rope.remove("type") {
        rope.entry("rope_type").or_insert(kind);
    }
    let kind = rope.get("rope_type").and_then(Value::as_str).unwrap_or("default");
    match kind {
        "llama3" => Ok(()),
        // candle-transformers wants every field of the other kind, too.
        "default" => {
            fields.insert("rope_scaling".to_string(), Value::Null);
            Ok(())
        }
        other => {
            let reason = format!("expected default or llama3, got {other}");
            Err(Error::config("rope_scaling", reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        assert_eq!((old.head_dim(), old.eos_token_ids()), (128, vec![128001, 128008]));
        assert_eq!(old.pad_id(), 128001);
        let mut new = llama3();
        let fields = new.as_object_mut().unwrap();
        let mut rope = fields.remove("rope_scaling").unwrap();
        rope["rope_theta"] = fields.remove("rope_theta").unwrap();
        fields.insert("rope_parameters".to_string(), rope);
        let new = DecoderConfig::from_value(new)?;
        assert_eq!(format!("{old:?}"), format!("{new:?}"));
        assert_eq!(new.decoder.rope_theta, 500000.0);
        Ok(())
    }

    #[test]
    fn plain_positions_may_be_spelt_out() -> Result<()> {
        let mut value = llama3();
        value["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10000.0});
        let config = DecoderConfig::from_value(value)?;
        assert!(config.decoder.rope_scaling.is_none());
        assert_eq!(config.decoder.rope_theta, 10000.0);
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
        whole["rope_parameters"] = json!({"rope_type": "default", "rope_theta": null});
        assert!(read(&whole).is_ok_and(|config| config.contains("rope_theta: 500000")), "{:?}", read(&whole));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let cases = [
            ("model_type", json!("mistral")),
            ("hidden_act", json!("gelu")),
            ("attention_bias", json!(true)),
            ("mlp_bias", json!(true)),
            ("head_dim", json!(64)),
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
            ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
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
