//! One layer: attention and a gated feed-forward block, with a norm before each.

use std::sync::Arc;

use candle_core::{Tensor, D};

use super::config::{LayerType, ModernBertConfig};
use crate::adapter::{linears, AdaptableLinear, AdaptableModel, Context};
use crate::error::Result;
use crate::models::encoder::Block;
use crate::models::layers::{adaptable_linear_of, parameters, Dropout};
use crate::models::packed::PackedBatch;
use crate::models::rotary_table::RotaryTable;
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, LayerNorm, Mask, Window};

/// Loads a norm of the width of the residual stream, with a bias if `norm_bias` is set.
///
/// # Errors
/// If a tensor is missing or of another shape.
pub fn norm(config: &ModernBertConfig, vb: &Weights) -> Result<LayerNorm> {
    let load = if config.norm_bias { LayerNorm::load } else { LayerNorm::load_without_bias };
    load(config.hidden_size, config.norm_eps, vb)
}

/// The rotary positions and the window, which all layers of one type share.
#[derive(Debug, Clone)]
pub struct Attention {
    rotary: Arc<RotaryTable>,
    window: Option<Window>,
}

impl Attention {
    /// For layers of this type, with the dtype and device of `vb`.
    pub fn new(config: &ModernBertConfig, layer_type: LayerType, vb: &Weights) -> Self {
        let dim = config.hidden_size / config.num_attention_heads;
        let frequencies = RotaryTable::plain(config.rope_theta(layer_type) as f32, dim);
        let rotary = RotaryTable::new(frequencies, 1.0, vb.dtype(), vb.device());
        let window = match layer_type {
            LayerType::FullAttention => None,
            LayerType::SlidingAttention => Some(Window::new(config.local_attention / 2 + 1)),
        };
        Self { rotary: Arc::new(rotary), window }
    }
}

/// One layer.
#[derive(Debug)]
pub struct Layer {
    attention_norm: Option<LayerNorm>,
    projections: AdaptableLinear, // to queries, keys and values
    attention_output: AdaptableLinear,
    feed_forward_norm: LayerNorm,
    inner: AdaptableLinear, // to the input of GELU and its factor
    output: AdaptableLinear,
    probs_dropout: Dropout,
    attention_dropout: Dropout,
    inner_dropout: Dropout,
    attention: Attention,
    heads: usize,
}

impl Layer {
    /// Loads layer `i` from `vb`, which has that layer's prefix.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(
        i: usize,
        vb: &Weights,
        config: &ModernBertConfig,
        attention: Attention,
        noise: Noise,
    ) -> Result<Self> {
        let (d, inner) = (config.hidden_size, config.intermediate_size);
        let path = format!("model.layers.{i}");
        let linear = |name: &str, in_dim, out_dim, bias| {
            let std = config.initializer_range;
            adaptable_linear_of(&format!("{path}.{name}"), in_dim, out_dim, std, bias, &vb.pp(name))
        };
        let dropout = |rate, name: &str| Dropout::new(rate, noise, &format!("{path}.{name}"));
        Ok(Self {
            // The first layer has none, because the embeddings are already normalised.
            attention_norm: (i > 0).then(|| norm(config, &vb.pp("attn_norm"))).transpose()?,
            projections: linear("attn.Wqkv", d, 3 * d, config.attention_bias)?,
            attention_output: linear("attn.Wo", d, d, config.attention_bias)?,
            feed_forward_norm: norm(config, &vb.pp("mlp_norm"))?,
            inner: linear("mlp.Wi", d, 2 * inner, config.mlp_bias)?,
            output: linear("mlp.Wo", inner, d, config.mlp_bias)?,
            probs_dropout: dropout(config.attention_dropout, "attn"),
            attention_dropout: dropout(config.attention_dropout, "attn.out_drop"),
            inner_dropout: dropout(config.mlp_dropout, "mlp.drop"),
            attention,
            heads: config.num_attention_heads,
        })
    }

    /// Whether the layer's attention sees the whole row.
    pub fn is_global(&self) -> bool {
        self.attention.window.is_none()
    }

    /// Attention over the normalised `xs`, for the tokens that [`PackedBatch::only`] selects.
    fn attend(&self, xs: &Tensor, batch: &PackedBatch, cx: &Context) -> candle_core::Result<Tensor> {
        let all = batch.pad(self.projections.forward(xs, cx)?, cx.path)?; // (b, t, 3 d)
        let (b, t, width) = all.dims3()?;
        let d = width / 3;
        let part = |i: usize| all.narrow(D::Minus1, i * d, d);
        let (cos, sin) = self.attention.rotary.angles(0, t)?;
        let rotated = |xs: Tensor| {
            let xs = xs.reshape((b, t, self.heads, ()))?;
            ops::rotary(&xs, &cos, &sin, cx.path)?.reshape((b, t, d))
        };
        let (q, k, v) = (rotated(part(0)?)?, rotated(part(1)?)?, part(2)?);
        // A window is aligned with the last query, so no layer with a window runs for first tokens alone.
        let q = if batch.only().is_some() { q.narrow(1, 0, 1)? } else { q };
        let mask = Mask { window: self.attention.window.clone(), ..batch.mask() };
        let scale = (d as f64 / self.heads as f64).sqrt().recip();
        let dropout = self.probs_dropout.active(cx);
        let context = ops::attention(&q, &k, &v, self.heads, self.heads, scale, &mask, dropout, cx.path)?;
        let context =
            if batch.only().is_some() { context.squeeze(1)? } else { batch.pack(context, cx.path)? };
        self.attention_dropout.forward(&self.attention_output.forward(&context, cx)?, cx)
    }

    /// `Wo (gelu(a) * b)` where `Wi` gives `a` and `b`.
    fn feed_forward(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        let both = self.inner.forward(xs, cx)?; // (.., 2 inner)
        let inner = both.dim(D::Minus1)? / 2;
        let part = |i: usize| both.narrow(D::Minus1, i * inner, inner);
        let gated = (ops::gelu(&part(0)?, cx.path)? * part(1)?)?;
        self.output.forward(&self.inner_dropout.forward(&gated, cx)?, cx)
    }
}

impl Block for Layer {
    fn forward(&self, xs: &Tensor, batch: &PackedBatch, cx: &Context) -> candle_core::Result<Tensor> {
        let normed = match &self.attention_norm {
            Some(norm) => norm.forward_on(xs, cx.path)?,
            None => xs.clone(),
        };
        let attended = self.attend(&normed, batch, cx)?;
        let wanted = match batch.only() {
            Some(only) => only.take(xs, cx.path)?,
            None => xs.clone(),
        };
        let xs = (wanted + attended)?;
        let inner = self.feed_forward(&self.feed_forward_norm.forward_on(&xs, cx.path)?, cx)?;
        xs + inner
    }

    fn parameters(&self) -> Result<Vec<Tensor>> {
        let norms = self.attention_norm.iter().chain([&self.feed_forward_norm]);
        Ok(parameters(self)?.into_iter().chain(norms.flat_map(LayerNorm::parameters)).collect())
    }
}

impl AdaptableModel for Layer {
    linears!(projections, attention_output, inner, output);
}
