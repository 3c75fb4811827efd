//! What a GGUF file says of its model, of a `config.json`: the way back of `config`.

use serde_json::Value as Json;

use super::architecture::Architecture;
use super::rope::Llama3;
use super::value::Value;
use crate::error::{Error, Result};

/// A model as GGUF describes it.
pub(super) struct Described {
    pub architecture: &'static Architecture,
    pub metadata: Vec<(String, Value)>,
    /// Factors of the rotary frequencies, which GGUF has as tensors.
    pub factors: Vec<(&'static str, Vec<f32>)>,
    /// The heads of q, and those of k and v.
    pub heads: (usize, usize),
    /// Whether the head is the embedding.
    pub tied: bool,
}

/// A `config.json` and the architecture that it is of.
struct Reader<'a> {
    config: &'a Json,
    architecture: &'static Architecture,
}

impl Described {
    /// What GGUF says of the model of this configuration.
    ///
    /// # Errors
    /// If a field is missing, or asks for what GGUF has no place for and llama.cpp would compute otherwise.
    pub fn of(config: &Json) -> Result<Self> {
        let config = if config["text_config"].is_object() { &config["text_config"] } else { config };
        let model_type = config["model_type"].as_str().unwrap_or("llama");
        let architecture =
            Architecture::of_model_type(model_type).map_err(|reason| Error::config("model_type", reason))?;
        let read = Reader { config, architecture };
        let heads = read.heads()?;
        let gemma = architecture.norm_plus_one;
        let mut described = Self {
            architecture,
            metadata: vec![
                ("general.architecture".into(), architecture.name.into()),
                ("general.type".into(), "model".into()),
            ],
            factors: Vec::new(),
            heads,
            tied: config["tie_word_embeddings"].as_bool().unwrap_or(gemma),
        };
        read.sizes(&mut described)?;
        read.rotary(&mut described)?;
        read.windows(&mut described)?;
        Ok(described)
    }

    fn add(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.push((format!("{}.{key}", self.architecture.name), value.into()));
    }
}

impl Reader<'_> {
    fn whole(&self, key: &str) -> Result<Option<usize>> {
        match &self.config[key] {
            Json::Null => Ok(None),
            value => match value.as_u64().filter(|value| u32::try_from(*value).is_ok()) {
                Some(value) => Ok(Some(value as usize)),
                None => Err(Error::config(key, format!("expected a whole number, got {value}"))),
            },
        }
    }

    fn required(&self, key: &str) -> Result<usize> {
        self.whole(key)?.ok_or_else(|| Error::config(key, "config.json has none"))
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.config[key].as_f64()
    }

    fn heads(&self) -> Result<(usize, usize)> {
        let heads = self.required("num_attention_heads")?;
        Ok((heads, self.whole("num_key_value_heads")?.unwrap_or(heads)))
    }

    /// The width of a head, and whether it is one of its own.
    fn head_dim(&self) -> Result<(usize, bool)> {
        let usual = self.required("hidden_size")? / self.heads()?.0.max(1);
        let default = match self.architecture.name {
            "qwen3" => 128,
            "gemma2" | "gemma3" => 256,
            _ => usual,
        };
        let width = self.whole("head_dim")?.unwrap_or(default);
        Ok((width, width != usual))
    }

    fn sizes(&self, described: &mut Described) -> Result<()> {
        for (key, theirs) in [
            ("vocab_size", "vocab_size"),
            ("context_length", "max_position_embeddings"),
            ("embedding_length", "hidden_size"),
            ("block_count", "num_hidden_layers"),
            ("feed_forward_length", "intermediate_size"),
        ] {
            described.add(key, self.required(theirs)? as u32);
        }
        let (heads, shared) = described.heads;
        described.add("attention.head_count", heads as u32);
        described.add("attention.head_count_kv", shared as u32);
        let epsilon = self.number("rms_norm_eps").unwrap_or(1e-6);
        described.add("attention.layer_norm_rms_epsilon", epsilon as f32);
        let (width, own) = self.head_dim()?;
        if own {
            described.add("attention.key_length", width as u32);
            described.add("attention.value_length", width as u32);
        }
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if let Some(cap) = self.number(key) {
                described.add(key, cap as f32);
            }
        }
        let layers = self.required("num_hidden_layers")?;
        let usual = match (self.architecture.name, layers) {
            ("gemma2", 46) | ("gemma3", 62) => self.required("hidden_size")? / heads.max(1),
            _ => width,
        };
        match self.number("query_pre_attn_scalar").filter(|_| self.architecture.norm_plus_one) {
            Some(scale) if scale != usual as f64 => {
                let reason = format!("llama.cpp holds {usual} for granted, got {scale}");
                Err(Error::config("query_pre_attn_scalar", reason))
            }
            _ => Ok(()),
        }
    }

    fn rotary(&self, described: &mut Described) -> Result<()> {
        // Old files have the settings side by side, new ones in one object, or in one for each kind of layers.
        let new = &self.config["rope_parameters"];
        let own = if new["full_attention"].is_object() { &new["full_attention"] } else { new };
        let scaling = if own.is_object() { own } else { &self.config["rope_scaling"] };
        let default = if self.architecture.name == "gemma3" { 1e6 } else { 1e4 };
        let theta = scaling["rope_theta"].as_f64().or(self.number("rope_theta")).unwrap_or(default);
        described.add("rope.freq_base", theta as f32);
        let local = new["sliding_attention"]["rope_theta"].as_f64().or(self.number("rope_local_base_freq"));
        if let Some(local) = local.filter(|_| self.architecture.name == "gemma3") {
            described.add("rope.freq_base_swa", local as f32);
        }
        let (width, _) = self.head_dim()?;
        let share =
            scaling["partial_rotary_factor"].as_f64().or(self.number("partial_rotary_factor")).unwrap_or(1.0);
        let turned = (width as f64 * share) as usize;
        described.add("rope.dimension_count", turned as u32);
        let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
        match kind {
            "default" => Ok(()),
            "linear" => {
                let factor = scaling["factor"].as_f64();
                let factor =
                    factor.ok_or_else(|| Error::config("rope_scaling", "linear scaling without a factor"))?;
                described.add("rope.scaling.type", "linear");
                described.add("rope.scaling.factor", factor as f32);
                Ok(())
            }
            "llama3" if matches!(self.architecture.name, "llama" | "smollm3") => {
                let rule = Llama3::of(scaling);
                let rule =
                    rule.ok_or_else(|| Error::config("rope_scaling", "a number of llama3's is missing"))?;
                described.factors.push(("rope_freqs.weight", rule.factors(theta, turned)));
                Ok(())
            }
            "yarn" if scaling["mscale"].is_null() && scaling["truncate"] != false => {
                self.yarn(described, scaling)
            }
            // What factors of no known rule are read as.
            "longrope"
                if matches!(self.architecture.name, "llama" | "smollm3")
                    && scaling["long_factor"] == scaling["short_factor"]
                    && scaling["attention_factor"] == 1.0 =>
            {
                described.factors.push(("rope_freqs.weight", factors(scaling, "long_factor", turned)?));
                Ok(())
            }
            "longrope" | "su" if self.architecture.name == "phi3" => {
                self.long_rotary(described, scaling, turned)
            }
            other => {
                let reason = format!("GGUF of {} has no place for {other}", self.architecture.name);
                Err(Error::config("rope_scaling", reason))
            }
        }
    }

    fn yarn(&self, described: &mut Described, scaling: &Json) -> Result<()> {
        let number = |key: &str| scaling[key].as_f64();
        let required = |key: &str| {
            number(key).ok_or_else(|| Error::config("rope_scaling", format!("yarn has no {key}")))
        };
        described.add("rope.scaling.type", "yarn");
        let factor = required("factor")?;
        // llama.cpp computes YaRN's own, and multiplies what the file says with it.
        let usual = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
        if let Some(given) = number("attention_factor").filter(|given| (given - usual).abs() > 1e-4) {
            let reason = format!("attention_factor: llama.cpp holds {usual} for granted, got {given}");
            return Err(Error::config("rope_scaling", reason));
        }
        described.add("rope.scaling.factor", factor as f32);
        let original = required("original_max_position_embeddings")?;
        described.add("rope.scaling.original_context_length", original as u32);
        for (key, theirs) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
            if let Some(value) = number(theirs) {
                described.add(&format!("rope.scaling.{key}"), value as f32);
            }
        }
        Ok(())
    }

    /// Phi-3's factors for short and for long texts.
    fn long_rotary(&self, described: &mut Described, scaling: &Json, turned: usize) -> Result<()> {
        described.factors.push(("rope_factors_long.weight", factors(scaling, "long_factor", turned)?));
        described.factors.push(("rope_factors_short.weight", factors(scaling, "short_factor", turned)?));
        let longest = self.required("max_position_embeddings")?;
        let original = scaling["original_max_position_embeddings"].as_u64().map(|original| original as usize);
        let original = original.or(self.whole("original_max_position_embeddings")?).unwrap_or(longest);
        let ratio = longest as f64 / original.max(1) as f64;
        let usual = if ratio > 1.0 { (1.0 + ratio.ln() / (original as f64).ln()).sqrt() } else { 1.0 };
        let factor = scaling["attention_factor"].as_f64().unwrap_or(usual);
        described.add("rope.scaling.original_context_length", original as u32);
        described.add("rope.scaling.attn_factor", factor as f32);
        Ok(())
    }

    /// Windows, where llama.cpp has them: those that it holds for granted, or none.
    fn windows(&self, described: &mut Described) -> Result<()> {
        let (layers, window) = (self.required("num_hidden_layers")?, self.whole("sliding_window")?);
        let every = match self.architecture.name {
            "gemma2" => 2,
            "gemma3" => 6,
            "phi3" => {
                described.add("attention.sliding_window", window.unwrap_or(0) as u32);
                0
            }
            _ => 0,
        };
        if every == 0 {
            let used = self.config["use_sliding_window"] != false;
            let longest = self.required("max_position_embeddings")?;
            if let Some(window) = window.filter(|window| used && *window < longest) {
                tracing::warn!(
                    "sliding_window: llama.cpp knows none of {}; texts of more than {window} tokens will differ",
                    self.architecture.name
                );
            }
            return self.positions(layers);
        }
        let usual = |(layer, kind): (usize, &Json)| {
            (kind == "sliding_attention") != (layer + 1).is_multiple_of(every)
        };
        let (key, fits) = match self.config["layer_types"].as_array() {
            Some(kinds) => ("layer_types", kinds.iter().enumerate().all(usual)),
            None => {
                let pattern =
                    self.whole("sliding_window_pattern")?.filter(|_| self.architecture.name == "gemma3");
                ("sliding_window_pattern", pattern.is_none_or(|pattern| pattern == every))
            }
        };
        if !fits {
            let reason = format!("llama.cpp holds for granted that one layer in {every} has no window");
            return Err(Error::config(key, reason));
        }
        if let Some(window) = window {
            described.add("attention.sliding_window", window as u32);
        }
        Ok(())
    }

    /// SmolLM3's layers without positions, of which llama.cpp holds for granted that they are each fourth.
    fn positions(&self, layers: usize) -> Result<()> {
        if self.architecture.name != "smollm3" {
            return Ok(());
        }
        let usual = |(layer, turned): (usize, &Json)| (turned == 1) != (layer + 1).is_multiple_of(4);
        let (key, fits) = match self.config["no_rope_layers"].as_array() {
            Some(turned) => ("no_rope_layers", turned.iter().take(layers).enumerate().all(usual)),
            None => {
                let interval = self.whole("no_rope_layer_interval")?;
                ("no_rope_layer_interval", interval.is_none_or(|interval| interval == 4))
            }
        };
        if !fits {
            let reason = "llama.cpp holds for granted that each fourth layer has no positions";
            return Err(Error::config(key, reason));
        }
        Ok(())
    }
}

/// The factors under `key`, one for each of the frequencies of `turned` numbers.
fn factors(scaling: &Json, key: &str, turned: usize) -> Result<Vec<f32>> {
    let numbers = scaling[key].as_array().into_iter().flatten().map(Json::as_f64);
    let numbers: Option<Vec<f32>> = numbers.map(|number| Some(number? as f32)).collect();
    let fits = numbers.filter(|numbers| numbers.len() == turned / 2);
    fits.ok_or_else(|| Error::config("rope_scaling", format!("{key}: expected {} numbers", turned / 2)))
}
