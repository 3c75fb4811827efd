//! The self-attention block of a decoder layer.

use candle_core::{Tensor, D};
use candle_nn::kv_cache::KvCache;

use super::config::{DecoderConfig, LayerConfig};
use super::joint::Joint;
use super::rotary::Angles;
use super::step::Step;
use crate::adapter::{linears, AdaptableLinear, AdaptableModel};
use crate::error::Result;
use crate::models::layers::{adaptable_linear_of, rms_norm, Dropout};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, Mask, RmsNorm, Scores, Window};

/// Grouped-query self-attention with rotary positions, including the projections before and after it.
#[derive(Debug)]
pub(super) struct Attention {
    qkv: Joint<3>,
    o_proj: AdaptableLinear,
    /// The norms of queries and of keys, per head.
    norms: Option<[RmsNorm; 2]>,
    probs_dropout: Dropout,
    scores: Scores,
    window: Option<Window>,
    layer: LayerConfig,
    heads: usize,
    kv_heads: usize,
}

impl Attention {
    /// Loads the block. Layers with the same window size on the same device share one `window`.
    pub fn load(
        path: &str,
        vb: &Weights,
        config: &DecoderConfig,
        layer: LayerConfig,
        window: Option<Window>,
        noise: Noise,
    ) -> Result<Self> {
        let (d, dim) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.num_attention_heads * dim, config.num_key_value_heads * dim);
        let std = config.initializer_range;
        let linear = |name: &str, in_dim, out_dim, bias| {
            adaptable_linear_of(&format!("{path}.{name}"), in_dim, out_dim, std, bias, &vb.pp(name))
        };
        let bias = config.qkv_bias;
        let qkv = match config.fused_projections {
            true => Joint::Fused { layer: linear("qkv_proj", d, q + 2 * kv, bias)?, widths: [q, kv, kv] },
            false => Joint::Apart([
                linear("q_proj", d, q, bias)?,
                linear("k_proj", d, kv, bias)?,
                linear("v_proj", d, kv, bias)?,
            ]),
        };
        let norm = |name: &str| rms_norm(dim, config.rms_norm_eps, config.norm_offset, &vb.pp(name));
        let norms = if config.qk_norm { Some([norm("q_norm")?, norm("k_norm")?]) } else { None };
        Ok(Self {
            qkv,
            o_proj: linear("o_proj", q, d, config.o_bias)?,
            norms,
            probs_dropout: Dropout::new(config.attention_dropout, noise, path),
            scores: Scores { scale: config.attention_scale, cap: config.attention_cap },
            window,
            layer,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
        })
    }

    pub fn forward(
        &self,
        xs: &Tensor,
        step: &Step,
        cache: Option<&mut KvCache>,
    ) -> candle_core::Result<Tensor> {
        let [mut q, mut k, mut v] = self.qkv.forward(xs, &step.cx)?; // (b, t, heads * dim) each, or packed
        let pad = |xs| step.batch.pad(xs, step.cx.path);
        (q, k, v) = (pad(q)?, pad(k)?, pad(v)?);
        let [q_norm, k_norm] = match &self.norms {
            Some([q, k]) => [Some(q), Some(k)],
            None => [None, None],
        };
        let angles = step.angles_of(self.layer.positions);
        q = self.place(q, self.heads, q_norm, angles, step)?;
        k = self.place(k, self.kv_heads, k_norm, angles, step)?;
        if let Some(cache) = cache {
            (k, v) = cache.append(&k.detach().contiguous()?, &v.detach().contiguous()?)?;
        }
        let mask = Mask { window: self.window.clone(), ..step.mask.clone() };
        let dropout = self.probs_dropout.active(&step.cx);
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        let path = step.cx.path;
        let context = ops::attention(&q, &k, &v, heads, kv_heads, self.scores, &mask, dropout, path)?;
        self.o_proj.forward(&step.batch.pack(context, path)?, &step.cx)
    }

    /// Normalises each head of `xs` (b, t, heads * dim) with `norm` and rotates it by `angles`, where given.
    fn place(
        &self,
        xs: Tensor,
        heads: usize,
        norm: Option<&RmsNorm>,
        angles: Option<&Angles>,
        step: &Step,
    ) -> candle_core::Result<Tensor> {
        if norm.is_none() && angles.is_none() {
            return Ok(xs);
        }
        let (b, t, width) = xs.dims3()?;
        let mut xs = xs.reshape((b, t, heads, width / heads))?;
        if let Some(norm) = norm {
            xs = norm.forward_on(&xs, step.cx.path)?;
        }
        if let Some((cos, sin)) = angles {
            xs = ops::rotary(&xs, cos, sin, step.cx.path)?;
        }
        xs.flatten_from(D::Minus2)
    }

    /// The weights of the query and key norms.
    pub fn norm_parameters(&self) -> impl Iterator<Item = Tensor> + '_ {
        self.norms.iter().flatten().flat_map(RmsNorm::parameters)
    }
}

impl AdaptableModel for Attention {
    linears!(qkv, o_proj);
}
