//! The layer of BERT and its relatives: attention and a feed-forward block, each followed by dropout, the
//! residual connection and layer norm.

use std::sync::Arc;

use candle_core::{Tensor, D};

use super::relative::RelativePositions;
use super::stack::Block;
use crate::adapter::{linears, AdaptableLinear, AdaptableModel, Context};
use crate::error::Result;
use crate::models::layers::{adaptable_linear, parameters, Dropout};
use crate::models::packed::PackedBatch;
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, LayerNorm};

/// The tensor names of a layer's parts in a family.
#[derive(Debug)]
pub struct LayerNames {
    /// The projection to queries.
    pub query: &'static str,
    /// The projection to keys.
    pub key: &'static str,
    /// The projection to values.
    pub value: &'static str,
    /// The output projection of attention.
    pub attention_output: &'static str,
    /// The norm after attention.
    pub attention_norm: &'static str,
    /// The first layer of the feed-forward block.
    pub intermediate: &'static str,
    /// The second layer of the feed-forward block.
    pub output: &'static str,
    /// The norm after the feed-forward block.
    pub output_norm: &'static str,
}

impl LayerNames {
    /// The names in BERT, RoBERTa and ELECTRA.
    pub const BERT: Self = Self {
        query: "attention.self.query",
        key: "attention.self.key",
        value: "attention.self.value",
        attention_output: "attention.output.dense",
        attention_norm: "attention.output.LayerNorm",
        intermediate: "intermediate.dense",
        output: "output.dense",
        output_norm: "output.LayerNorm",
    };
}

/// Names and sizes of a [`PostNormLayer`].
#[derive(Debug)]
pub struct LayerShape {
    /// The names of its parts.
    pub names: &'static LayerNames,
    /// The width of the residual stream.
    pub hidden: usize,
    /// The inner width of the feed-forward block.
    pub inner: usize,
    /// The number of attention heads; divides `hidden`.
    pub heads: usize,
    /// Added to the variance in every layer norm.
    pub norm_eps: f64,
    /// The standard deviation that new weights start with.
    pub init_std: f64,
    /// Dropout of the attention probabilities, in training.
    pub probs_dropout: f64,
    /// Dropout of the attention block's output, in training.
    pub attention_dropout: f64,
    /// Dropout of the feed-forward block's output, in training.
    pub output_dropout: f64,
    /// The table of relative positions; `None` for a family without them.
    pub relative: Option<Arc<RelativePositions>>,
}

/// One post-norm layer.
#[derive(Debug)]
pub struct PostNormLayer {
    query: AdaptableLinear,
    key: AdaptableLinear,
    value: AdaptableLinear,
    attention_output: AdaptableLinear,
    attention_norm: LayerNorm,
    intermediate: AdaptableLinear,
    output: AdaptableLinear,
    output_norm: LayerNorm,
    probs_dropout: Dropout,
    attention_dropout: Dropout,
    output_dropout: Dropout,
    relative: Option<Relative>,
    heads: usize,
}

/// The relative positions of one layer's attention.
#[derive(Debug)]
struct Relative {
    positions: Arc<RelativePositions>,
    dropout: Dropout,
}

impl PostNormLayer {
    /// Loads the layer at `path` from `vb`, which has that prefix.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(path: &str, vb: &Weights, shape: &LayerShape, noise: Noise) -> Result<Self> {
        let (names, d, inner, eps) = (shape.names, shape.hidden, shape.inner, shape.norm_eps);
        let linear = |name: &str, in_dim, out_dim| {
            adaptable_linear(&format!("{path}.{name}"), in_dim, out_dim, shape.init_std, &vb.pp(name))
        };
        let dropout = |rate, name: &str| Dropout::new(rate, noise, &format!("{path}.{name}"));
        Ok(Self {
            query: linear(names.query, d, d)?,
            key: linear(names.key, d, d)?,
            value: linear(names.value, d, d)?,
            attention_output: linear(names.attention_output, d, d)?,
            attention_norm: LayerNorm::load(d, eps, &vb.pp(names.attention_norm))?,
            intermediate: linear(names.intermediate, d, inner)?,
            output: linear(names.output, inner, d)?,
            output_norm: LayerNorm::load(d, eps, &vb.pp(names.output_norm))?,
            probs_dropout: dropout(shape.probs_dropout, "attention.self"),
            attention_dropout: dropout(shape.attention_dropout, "attention.output"),
            output_dropout: dropout(shape.output_dropout, "output"),
            relative: shape.relative.as_ref().map(|positions| Relative {
                positions: positions.clone(),
                dropout: dropout(shape.output_dropout, "attention.self.positions"),
            }),
            heads: shape.heads,
        })
    }

    /// Disentangled attention for the `wanted` tokens, (b, t or 1, d). The tokens and the relative positions
    /// pass each shared projection in one call, so that an adapter on it is called once: as (1, n, d), since the
    /// positions are of no row.
    fn attend_relatively(
        &self,
        relative: &Relative,
        xs: &Tensor,
        wanted: &Tensor,
        batch: &PackedBatch,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let (positions, rows) = relative.positions.rows(batch.shape().1, &relative.dropout, cx)?; // (m, d)
        let (m, d) = positions.dims2()?;
        let with_positions = |projection: &AdaptableLinear, xs: &Tensor| {
            let both = Tensor::cat(&[&xs.reshape(((), d))?, &positions], 0)?;
            projection.forward(&both.unsqueeze(0)?, cx)?.squeeze(0)
        };
        let q = with_positions(&self.query, wanted)?;
        let q = if batch.only().is_some() { q } else { batch.pad_rows(q, m, cx.path)? }; // (b * (t or 1) + m, d)
        let k = batch.pad_rows(with_positions(&self.key, xs)?, m, cx.path)?; // (b * t + m, d)
        let v = batch.pad(self.value.forward(xs, cx)?, cx.path)?; // (b, t, d)

        // The scores have three terms, each with the variance of the one term of ordinary attention.
        let scale = (3.0 * d as f64 / self.heads as f64).sqrt().recip();
        let dropout = self.probs_dropout.active(cx);
        let padding = batch.padding();
        ops::disentangled_attention(&q, &k, &v, &rows, self.heads, scale, padding, dropout, cx.path)
    }

    /// Attention for the `wanted` tokens, (b, t or 1, d).
    fn attend(
        &self,
        xs: &Tensor,
        wanted: &Tensor,
        batch: &PackedBatch,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let q = self.query.forward(wanted, cx)?;
        let q = if batch.only().is_some() { q.unsqueeze(1)? } else { batch.pad(q, cx.path)? }; // (b, t or 1, d)
        let k = batch.pad(self.key.forward(xs, cx)?, cx.path)?; // (b, t, d)
        let v = batch.pad(self.value.forward(xs, cx)?, cx.path)?;
        let scale = (q.dim(D::Minus1)? as f64 / self.heads as f64).sqrt().recip();
        let dropout = self.probs_dropout.active(cx);
        ops::attention(&q, &k, &v, self.heads, self.heads, scale, &batch.mask(), dropout, cx.path)
    }

    fn feed_forward(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        let (up, down) = (self.intermediate.as_linear(cx), self.output.as_linear(cx));
        if let (Some((w1, b1)), Some((w2, b2))) = (up, down) {
            return ops::feed_forward(xs, w1, b1, w2, b2, cx.path);
        }
        self.output.forward(&ops::gelu(&self.intermediate.forward(xs, cx)?, cx.path)?, cx)
    }
}

impl Block for PostNormLayer {
    fn forward(&self, xs: &Tensor, batch: &PackedBatch, cx: &Context) -> candle_core::Result<Tensor> {
        let wanted = match batch.only() {
            Some(only) => only.take(xs, cx.path)?,
            None => xs.clone(),
        };
        let context = match &self.relative {
            Some(relative) => self.attend_relatively(relative, xs, &wanted, batch, cx)?,
            None => self.attend(xs, &wanted, batch, cx)?,
        };
        let context =
            if batch.only().is_some() { context.squeeze(1)? } else { batch.pack(context, cx.path)? };
        let attended = self.attention_output.forward(&context, cx)?;
        let attended = self.attention_dropout.forward(&attended, cx)?;
        let xs = self.attention_norm.forward_add(&attended, &wanted, cx.path)?;
        let inner = self.feed_forward(&xs, cx)?;
        self.output_norm.forward_add(&self.output_dropout.forward(&inner, cx)?, &xs, cx.path)
    }

    fn parameters(&self) -> Result<Vec<Tensor>> {
        let norms = [&self.attention_norm, &self.output_norm].into_iter().flat_map(LayerNorm::parameters);
        let positions = self.relative.iter().flat_map(|relative| relative.positions.parameters());
        Ok(parameters(self)?.into_iter().chain(norms).chain(positions).collect())
    }
}

impl AdaptableModel for PostNormLayer {
    linears!(query, key, value, attention_output, intermediate, output);
}
