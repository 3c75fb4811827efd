//! The configuration of a decoder of any family: sizes and switches.

use candle_core::Device;

use super::positions::{Positions, RotaryConfig, RotaryScaling};
use crate::error::{Error, Result};
use crate::models::{checks, Placement};
use crate::util::check;
use crate::util::device::free_device_bytes;

/// The sizes of a decoder and the switches in which the families differ.
///
/// [`Self::from_file`] reads them from the `config.json` of one of [`Self::model_types`].
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
    /// The number of query heads.
    pub num_attention_heads: usize,
    /// The number of key/value heads; each serves an equal number of query heads.
    pub num_key_value_heads: usize,
    /// The width of one head; all heads together need not be as wide as the residual stream.
    pub head_dim: usize,
    /// The longest sequence in tokens; [`Self::max_length`] also accounts for YaRN.
    pub max_position_embeddings: usize,
    /// The settings in which layers differ, one entry per layer.
    pub layers: Vec<LayerConfig>,
    /// The rotary positions of layers with [`Positions::Global`].
    pub rotary: RotaryConfig,
    /// The rotary positions of layers with [`Positions::Local`] (Gemma 3).
    pub local_rotary: Option<RotaryConfig>,
    /// Whether the projections of queries, keys and values have a bias (Qwen 2).
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub o_bias: bool,
    /// Whether the projections of the feed-forward block have a bias.
    pub mlp_bias: bool,
    /// Whether queries and keys of each head are RMS-normed before their rotation (Qwen 3, Gemma 3).
    pub qk_norm: bool,
    /// Whether queries, keys and values are one layer, `qkv_proj`, and gate and up one layer, `gate_up_proj`
    /// (Phi 3).
    pub fused_projections: bool,
    /// Whether the outputs of attention and feed-forward are also normed before they are added to the
    /// residual stream (Gemma).
    pub post_norms: bool,
    /// Whether norms multiply by `1 + w` rather than by `w` (Gemma).
    pub norm_offset: bool,
    /// The epsilon added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// The activation of the gate in the feed-forward block.
    pub activation: Activation,
    /// The factor on the dot product of a query and a key.
    pub attention_scale: f64,
    /// The soft cap on attention scores (Gemma 2).
    pub attention_cap: Option<f64>,
    /// The soft cap on the logits of the next token (Gemma 2).
    pub logit_cap: Option<f64>,
    /// The factor on token embeddings (Gemma).
    pub embedding_scale: Option<f64>,
    /// Whether the language-model head shares the weight of the token embedding.
    pub tie_word_embeddings: bool,
    /// The token that begins a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The padding token, if the model has one.
    pub pad_token_id: Option<u32>,
    /// The number of outputs of a classification head.
    pub num_labels: usize,
    /// The dropout rate of attention probabilities in training.
    pub attention_dropout: f64,
    /// The standard deviation of newly initialised weights.
    pub initializer_range: f64,
}

/// The settings that may differ from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// The sliding window: how many keys a query attends to, its own position included. `None`: no window.
    pub window: Option<usize>,
    /// The rotary positions of the layer.
    pub positions: Positions,
}

/// The activation of a gated feed-forward block, `activation(gate) * up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

impl DecoderConfig {
    /// The longest sequence in tokens: `max_position_embeddings` or, under YaRN, `factor * original` if that
    /// is larger, since files with YaRN may keep the original `max_position_embeddings`.
    pub fn max_length(&self) -> usize {
        match &self.rotary.scaling {
            RotaryScaling::Yarn { factor, original, .. } => {
                self.max_position_embeddings.max((f64::from(*factor) * *original as f64) as usize)
            }
            _ => self.max_position_embeddings,
        }
    }

    /// Checks that the values are valid and consistent.
    ///
    /// # Errors
    /// If one is not; the error names the first such option.
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
            let reason = format!(
                "expected a divisor of {heads} (num_attention_heads), got {}",
                self.num_key_value_heads
            );
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
        let mut windows = self.layers.iter().filter_map(|layer| layer.window);
        windows.try_for_each(|window| check::at_least_one("sliding_window", window))?;
        let is_local = |layer: &LayerConfig| layer.positions == Positions::Local;
        if self.local_rotary.is_none() && self.layers.iter().any(is_local) {
            return Err(Error::config(
                "rope_local_base_freq",
                "it is missing, although a layer uses local positions",
            ));
        }
        self.local_rotary.iter().chain([&self.rotary]).try_for_each(|rotary| rotary.validate(self.head_dim))
    }

    /// The token id that pads batches: the padding token, else the first end token, else 0. Padding is
    /// masked, so any id works.
    pub fn pad_id(&self) -> u32 {
        self.pad_token_id.or_else(|| self.eos_token_ids.first().copied()).unwrap_or(0)
    }

    /// Returns the configuration with `n` outputs of a classification head.
    pub fn with_num_labels(mut self, n: usize) -> Self {
        self.num_labels = n;
        self
    }

    /// Splits the layers over several devices in proportion to their currently free memory, with embedding
    /// and head on the first. If the free memory of any is unknown, as on the CPU, all get equal shares.
    ///
    /// # Errors
    /// As [`Placement::by_memory`].
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
