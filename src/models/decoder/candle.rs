//! Conversion to candle-transformers' LLaMA configuration.

use candle_transformers::models::llama::{Config, Llama3RopeConfig, Llama3RopeType, LlamaEosToks};

use super::config::{Activation, DecoderConfig, LayerConfig};
use super::positions::{Positions, RotaryScaling};
use crate::error::{Error, Result};

impl DecoderConfig {
    /// Returns the equivalent configuration of candle-transformers' `Llama`, to run merged weights there.
    ///
    /// # Errors
    /// If this model uses a feature that candle-transformers' `Llama` lacks; the error names the first one.
    pub fn to_candle_llama(&self) -> Result<Config> {
        let plain = LayerConfig { window: None, positions: Positions::Global };
        let lacking = [
            ("head_dim", self.head_dim.checked_mul(self.num_attention_heads) != Some(self.hidden_size)),
            ("attention_bias", self.qkv_bias || self.o_bias),
            ("mlp_bias", self.mlp_bias),
            ("q_norm", self.qk_norm),
            ("qkv_proj", self.fused_projections),
            ("post_feedforward_layernorm", self.post_norms || self.norm_offset),
            ("hidden_act", self.activation != Activation::Silu),
            ("query_pre_attn_scalar", self.attention_scale != (self.head_dim as f64).sqrt().recip()),
            ("attn_logit_softcapping", self.attention_cap.is_some()),
            ("final_logit_softcapping", self.logit_cap.is_some()),
            ("embedding_scale", self.embedding_scale.is_some()),
            ("partial_rotary_factor", self.rotary.dim != self.head_dim),
            ("layer_types", self.layers.iter().any(|layer| *layer != plain)),
        ];
        if let Some((name, _)) = lacking.iter().find(|(_, lacks)| *lacks) {
            let reason =
                format!("candle-transformers' LLaMA has no such setting, and {} uses it", self.model_type);
            return Err(Error::config(*name, reason));
        }
        let rope_scaling = match self.rotary.scaling {
            RotaryScaling::None => None,
            RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                Some(Llama3RopeConfig {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: original,
                    rope_type: Llama3RopeType::Llama3,
                })
            }
            _ => {
                let reason = "candle-transformers' LLaMA only supports default and llama3";
                return Err(Error::config("rope_scaling", reason));
            }
        };
        Ok(Config {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            vocab_size: self.vocab_size,
            num_hidden_layers: self.layers.len(),
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            use_flash_attn: false,
            rms_norm_eps: self.rms_norm_eps,
            rope_theta: self.rotary.theta,
            bos_token_id: self.bos_token_id,
            eos_token_id: match self.eos_token_ids.as_slice() {
                [] => None,
                [id] => Some(LlamaEosToks::Single(*id)),
                ids => Some(LlamaEosToks::Multiple(ids.to_vec())),
            },
            rope_scaling,
            max_position_embeddings: self.max_position_embeddings,
            tie_word_embeddings: self.tie_word_embeddings,
        })
    }
}
