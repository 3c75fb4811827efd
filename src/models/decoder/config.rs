//! What a decoder is made of: sizes and switches, whatever family they came from.

use candle_core::Device;

use super::positions::{Positions, RotaryConfig, RotaryScaling};
use crate::error::{Error, Result};
use crate::models::{checks, Placement};
use crate::util::check;
use crate::util::device::free_device_bytes;

/// The sizes of a decoder and the switches in which the families differ. [`Self::from_file`] reads them from the
/// `config.json` of one of [`Self::model_types`].
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// The family, as `config.json` names it.
    pub model_type: &'static str,
    /// The number of token ids.
    pub vocab_size: usize,
    /// The width of the residual stream.
    pub hidden_size: usize,
    /// The width inside a feed-forward block.
    pub intermediate_size: usize,
    /// The query heads.
    pub num_attention_heads: usize,
    /// The key heads, each of which serves as many query heads.
    pub num_key_value_heads: usize,
    /// The width of one head; all together need not be as wide as the residual stream.
    pub head_dim: usize,
    /// The longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// In what the layers differ, one entry a layer.
    pub layers: Vec<LayerConfig>,
    /// The rotary positions of the layers that say [`Positions::Global`].
    pub rotary: RotaryConfig,
    /// Those of the layers that say [`Positions::Local`] (Gemma 3).
    pub local_rotary: Option<RotaryConfig>,
    /// Whether the projections of queries, keys and values have a bias (Qwen 2).
    pub qkv_bias: bool,
    /// Whether the projection after attention has one.
    pub o_bias: bool,
    /// Whether the feed-forward block's have.
    pub mlp_bias: bool,
    /// Whether queries and keys of each head are RMS-normed before their rotation (Qwen 3, Gemma 3).
    pub qk_norm: bool,
    /// Whether queries, keys and values are one layer, `qkv_proj`, and gate and up another, `gate_up_proj` (Phi 3).
    pub fused_projections: bool,
    /// Whether attention and feed-forward are normed before they are added to the residual stream, too (Gemma).
    pub post_norms: bool,
    /// Whether norms multiply by `1 + w` rather than by `w` (Gemma).
    pub norm_offset: bool,
    /// What is added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// The gate of the feed-forward block.
    pub activation: Activation,
    /// What the product of a query and a key is multiplied by.
    pub attention_scale: f64,
    /// The soft cap on attention scores (Gemma 2).
    pub attention_cap: Option<f64>,
    /// The soft cap on the logits of the next token (Gemma 2).
    pub logit_cap: Option<f64>,
    /// What token embeddings are multiplied by (Gemma).
    pub embedding_scale: Option<f64>,
    /// Whether the head over the vocabulary is the embedding itself.
    pub tie_word_embeddings: bool,
    /// The token that begins a text, where the model has one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The id of padding, where the model has one.
    pub pad_token_id: Option<u32>,
    /// The number of outputs of a classification head.
    pub num_labels: usize,
    /// Dropout of the attention probabilities, in training.
    pub attention_dropout: f64,
    /// The standard deviation that new weights start with.
    pub initializer_range: f64,
}

/// What may be another in each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// A query sees this many keys, its own place included, and none before them. None: all.
    pub window: Option<usize>,
    /// Which rotary positions the layer has.
    pub positions: Positions,
}

/// The gate of a feed-forward block, `activation(gate) up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

impl DecoderConfig {
    /// The longest sequence, in tokens: `max_position_embeddings`, or what YaRN stretches the original context to, whose
    /// files may leave the former as it was.
    pub fn max_length(&self) -> usize {
        match &self.rotary.scaling {
            RotaryScaling::Yarn { factor, original, .. } => {
                self.max_position_embeddings.max((f64::from(*factor) * *original as f64) as usize)
            }
            _ => self.max_position_embeddings,
        }
    }

    /// Checks that the values fit each other.
    ///
    /// # Errors
    /// Names the first option at fault.
    pub fn validate(&self) -> Result<()> {
        checks::sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("num_labels", self.num_labels),
        ])?;
        let heads = self.num_attention_heads;
        if !heads.is_multiple_of(self.num_key_value_heads) {
            let reason = format!("{} do not divide {heads} heads", self.num_key_value_heads);
            return Err(Error::config("num_key_value_heads", reason));
        }
        let all = heads.checked_mul(3).and_then(|heads| heads.checked_mul(self.head_dim));
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) || all.is_none() {
            let reason =
                format!("expected an even width, not too large for {heads} heads, got {}", self.head_dim);
            return Err(Error::config("head_dim", reason));
        }
        checks::rates(&[("attention_dropout", self.attention_dropout)])?;
        if let Some(id) = self.pad_token_id {
            checks::token_id("pad_token_id", id, self.vocab_size)?;
        }
        for id in &self.eos_token_ids {
            checks::token_id("eos_token_id", *id, self.vocab_size)?;
        }
        check::positive("rms_norm_eps", self.rms_norm_eps)?;
        check::positive("query_pre_attn_scalar", self.attention_scale)?;
        for (name, cap) in [
            ("attn_logit_softcapping", self.attention_cap),
            ("final_logit_softcapping", self.logit_cap),
            ("embedding_scale", self.embedding_scale),
        ] {
            cap.map_or(Ok(()), |cap| check::positive(name, cap))?;
        }
        if self.layers.iter().any(|layer| layer.window == Some(0)) {
            return Err(Error::config("sliding_window", "a window of 0 keys hides a query's own place"));
        }
        let is_local = |layer: &LayerConfig| layer.positions == Positions::Local;
        if self.local_rotary.is_none() && self.layers.iter().any(is_local) {
            return Err(Error::config(
                "rope_local_base_freq",
                "a layer has local positions, and there are none",
            ));
        }
        self.local_rotary.iter().chain([&self.rotary]).try_for_each(|rotary| rotary.validate(self.head_dim))
    }

    /// The id that fills a batch. It is masked, so that any id serves where the model has none.
    pub fn pad_id(&self) -> u32 {
        self.pad_token_id.or_else(|| self.eos_token_ids.first().copied()).unwrap_or(0)
    }

    /// The same configuration with `n` outputs of a classification head.
    pub fn with_num_labels(mut self, n: usize) -> Self {
        self.num_labels = n;
        self
    }

    /// The layers split over several devices by the memory that is free there now, embedding and head on the first;
    /// where that is not known, as on the CPU, in equal shares.
    ///
    /// # Errors
    /// As [`Placement::new`].
    pub fn place(&self, devices: &[Device]) -> Result<Placement> {
        let known: Option<Vec<u64>> = devices.iter().map(free_device_bytes).collect();
        let shares = known.unwrap_or_else(|| vec![1; devices.len()]);
        let devices: Vec<_> = devices.iter().cloned().zip(shares).collect();
        let (d, heads) = (self.hidden_size, self.num_attention_heads + self.num_key_value_heads);
        let layer = 2 * d * heads * self.head_dim + 3 * d * self.intermediate_size;
        let tables = if self.tie_word_embeddings { 1 } else { 2 } * self.vocab_size * d;
        Placement::by_memory(&devices, self.layers.len(), tables as f64 / layer.max(1) as f64)
    }
}
