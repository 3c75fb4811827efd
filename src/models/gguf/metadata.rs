//! Conversion of a `config.json` to GGUF metadata: the inverse of `config`.

use serde_json::Value as Json;

use super::architecture::Architecture;
use super::rope::Llama3;
use super::value::Value;
use crate::error::{Error, Result};
use crate::models::decoder::{DecoderConfig, LayerConfig, Positions, RotaryScaling};

/// A model as GGUF describes it.
pub(super) struct Described {
    pub architecture: &'static Architecture,
    pub metadata: Vec<(String, Value)>,
    /// Factors of the rotary frequencies, which GGUF stores as tensors.
    pub factors: Vec<(&'static str, Vec<f32>)>,
    /// The numbers of heads of q, and of k and v.
    pub heads: (usize, usize),
    /// Whether the language-model head is tied to the embedding.
    pub tied: bool,
}

/// A parsed configuration, with defaults filled in, and its architecture.
struct Reader<'a> {
    /// The `config.json`, only to name the right field in errors.
    file: &'a Json,
    config: DecoderConfig,
    architecture: &'static Architecture,
}

impl Described {
    /// Describes the model of a `config.json`.
    ///
    /// # Errors
    /// If a field is missing, or its value has no place in GGUF and llama.cpp would compute otherwise.
    pub fn of(file: &Json) -> Result<Self> {
        let model_type = file["model_type"].as_str().unwrap_or("llama");
        let architecture =
            Architecture::of_model_type(model_type).map_err(|reason| Error::config("model_type", reason))?;
        let config = DecoderConfig::from_value(file.clone())?;
        let mut described = Self {
            architecture,
            metadata: vec![
                ("general.architecture".into(), architecture.name.into()),
                ("general.type".into(), "model".into()),
            ],
            factors: Vec::new(),
            heads: (config.num_attention_heads, config.num_key_value_heads),
            tied: config.tie_word_embeddings,
        };
        if let Some(name) = architecture.small_name.filter(|_| config.vocab_size < 100_000) {
            described.metadata.push(("general.name".into(), name.into()));
        }
        let read = Reader { file, config, architecture };
        read.sizes(&mut described)?;
        read.caps(&mut described)?;
        read.rotary(&mut described)?;
        read.windows(&mut described)?;
        Ok(described)
    }

    fn add(&mut self, key: &str, value: impl Into<Value>) {
        self.metadata.push((format!("{}.{key}", self.architecture.name), value.into()));
    }

    /// Adds a count as a 32-bit number; `theirs` is its field in `config.json`, for errors.
    fn count(&mut self, key: &str, theirs: &str, count: usize) -> Result<()> {
        let fits = u32::try_from(count);
        self.add(key, fits.map_err(|_| Error::config(theirs, format!("{count} does not fit in 32 bits")))?);
        Ok(())
    }
}

impl Reader<'_> {
    fn sizes(&self, described: &mut Described) -> Result<()> {
        let config = &self.config;
        for (key, theirs, count) in [
            ("vocab_size", "vocab_size", config.vocab_size),
            ("context_length", "max_position_embeddings", config.max_position_embeddings),
            ("embedding_length", "hidden_size", config.hidden_size),
            ("block_count", "num_hidden_layers", config.layers.len()),
            ("feed_forward_length", "intermediate_size", config.intermediate_size),
            ("attention.head_count", "num_attention_heads", config.num_attention_heads),
            ("attention.head_count_kv", "num_key_value_heads", config.num_key_value_heads),
        ] {
            described.count(key, theirs, count)?;
        }
        described.add("attention.layer_norm_rms_epsilon", config.rms_norm_eps as f32);
        if config.head_dim != self.usual_width() {
            described.count("attention.key_length", "head_dim", config.head_dim)?;
            described.count("attention.value_length", "head_dim", config.head_dim)?;
        }
        Ok(())
    }

    /// The head width that follows from the hidden size and the number of heads.
    fn usual_width(&self) -> usize {
        self.config.hidden_size / self.config.num_attention_heads.max(1)
    }

    /// Adds the soft caps, and checks the attention scale, which GGUF cannot express.
    fn caps(&self, described: &mut Described) -> Result<()> {
        let config = &self.config;
        for (key, cap) in
            [("attn_logit_softcapping", config.attention_cap), ("final_logit_softcapping", config.logit_cap)]
        {
            match cap {
                Some(cap) => described.add(key, cap as f32),
                None if self.architecture.always_capped => {
                    return Err(Error::config(
                        key,
                        "it is missing: llama.cpp always applies this cap to Gemma 2",
                    ));
                }
                None => {}
            }
        }
        let layers = config.layers.len();
        let usual = self.architecture.query_scalar(layers, self.usual_width(), config.head_dim) as f64;
        let scale = config.attention_scale.powi(-2);
        if (scale - usual).abs() > 1e-6 * usual {
            let reason = format!("llama.cpp assumes {usual}, got {scale:.3}");
            return Err(Error::config("query_pre_attn_scalar", reason));
        }
        Ok(())
    }

    fn rotary(&self, described: &mut Described) -> Result<()> {
        let rotary = &self.config.rotary;
        described.add("rope.freq_base", rotary.theta);
        if let Some(local) = &self.config.local_rotary {
            described.add("rope.freq_base_swa", local.theta);
        }
        described.count("rope.dimension_count", "partial_rotary_factor", rotary.dim)?;
        let by_factors = self.architecture.rope_factors;
        match &rotary.scaling {
            RotaryScaling::None => {}
            RotaryScaling::Linear { factor } => {
                described.add("rope.scaling.type", "linear");
                described.add("rope.scaling.factor", *factor);
            }
            &RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } if by_factors => {
                let rule = Llama3 {
                    factor: factor.into(),
                    low: low_freq_factor.into(),
                    high: high_freq_factor.into(),
                    original: original as f64,
                };
                let factors = rule.factors(rotary.theta.into(), rotary.dim);
                described.factors.push(("rope_freqs.weight", factors));
            }
            &RotaryScaling::Yarn { factor, beta_fast, beta_slow, original, truncate: true, magnitude } => {
                // llama.cpp computes YaRN's attention factor itself and multiplies it by the one in the file.
                let usual = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
                if (magnitude - usual).abs() > 1e-4 {
                    let reason = format!("attention_factor: llama.cpp assumes {usual}, got {magnitude}");
                    return Err(Error::config("rope_scaling", reason));
                }
                // llama.cpp reads these two only for other architectures.
                if (beta_fast, beta_slow) != (32.0, 1.0) {
                    let reason = format!(
                        "beta_fast, beta_slow: llama.cpp assumes 32, 1, got {beta_fast}, {beta_slow}"
                    );
                    return Err(Error::config("rope_scaling", reason));
                }
                described.add("rope.scaling.type", "yarn");
                described.add("rope.scaling.factor", factor);
                let theirs = "original_max_position_embeddings";
                described.count("rope.scaling.original_context_length", theirs, original)?;
                described.add("rope.scaling.yarn_beta_fast", beta_fast);
                described.add("rope.scaling.yarn_beta_slow", beta_slow);
            }
            // The form in which `config` reads factors of an unknown rule.
            RotaryScaling::LongRope { short, long, magnitude, .. }
                if by_factors && long == short && *magnitude == 1.0 =>
            {
                described.factors.push(("rope_freqs.weight", long.clone()));
            }
            RotaryScaling::LongRope { short, long, original, magnitude } if self.architecture.long_rope => {
                described.factors.push(("rope_factors_long.weight", long.clone()));
                described.factors.push(("rope_factors_short.weight", short.clone()));
                let theirs = "original_max_position_embeddings";
                described.count("rope.scaling.original_context_length", theirs, *original)?;
                described.add("rope.scaling.attn_factor", *magnitude);
            }
            other => {
                let reason = format!("GGUF files of {} cannot express {other:?}", self.architecture.name);
                return Err(Error::config("rope_scaling", reason));
            }
        }
        Ok(())
    }

    /// Adds the sliding window, and checks that the layers with a window are none or those llama.cpp assumes.
    fn windows(&self, described: &mut Described) -> Result<()> {
        let (architecture, longest) = (self.architecture, self.config.max_position_embeddings);
        let window = self.config.layers.iter().find_map(|layer| layer.window);
        let Some(windows) = &architecture.windows else {
            if architecture.has_unused_window {
                described.count("attention.sliding_window", "sliding_window", window.unwrap_or(0))?;
            }
            if let Some(window) = window.filter(|window| *window < longest) {
                let name = architecture.name;
                tracing::warn!(
                    "sliding_window: llama.cpp ignores it for {name}: texts of more than {window} tokens \
                     give other results"
                );
            }
            return self.positions();
        };
        let usual = |(at, layer): (usize, &LayerConfig)| {
            window.is_none() || layer.window.is_some() == windows.has(at)
        };
        if !self.config.layers.iter().enumerate().all(usual) {
            let every = windows.full_every;
            let reason = format!("llama.cpp assumes that one layer in {every} has no window");
            return Err(Error::config(self.given("layer_types", "sliding_window_pattern"), reason));
        }
        match window {
            Some(window) => described.count("attention.sliding_window", "sliding_window", window),
            // Without one, llama.cpp takes the architecture's: write one that covers the longest text.
            None if windows.default.is_some() => {
                described.count("attention.sliding_window", "sliding_window", longest)
            }
            None => Ok(()),
        }
    }

    /// Checks that the layers without positions are every fourth, where llama.cpp assumes it (SmolLM3).
    fn positions(&self) -> Result<()> {
        let usual = |(at, layer): (usize, &LayerConfig)| {
            (layer.positions == Positions::None) == (at + 1).is_multiple_of(4)
        };
        if self.architecture.fourth_unrotated && !self.config.layers.iter().enumerate().all(usual) {
            let reason = "llama.cpp assumes that every fourth layer has no rotary positions";
            return Err(Error::config(self.given("no_rope_layers", "no_rope_layer_interval"), reason));
        }
        Ok(())
    }

    /// The field to name in an error: `list` if the file has that list, else `other`.
    fn given(&self, list: &'static str, other: &'static str) -> &'static str {
        if self.file[list].is_array() {
            list
        } else {
            other
        }
    }
}
