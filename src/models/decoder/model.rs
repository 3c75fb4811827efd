//! The decoder: token embeddings, pre-norm transformer layers and a last norm.

use std::sync::Arc;

use candle_core::{Device, Tensor, D};
use candle_nn::kv_cache::KvCache;
use candle_nn::Init;

use super::config::DecoderConfig;
use super::rotary::Rotary;
use crate::adapter::{linears, AdaptableEmbedding, AdaptableLinear, AdaptableModel, Context, Pass};
use crate::error::{Error, Result};
use crate::models::causal::Cache;
use crate::models::layers::{adaptable_linear_no_bias, parameters, Dropout};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, CausalMask, Mask, RmsNorm, Weight};

/// The decoder without a head.
#[derive(Debug)]
pub struct Decoder {
    embeddings: AdaptableEmbedding,
    layers: Vec<Arc<Layer>>,
    checkpoint_layers: bool,
    norm: RmsNorm,
    rotary: Rotary,
    causal: CausalMask,
    max_length: usize,
}

/// What every layer of one forward pass shares.
#[derive(Clone)]
struct Step {
    mask: Mask,
    angles: (Tensor, Tensor), // (1, t, head_dim / 2) each
    cx: Context,
}

impl Decoder {
    /// Fetches the decoder by name, with or without the prefix `model.`
    ///
    /// Where `vb` starts new parameters, they follow `initializer_range`, under the prefix.
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(vb: impl Into<Weights<'a>>, config: &DecoderConfig, noise: Noise) -> Result<Self> {
        let vb = vb.into();
        config.validate()?;
        let c = &config.decoder;
        let vb = if vb.contains_tensor("embed_tokens.weight") { vb } else { vb.pp("model") };
        let init = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let shape = (c.vocab_size, c.hidden_size);
        let embeddings = vb.pp("embed_tokens").table(shape, init)?;
        let layers = (0..c.num_hidden_layers)
            .map(|i| Layer::load(&format!("model.layers.{i}"), &vb.pp("layers").pp(i), config, noise))
            .map(|layer| Ok(Arc::new(layer?)));
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            checkpoint_layers: false,
            norm: RmsNorm::load(c.hidden_size, c.rms_norm_eps, &vb.pp("norm"))?,
            rotary: Rotary::new(config, embeddings.dtype(), embeddings.device()),
            causal: CausalMask::default(),
            max_length: c.max_position_embeddings,
            embeddings: AdaptableEmbedding::new(embeddings),
        })
    }

    /// The last hidden states; see [`CausalLm::hidden`](crate::models::causal::CausalLm::hidden).
    ///
    /// # Errors
    /// If shapes differ, the sequence is longer than the model's, a training pass comes with a
    /// cache, through which nothing could be differentiated, or a cache begins with virtual tokens
    /// and a row of padding alone: where they belong is not known yet.
    pub fn forward(
        &self,
        input_ids: &Tensor,
        attention_mask: &Tensor,
        mut cache: Option<&mut Cache>,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let (cx, (_, t)) = (&*cx.of_one_pass(), input_ids.dims2()?);
        let seen = cache.as_ref().map_or(0, |cache| cache.length());
        // Virtual tokens stand before a row's beginning alone.
        let p = if seen == 0 { self.embeddings.virtual_tokens() } else { 0 };
        self.embeddings.check_length(seen + p + t, self.max_length)?;
        if cache.is_some() && matches!(cx.pass, Pass::Train { .. }) {
            return Err(Error::config("cache", "a training pass goes without a cache").into());
        }
        if cache.is_some() && p > 0 {
            check_first_tokens(attention_mask)?;
        }
        let place = |rows| self.embeddings.after_padding(rows, attention_mask);
        let step = Step {
            mask: Mask {
                padding: Some(place(self.embeddings.extend_mask(attention_mask)?)?),
                causal: Some(self.causal.clone()),
                window: None,
            },
            angles: self.rotary.angles(seen, p + t)?,
            cx: cx.clone(),
        };
        let mut xs = match seen {
            0 => place(self.embeddings.forward(input_ids, cx.path)?)?, // (b, p + t, d)
            _ => self.embeddings.lookup(input_ids, cx.path)?,          // (b, t, d)
        };
        for (i, layer) in self.layers.iter().enumerate() {
            let cached = cache.as_mut().and_then(|cache| cache.layer(i));
            xs = match (self.checkpoint_layers, cx.pass) {
                (true, Pass::Train { .. }) => {
                    let (block, cx) = (layer.clone(), step.cx.clone().without_tape());
                    let step = Step { cx, ..step.clone() };
                    ops::checkpoint(&xs, &layer.parameters()?, move |xs| block.forward(xs, &step, None))?
                }
                _ => layer.forward(&xs, &step, cached)?,
            };
        }
        // Real tokens stand in these columns, wherever the virtual ones are among the padding.
        let xs = if p > 0 { xs.narrow(1, p, t)? } else { xs };
        self.norm.forward_on(&xs, cx.path)
    }

    /// An empty cache for this decoder, with room for `capacity` tokens a row.
    pub fn cache(&self, capacity: usize) -> Cache {
        let capacity = capacity + self.embeddings.virtual_tokens();
        Cache::new(self.layers.len(), capacity.min(self.max_length))
    }

    /// Whether training keeps each layer's input alone and computes the layer again in backward
    /// ([`ops::checkpoint`]): less memory for one more forward pass.
    pub fn set_checkpoint_layers(&mut self, on: bool) {
        self.checkpoint_layers = on;
    }

    /// The longest sequence, in tokens beside the virtual ones.
    pub fn max_length(&self) -> usize {
        self.max_length.saturating_sub(self.embeddings.virtual_tokens())
    }

    /// The token embedding (vocab, hidden), which a language-model head may be tied to.
    pub fn embeddings(&self) -> &Weight {
        self.embeddings.words()
    }

    /// Where its tensors are.
    pub fn device(&self) -> &Device {
        self.embeddings().device()
    }
}

impl AdaptableModel for Decoder {
    fn default_targets(&self) -> &'static [&'static str] {
        &["q_proj", "k_proj", "v_proj"]
    }

    linears!(layers);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        Some(&mut self.embeddings)
    }
}

/// Whether every row of a mask has a real token.
fn check_first_tokens(mask: &Tensor) -> candle_core::Result<()> {
    let rows = mask.ne(0u8)?.to_vec2::<u8>()?;
    match rows.iter().position(|row| row.iter().all(|real| *real == 0)) {
        Some(row) => {
            let reason =
                format!("row {row} of the first piece is padding alone: its virtual tokens have no place");
            Err(Error::config("attention_mask", reason).into())
        }
        None => Ok(()),
    }
}

/// Norm, self-attention, residual; norm, SwiGLU, residual.
#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    q_proj: AdaptableLinear,
    k_proj: AdaptableLinear,
    v_proj: AdaptableLinear,
    o_proj: AdaptableLinear,
    mlp_norm: RmsNorm,
    gate_proj: AdaptableLinear,
    up_proj: AdaptableLinear,
    down_proj: AdaptableLinear,
    probs_dropout: Dropout,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Layer {
    fn load(path: &str, vb: &Weights, config: &DecoderConfig, noise: Noise) -> Result<Self> {
        let c = &config.decoder;
        let (d, inner, kv) = (c.hidden_size, c.intermediate_size, c.num_key_value_heads * config.head_dim());
        let linear = |name: &str, in_dim, out_dim| {
            let std = config.initializer_range;
            adaptable_linear_no_bias(&format!("{path}.{name}"), in_dim, out_dim, std, &vb.pp(name))
        };
        Ok(Self {
            attention_norm: RmsNorm::load(d, c.rms_norm_eps, &vb.pp("input_layernorm"))?,
            q_proj: linear("self_attn.q_proj", d, d)?,
            k_proj: linear("self_attn.k_proj", d, kv)?,
            v_proj: linear("self_attn.v_proj", d, kv)?,
            o_proj: linear("self_attn.o_proj", d, d)?,
            mlp_norm: RmsNorm::load(d, c.rms_norm_eps, &vb.pp("post_attention_layernorm"))?,
            gate_proj: linear("mlp.gate_proj", d, inner)?,
            up_proj: linear("mlp.up_proj", d, inner)?,
            down_proj: linear("mlp.down_proj", inner, d)?,
            probs_dropout: Dropout::new(config.attention_dropout, noise, &format!("{path}.self_attn")),
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            head_dim: config.head_dim(),
        })
    }

    fn forward(&self, xs: &Tensor, step: &Step, cache: Option<&mut KvCache>) -> candle_core::Result<Tensor> {
        let attended = self.attention(&self.attention_norm.forward_on(xs, step.cx.path)?, step, cache)?;
        // Below the first layer are frozen embeddings, which no gradient is for.
        let xs = ops::add_constant(&attended, xs)?;
        let normed = self.mlp_norm.forward_on(&xs, step.cx.path)?;
        xs + self.feed_forward(&normed, &step.cx)?
    }

    fn feed_forward(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        let [gate, up, down] = [&self.gate_proj, &self.up_proj, &self.down_proj];
        if let (Some(gate), Some(up), Some(down)) = (gate.as_linear(cx), up.as_linear(cx), down.as_linear(cx))
        {
            return ops::swiglu(xs, gate.weight(), up.weight(), down.weight(), cx.path);
        }
        down.forward(&ops::silu_mul(&gate.forward(xs, cx)?, &up.forward(xs, cx)?, cx.path)?, cx)
    }

    fn attention(
        &self,
        xs: &Tensor,
        step: &Step,
        cache: Option<&mut KvCache>,
    ) -> candle_core::Result<Tensor> {
        let q = self.rotate(&self.q_proj.forward(xs, &step.cx)?, self.heads, step)?; // (b, t, d)
        let mut k = self.rotate(&self.k_proj.forward(xs, &step.cx)?, self.kv_heads, step)?;
        let mut v = self.v_proj.forward(xs, &step.cx)?; // (b, t, kv_heads * head_dim)
        if let Some(cache) = cache {
            (k, v) = cache.append(&k.detach().contiguous()?, &v.detach().contiguous()?)?;
        }
        let scale = (self.head_dim as f64).sqrt().recip();
        let dropout = self.probs_dropout.active(&step.cx);
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        let context = ops::attention(&q, &k, &v, heads, kv_heads, scale, &step.mask, dropout, step.cx.path)?;
        self.o_proj.forward(&context, &step.cx)
    }

    fn rotate(&self, xs: &Tensor, heads: usize, step: &Step) -> candle_core::Result<Tensor> {
        let (b, t, width) = xs.dims3()?;
        let (cos, sin) = &step.angles;
        let xs = xs.reshape((b, t, heads, width / heads))?;
        ops::rotary(&xs, cos, sin, step.cx.path)?.flatten_from(D::Minus2)
    }

    /// Everything that may be trained in it.
    fn parameters(&self) -> candle_core::Result<Vec<Tensor>> {
        let norms = [&self.attention_norm, &self.mlp_norm].into_iter().flat_map(RmsNorm::parameters);
        Ok(parameters(self)?.into_iter().chain(norms).collect())
    }
}

impl AdaptableModel for Layer {
    linears!(q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj);
}
