//! `adapter_config.json`: the fields of PEFT's `LoraConfig` that this crate reads and writes.
//!
//! Unknown keys, such as those of later PEFT versions, are ignored. Settings that change the meaning of A and
//! B are rejected by name, because an adapter read without them would silently compute something else.

use std::path::Path;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::inject::patterns::is_plain;
use crate::util::json;

/// PEFT's configuration of a LoRA adapter, with PEFT's names and defaults. Outside this crate, start from
/// `PeftConfig::default()` and set its fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct PeftConfig {
    /// The rank of every layer that `rank_pattern` does not name.
    pub r: usize,
    /// The numerator of the scale, `lora_alpha / r`, of every layer that `alpha_pattern` does not
    /// name.
    #[serde(serialize_with = "number")]
    pub lora_alpha: f64,
    /// The dropout rate of the input of A while training.
    #[serde(deserialize_with = "nullable")]
    pub lora_dropout: f64,
    /// Whether the scale is `lora_alpha / sqrt(r)`.
    #[serde(deserialize_with = "nullable")]
    pub use_rslora: bool,
    /// The layers that are adapted.
    pub target_modules: Option<TargetModules>,
    /// Layers that are not adapted although `target_modules` names them.
    pub exclude_modules: Option<TargetModules>,
    /// The indices of the blocks whose layers are adapted.
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// The name of the list of blocks to which these indices refer.
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Ranks of single layers: the first pattern that matches a path counts.
    #[serde(with = "in_order")]
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of single layers, by the same rule.
    #[serde(with = "in_order")]
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules that are trained and saved whole, such as a task head.
    pub modules_to_save: Option<Vec<String>>,
    /// The task, such as `SEQ_CLS` or `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// The base model: a hub repository or a folder.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
    /// The settings of a MonteCLoRA adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monteclora_config: Option<MonteCLoRAFields>,
}

impl Default for PeftConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            modules_to_save: None,
            task_type: None,
            base_model_name_or_path: None,
            revision: None,
            monteclora_config: None,
        }
    }
}

/// The six fields of PEFT's `MontecloraConfig`. PEFT cannot load a file with a seventh.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MonteCLoRAFields {
    /// The number of mixture components N.
    pub num_samples: usize,
    /// Whether the loss has the entropy term.
    pub use_entropy: bool,
    /// The concentration of the symmetric Dirichlet prior.
    pub dirichlet_prior: f64,
    /// The scaler of the perturbation.
    pub sample_scaler: f64,
    /// The weight of the KL divergences in the loss.
    pub kl_loss_weight: f64,
    /// How many draws are prepared at once.
    pub buffer_size: usize,
}

impl Default for MonteCLoRAFields {
    fn default() -> Self {
        Self {
            num_samples: 8,
            use_entropy: false,
            dirichlet_prior: 0.1,
            sample_scaler: 1e-4,
            kl_loss_weight: 1e-5,
            buffer_size: 150,
        }
    }
}

/// Layers by name: a regular expression that matches a whole path, or a list of paths and of
/// ends of paths (`query` or `attention.self.query`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// A regular expression in Python's syntax, or the word `all-linear`.
    Pattern(String),
    /// Paths or ends of paths.
    Names(Vec<String>),
}

/// A value, or several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One value.
    One(T),
    /// Several.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// Maximum number of patterns that need the regex engine. Each takes some microseconds to compile, and as
/// many as fit into a file would take minutes. Files that list each layer use plain names.
const MAX_EXPRESSIONS: usize = 1000;

/// Initialisations that do not change the base weight, compared without case: such an adapter is plain LoRA
/// once it is loaded.
const INITS: [&str; 4] = ["gaussian", "orthogonal", "eva", "mica"];

/// Settings that must be absent, null, false or empty, with a description for the error.
pub(super) const REFUSED: [(&str, &str); 12] = [
    ("use_dora", "DoRA"),
    ("lora_bias", "a bias of B"),
    ("alora_invocation_tokens", "aLoRA"),
    ("layer_replication", "replicated layers"),
    ("target_parameters", "adapters of bare parameters"),
    ("trainable_token_indices", "trained token embeddings"),
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "BD-LoRA"),
    ("arrow_config", "Arrow routing"),
    ("kasa_config", "KaSA"),
    ("velora_config", "VeLoRA"),
    ("megatron_config", "Megatron's layers"),
];

impl PeftConfig {
    /// Parses the text of the file `path`.
    pub(super) fn parse(text: &str, path: &Path) -> Result<Self> {
        let raw: Map<String, Value> = json::parse(text, path)?;
        refuse(&raw).map_err(|reason| Error::format(path, reason))?;
        let config: Self = json::parse_config(text, path, &["monteclora_config"])?;
        config.check().map_err(|reason| Error::format(path, reason))?;
        Ok(config)
    }

    /// Checks the values; the error names the first one outside its domain.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if self.r == 0 {
            return Err("r: expected at least 1, got 0".into());
        }
        if let Some((pattern, _)) = self.rank_pattern.iter().find(|(_, rank)| *rank == 0) {
            return Err(format!("rank_pattern: {pattern:?}: expected at least 1, got 0"));
        }
        let ranks = self.rank_pattern.iter().map(|(pattern, _)| pattern);
        let alphas = self.alpha_pattern.iter().map(|(pattern, _)| pattern);
        let patterns = ranks.chain(alphas).chain(self.modules_to_save.iter().flatten());
        let expressions = patterns.filter(|pattern| !is_plain(pattern)).count();
        if expressions > MAX_EXPRESSIONS {
            return Err(format!(
                "rank_pattern, alpha_pattern and modules_to_save: expected at most {MAX_EXPRESSIONS} regular \
                 expressions that are not plain names, got {expressions}"
            ));
        }
        positive("lora_alpha", self.lora_alpha)?;
        for (pattern, alpha) in &self.alpha_pattern {
            positive(&format!("alpha_pattern: {pattern:?}"), *alpha)?;
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(format!("lora_dropout: expected a number in [0, 1), got {}", self.lora_dropout));
        }
        if let Some(fields) = &self.monteclora_config {
            if fields.num_samples == 0 {
                return Err("monteclora_config.num_samples: expected at least 1, got 0".into());
            }
            positive("monteclora_config.dirichlet_prior", fields.dirichlet_prior)?;
            positive("monteclora_config.sample_scaler", fields.sample_scaler)?;
            let weight = fields.kl_loss_weight;
            if !(weight >= 0.0 && weight.is_finite()) {
                return Err(format!(
                    "monteclora_config.kl_loss_weight: expected zero or a positive number, got {weight}"
                ));
            }
        }
        Ok(())
    }

    /// The text of the file, including settings that PEFT's readers require although their values are fixed
    /// here.
    pub(super) fn to_text(&self) -> serde_json::Result<String> {
        #[derive(Serialize)]
        struct File<'a> {
            peft_type: &'a str,
            #[serde(flatten)]
            config: &'a PeftConfig,
            inference_mode: bool,
            bias: &'a str,
            fan_in_fan_out: bool,
            use_dora: bool,
            init_lora_weights: bool,
            loftq_config: Map<String, Value>,
        }
        let file = File {
            peft_type: "LORA",
            config: self,
            inference_mode: true,
            bias: "none",
            fan_in_fan_out: false,
            use_dora: false,
            init_lora_weights: true,
            loftq_config: Map::new(),
        };
        Ok(serde_json::to_string_pretty(&file)? + "\n")
    }
}

fn positive(field: &str, value: f64) -> std::result::Result<(), String> {
    if value > 0.0 && value.is_finite() {
        Ok(())
    } else {
        Err(format!("{field}: expected a positive number, got {value}"))
    }
}

/// Rejects an unsupported configuration, with the reason.
fn refuse(raw: &Map<String, Value>) -> std::result::Result<(), String> {
    match raw.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        Some(other) => return Err(format!("peft_type: expected LORA, got {other}")),
        None => return Err("peft_type is missing: is this the configuration of a PEFT adapter?".into()),
    }
    for (key, what) in REFUSED {
        let off = match raw.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(fields)) => fields.is_empty(),
            Some(_) => false,
        };
        if !off {
            return Err(format!("{key}: {what} is not supported"));
        }
    }
    match raw.get("bias") {
        None | Some(Value::Null) => {}
        Some(Value::String(bias)) if bias == "none" => {}
        Some(bias) => {
            return Err(format!("bias: trained biases are not supported (expected \"none\", got {bias})"))
        }
    }
    match raw.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(Value::String(init)) if INITS.contains(&init.to_lowercase().as_str()) => {}
        Some(init) => {
            return Err(format!(
            "init_lora_weights: {init} may change the base weights; convert the adapter to plain LoRA first"
        ))
        }
    }
    if raw.get("r").is_some_and(|rank| !rank.is_null()) {
        Ok(())
    } else {
        Err("r, the rank, is missing".into())
    }
}

/// Serialises a float without a fractional part as an integer, as PEFT's readers expect.
fn number<S: Serializer>(value: &f64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        serializer.serialize_i64(*value as i64)
    } else {
        serializer.serialize_f64(*value)
    }
}

/// Deserialises null as the default value.
fn nullable<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// (De)serialises a JSON object in order: of several patterns that match, PEFT takes the first.
mod in_order {
    use super::*;
    use std::marker::PhantomData;

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        pairs: &[(String, T)],
        serializer: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(pairs.iter().map(|(name, value)| (name, value)))
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Vec<(String, T)>, D::Error> {
        struct Pairs<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pairs<T> {
            type Value = Vec<(String, T)>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of patterns, or null")
            }

            fn visit_unit<E>(self) -> std::result::Result<Self::Value, E> {
                Ok(Vec::new())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs)
            }
        }
        deserializer.deserialize_any(Pairs(PhantomData))
    }
}
