//! One layer of a decoder.

use candle_core::Tensor;
use candle_nn::kv_cache::KvCache;

use super::attention::Attention;
use super::config::{DecoderConfig, LayerConfig};
use super::feed_forward::FeedForward;
use super::step::Step;
use crate::adapter::{linears, AdaptableModel};
use crate::error::Result;
use crate::models::layers::{parameters, rms_norm};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, RmsNorm, Window};

/// A pre-norm layer: norm, self-attention, residual; norm, gated feed-forward, residual. With post-norms
/// (Gemma) the output of each block is also normed before it is added to the residual stream.
#[derive(Debug)]
pub(super) struct Layer {
    attention_norm: RmsNorm,
    self_attn: Attention,
    mlp_norm: RmsNorm,
    mlp: FeedForward,
    /// The norms after attention and after the feed-forward block (Gemma).
    post_norms: Option<[RmsNorm; 2]>,
}

impl Layer {
    pub fn load(
        path: &str,
        vb: &Weights,
        config: &DecoderConfig,
        layer: LayerConfig,
        window: Option<Window>,
        noise: Noise,
    ) -> Result<Self> {
        let norm =
            |name: &str| rms_norm(config.hidden_size, config.rms_norm_eps, config.norm_offset, &vb.pp(name));
        // LLaMA and Gemma use the same name for different norms: the one before the feed-forward block in
        // LLaMA, the one after attention in Gemma.
        let (mlp_norm, post_norms) = match config.post_norms {
            false => (norm("post_attention_layernorm")?, None),
            true => {
                let after = [norm("post_attention_layernorm")?, norm("post_feedforward_layernorm")?];
                (norm("pre_feedforward_layernorm")?, Some(after))
            }
        };
        let at = |name: &str| format!("{path}.{name}");
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            self_attn: Attention::load(&at("self_attn"), &vb.pp("self_attn"), config, layer, window, noise)?,
            mlp_norm,
            mlp: FeedForward::load(&at("mlp"), &vb.pp("mlp"), config)?,
            post_norms,
        })
    }

    pub fn forward(
        &self,
        xs: &Tensor,
        step: &Step,
        cache: Option<&mut KvCache>,
    ) -> candle_core::Result<Tensor> {
        let path = step.cx.path;
        let mut attended = self.self_attn.forward(&self.attention_norm.forward_on(xs, path)?, step, cache)?;
        if let Some([norm, _]) = &self.post_norms {
            attended = norm.forward_on(&attended, path)?;
        }
        // The input of the first layer is the frozen embedding, for which no gradient is computed.
        let xs = ops::add_constant(&attended, xs)?;
        let mut fed = self.mlp.forward(&self.mlp_norm.forward_on(&xs, path)?, &step.cx)?;
        if let Some([_, norm]) = &self.post_norms {
            fed = norm.forward_on(&fed, path)?;
        }
        xs + fed
    }

    /// All tensors of the layer that may be trainable.
    pub fn parameters(&self) -> candle_core::Result<Vec<Tensor>> {
        let norms =
            [&self.attention_norm, &self.mlp_norm].into_iter().chain(self.post_norms.iter().flatten());
        let norms = norms.flat_map(RmsNorm::parameters).chain(self.self_attn.norm_parameters());
        Ok(parameters(self)?.into_iter().chain(norms).collect())
    }
}

impl AdaptableModel for Layer {
    linears!(self_attn, mlp);
}
