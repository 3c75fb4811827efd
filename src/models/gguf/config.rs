//! Conversion of a GGUF file's metadata to a `config.json`.

use serde_json::{json, Map, Value as Json};

use super::architecture::Windows;
use super::file::Gguf;
use super::rope::Llama3;
use super::value::Value;
use crate::error::Result;

impl Gguf {
    /// Returns the model's configuration as Hugging Face's `config.json`, from the file's metadata and what
    /// llama.cpp assumes for the architecture.
    ///
    /// # Errors
    /// If a key is missing or its value has the wrong type, or the model needs an unsupported feature.
    pub fn config(&self) -> Result<Json> {
        let mut config = self.sizes()?;
        self.tokens(&mut config)?;
        self.rotary(&mut config)?;
        self.attention(&mut config)?;
        Ok(Json::Object(config))
    }

    /// The number of heads of q, or of k and v.
    pub(super) fn heads(&self, queries: bool) -> Result<usize> {
        let all = self.required("attention.head_count")?;
        Ok(match queries {
            true => all,
            false => self.whole("attention.head_count_kv")?.unwrap_or(all),
        })
    }

    /// Prefixes a key with the architecture, as in `llama.block_count`.
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture().name)
    }

    fn setting(&self, key: &str) -> Option<&Value> {
        self.value(&self.key(key))
    }

    /// The value of a key as a non-negative integer, if the key is present.
    fn whole(&self, key: &str) -> Result<Option<usize>> {
        self.setting(key).map(|value| self.expect(key, value, value.as_u64().map(|n| n as usize))).transpose()
    }

    fn required(&self, key: &str) -> Result<usize> {
        self.whole(key)?.ok_or_else(|| self.error(format!("{} is missing", self.key(key))))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.setting(key).map(|value| self.expect(key, value, value.as_f64())).transpose()
    }

    /// Returns `is`, or an error that `value` has the wrong type.
    fn expect<T>(&self, key: &str, value: &Value, is: Option<T>) -> Result<T> {
        is.ok_or_else(|| {
            let what = match value {
                Value::Ints(_) | Value::Other(_) => "one value for all layers, got an array".to_string(),
                Value::Texts(_) | Value::Floats(_) => "a number, got an array".to_string(),
                other => format!("a number, got {other:?}"),
            };
            self.error(format!("{}: expected {what}", self.key(key)))
        })
    }

    fn sizes(&self) -> Result<Map<String, Json>> {
        let architecture = self.architecture();
        // From the tensor, not `vocab_size`: a file may have more rows than its tokenizer has tokens.
        let vocabulary = match self.info("token_embd.weight").map(|info| info.shape.as_slice()) {
            Some([rows, _]) => *rows,
            _ => return Err(self.error("there is no tensor token_embd.weight with two axes")),
        };
        let epsilon = self.number("attention.layer_norm_rms_epsilon")?;
        let epsilon = epsilon.ok_or_else(|| {
            self.error(format!("{} is missing", self.key("attention.layer_norm_rms_epsilon")))
        })?;
        let config = json!({
            "model_type": architecture.model_type,
            "vocab_size": vocabulary,
            "hidden_size": self.required("embedding_length")?,
            "intermediate_size": self.required("feed_forward_length")?,
            "num_hidden_layers": self.required("block_count")?,
            "num_attention_heads": self.heads(true)?,
            "num_key_value_heads": self.heads(false)?,
            "max_position_embeddings": self.required("context_length")?,
            "rms_norm_eps": short(epsilon),
            "tie_word_embeddings": self.info("output.weight").is_none(),
        });
        let Json::Object(mut config) = config else { return Ok(Map::new()) };
        let (key, activation) = if architecture.gelu {
            ("hidden_activation", "gelu_pytorch_tanh")
        } else {
            ("hidden_act", "silu")
        };
        config.insert(key.into(), json!(activation));
        Ok(config)
    }

    fn tokens(&self, config: &mut Map<String, Json>) -> Result<()> {
        let id = |name: &str| self.value(&format!("tokenizer.ggml.{name}_token_id")).and_then(Value::as_u64);
        for (name, ours) in [("bos", "bos_token_id"), ("padding", "pad_token_id")] {
            if let Some(id) = id(name) {
                config.insert(ours.into(), json!(id));
            }
        }
        // The tokens that end a text, a turn or a message.
        let mut ends: Vec<u64> = Vec::new();
        for id in [id("eos"), id("eot"), id("eom")].into_iter().flatten() {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        match ends.as_slice() {
            [] => {}
            [one] => drop(config.insert("eos_token_id".into(), json!(one))),
            many => drop(config.insert("eos_token_id".into(), json!(many))),
        }
        Ok(())
    }

    fn rotary(&self, config: &mut Map<String, Json>) -> Result<()> {
        let theta = self.number("rope.freq_base")?.unwrap_or(10000.0);
        config.insert("rope_theta".into(), json!(short(theta)));
        let heads = self.heads(true)?.max(1);
        let width = match self.whole("attention.key_length")? {
            Some(width) => {
                if self.whole("attention.value_length")?.is_some_and(|other| other != width) {
                    return Err(
                        self.error("value heads of another width than the key heads are not supported")
                    );
                }
                config.insert("head_dim".into(), json!(width));
                width
            }
            None => self.required("embedding_length")? / heads,
        };
        if let Some(turned) =
            self.whole("rope.dimension_count")?.filter(|turned| *turned != width && width > 0)
        {
            config.insert("partial_rotary_factor".into(), json!(turned as f64 / width as f64));
        }
        if let Some(theta) = self.number("rope.freq_base_swa")? {
            config.insert("rope_local_base_freq".into(), json!(short(theta)));
        }
        if let Some(scaling) = self.scaling(theta)? {
            config.insert("rope_scaling".into(), scaling);
        }
        let original = self.whole("rope.scaling.original_context_length")?;
        if let Some(original) = original.filter(|_| self.architecture().long_rope) {
            config.insert("original_max_position_embeddings".into(), json!(original));
        }
        Ok(())
    }

    /// The scaling of the rotary frequencies of base `theta`, as Hugging Face's `rope_scaling`.
    fn scaling(&self, theta: f64) -> Result<Option<Json>> {
        // Without a type, a factor means linear scaling of positions.
        let kind = self.setting("rope.scaling.type").and_then(Value::as_str).unwrap_or("linear");
        self.only_usual(kind)?;
        if let Some(factors) = self.vector("rope_freqs.weight")? {
            // The rule of other factors is unknown: express them as LongRoPE, equal for all lengths.
            let spelt = || json!({"rope_type": "longrope", "long_factor": factors, "short_factor": factors, "attention_factor": 1.0});
            return Ok(Some(Llama3::behind(&factors, theta).map_or_else(spelt, Llama3::to_json)));
        }
        let (long, near) =
            (self.vector("rope_factors_long.weight")?, self.vector("rope_factors_short.weight")?);
        if let (Some(long), Some(short)) = (long, near) {
            let mut scaling = json!({"rope_type": "longrope", "long_factor": long, "short_factor": short});
            if let Some(factor) = self.number("rope.scaling.attn_factor")? {
                scaling["attention_factor"] = json!(factor);
            }
            return Ok(Some(scaling));
        }
        let factor = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?,
        };
        match (kind, factor) {
            ("none", _) | ("linear" | "longrope", None) => Ok(None),
            ("linear", Some(factor)) if factor == 1.0 || factor == 0.0 => Ok(None),
            ("linear", Some(factor)) => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
            ("yarn", Some(factor)) => {
                let mut scaling = json!({"rope_type": "yarn", "factor": factor});
                if let Some(original) = self.whole("rope.scaling.original_context_length")? {
                    scaling["original_max_position_embeddings"] = json!(original);
                }
                for (key, theirs) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                    if let Some(turns) = self.number(&format!("rope.scaling.{key}"))? {
                        scaling[theirs] = json!(short(turns));
                    }
                }
                Ok(Some(scaling))
            }
            (other, _) => {
                let key = self.key("rope.scaling.type");
                Err(self.error(format!("{key}: expected none, linear, yarn or longrope, got {other}")))
            }
        }
    }

    /// Refuses factors that llama.cpp applies on top of those of the scaling type itself.
    fn only_usual(&self, kind: &str) -> Result<()> {
        let by_factors = self.info("rope_factors_long.weight").is_some();
        // A negative `yarn_ext_factor` means the default of the scaling type.
        let mixed = f64::from(u8::from(kind == "yarn"));
        for (key, usual) in
            [("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0), ("yarn_ext_factor", mixed)]
                .into_iter()
                .chain((!by_factors).then_some(("attn_factor", 1.0)))
        {
            let key = format!("rope.scaling.{key}");
            let given = self.number(&key)?.filter(|given| *given != usual);
            if let Some(given) = given.filter(|given| !(key.ends_with("ext_factor") && *given < 0.0)) {
                return Err(self.error(format!("{}: expected {usual}, got {given}", self.key(&key))));
            }
        }
        Ok(())
    }

    fn attention(&self, config: &mut Map<String, Json>) -> Result<()> {
        if self.setting("attention.causal").is_some_and(|causal| causal.as_bool() != Some(true)) {
            let key = self.key("attention.causal");
            return Err(self.error(format!("{key}: bidirectional attention is not supported: expected true")));
        }
        self.biases(config)?;
        self.caps(config)?;
        self.windows(config)?;
        self.scale(config)
    }

    /// Adds whether projections have biases, where that is for the file to say.
    fn biases(&self, config: &mut Map<String, Json>) -> Result<()> {
        if !self.architecture().has_bias_fields {
            return Ok(());
        }
        let has = |tensor: &str| self.info(tensor).is_some();
        let bias = has("blk.0.attn_q.bias");
        if bias != has("blk.0.attn_output.bias") {
            return Err(
                self.error("expected biases on both the query and the output projection, or on neither")
            );
        }
        config.insert("attention_bias".into(), json!(bias));
        config.insert("mlp_bias".into(), json!(has("blk.0.ffn_gate.bias")));
        Ok(())
    }

    /// Adds the soft caps on scores and logits, which both sides call the same.
    fn caps(&self, config: &mut Map<String, Json>) -> Result<()> {
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if let Some(cap) = self.number(key)?.filter(|cap| *cap > 0.0) {
                config.insert(key.into(), json!(short(cap)));
            }
        }
        Ok(())
    }

    /// Adds the sliding window and, where llama.cpp assumes which layers have it, the type of each layer.
    fn windows(&self, config: &mut Map<String, Json>) -> Result<()> {
        let architecture = self.architecture();
        let windows = architecture.windows.as_ref();
        let window = self.whole("attention.sliding_window")?.filter(|window| *window > 0);
        let window = window.or(windows.and_then(|windows| windows.default));
        if let Some(window) = window {
            config.insert("sliding_window".into(), json!(window));
        }
        if let Some(windows) = windows {
            config.insert("layer_types".into(), self.layer_types(windows, window.is_some())?);
        } else if let Some(name) = architecture.windowed_as.filter(|_| window.is_some()) {
            config.insert("model_type".into(), json!(name));
        }
        Ok(())
    }

    /// The type of each layer, with or without the architecture's windows.
    fn layer_types(&self, windows: &Windows, windowed: bool) -> Result<Json> {
        if self.setting("attention.sliding_window_pattern").is_some() {
            let reason = "only the architecture's own pattern of windows is supported";
            return Err(self.error(format!("{}: {reason}", self.key("attention.sliding_window_pattern"))));
        }
        let layers = self.required("block_count")?;
        // Refuse a `block_count` above the number of tensors before allocating a list of that size.
        if layers > self.tensor_names().count() {
            return Err(self.error(format!(
                "{}: the file has too few tensors for {layers} blocks",
                self.key("block_count")
            )));
        }
        let kind = |layer: usize| match windowed && windows.has(layer) {
            true => "sliding_attention",
            false => "full_attention",
        };
        Ok((0..layers).map(kind).collect())
    }

    /// Adds the attention scale, in the families whose `config.json` has one.
    fn scale(&self, config: &mut Map<String, Json>) -> Result<()> {
        let architecture = self.architecture();
        if architecture.wide_scale_layers.is_some() {
            let share = self.required("embedding_length")? / self.heads(true)?.max(1);
            let head_dim = self.whole("attention.key_length")?.unwrap_or(share);
            let scalar = architecture.query_scalar(self.required("block_count")?, share, head_dim);
            config.insert("query_pre_attn_scalar".into(), json!(scalar));
        }
        Ok(())
    }
}

/// Returns the shortest decimal of a value that came from f32: `1e-5` rather than `9.999999747378752e-6`.
fn short(value: f64) -> f64 {
    let single = value as f32;
    if f64::from(single) != value {
        return value;
    }
    single.to_string().parse().unwrap_or(value)
}
