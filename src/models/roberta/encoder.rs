//! The encoder: embeddings and a stack of post-norm transformer layers.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, D};
use candle_nn::Init;

use super::config::{Family, RobertaConfig};
use crate::adapter::{linears, AdaptableEmbedding, AdaptableLinear, AdaptableModel, Context, Pass};
use crate::error::Result;
use crate::models::layers::{adaptable_linear, parameters, Dropout};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, LayerNorm, Mask, OpPath, Rows, Weight};

/// The encoder of RoBERTa or BERT.
#[derive(Debug)]
pub struct RobertaEncoder {
    embeddings: Embeddings,
    layers: Vec<Arc<Layer>>,
    checkpoint_layers: bool,
}

impl RobertaEncoder {
    /// Fetches the encoder by name, with or without the family's prefix.
    ///
    /// Where `vb` starts new parameters, they follow `initializer_range`, under the prefix.
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(vb: impl Into<Weights<'a>>, config: &RobertaConfig, noise: Noise) -> Result<Self> {
        let vb = vb.into();
        config.validate()?;
        let prefix = config.model_type.prefix();
        let bare = vb.contains_tensor("embeddings.word_embeddings.weight");
        let vb = if bare { vb } else { vb.pp(prefix) };
        let layers = (0..config.num_hidden_layers).map(|i| {
            let path = format!("{prefix}.encoder.layer.{i}");
            Ok(Arc::new(Layer::load(&path, &vb.pp("encoder").pp("layer").pp(i), config, noise)?))
        });
        Ok(Self {
            embeddings: Embeddings::load(
                &format!("{prefix}.embeddings"),
                &vb.pp("embeddings"),
                config,
                noise,
            )?,
            layers: layers.collect::<Result<_>>()?,
            checkpoint_layers: false,
        })
    }

    /// The last hidden states, without those of virtual tokens; those on padding mean nothing. On the
    /// CPU, a batch with a tenth of padding or more pays for its real tokens alone.
    ///
    /// # Shapes
    /// - `input_ids`: `(b, t)` of u32
    /// - `token_type_ids`: `(b, t)` of u32; all zero where absent
    /// - `attention_mask`: `(b, t)` of u8, 1 on real tokens
    /// - output: `(b, t, hidden_size)`
    ///
    /// # Errors
    /// If shapes differ, or the sequence is longer than the model's.
    pub fn forward(
        &self,
        input_ids: &Tensor,
        token_type_ids: Option<&Tensor>,
        attention_mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let cx = &*cx.of_one_pass();
        let (xs, batch) = self.embed(input_ids, token_type_ids, attention_mask, cx)?; // (n, d)
        let xs = batch.pad(self.stack(&self.layers, xs, &batch, cx)?, cx.path)?;
        let (p, t) = (self.embeddings.words.virtual_tokens(), input_ids.dim(1)?);
        if p == 0 {
            Ok(xs)
        } else {
            xs.narrow(1, p, t)
        }
    }

    /// The last hidden state of each row's first token, which stands for the row: the first virtual
    /// one, where there are any. The last layer computes the keys and values of all tokens, but the rest for these alone: of twelve layers a
    /// fourteenth of a step.
    ///
    /// # Shapes
    /// - as [`Self::forward`], output: `(b, hidden_size)`
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn first_token(
        &self,
        input_ids: &Tensor,
        token_type_ids: Option<&Tensor>,
        attention_mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let cx = &*cx.of_one_pass();
        let (xs, batch) = self.embed(input_ids, token_type_ids, attention_mask, cx)?; // (n, d)
        let only = batch.first_tokens(xs.device())?;
        let Some((last, before)) = self.layers.split_last() else { return only.take(&xs, cx.path) };
        let xs = self.stack(before, xs, &batch, cx)?; // (n, d)
        let first = PackedBatch { only: Some(only), ..batch };
        self.stack(std::slice::from_ref(last), xs, &first, cx) // (b, d)
    }

    /// The first layer's input, packed where that pays, and how the batch is packed.
    fn embed(
        &self,
        ids: &Tensor,
        types: Option<&Tensor>,
        mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<(Tensor, PackedBatch)> {
        let embedded = self.embeddings.forward(ids, types, cx)?; // (b, p + t, d)
        let (b, t, _) = embedded.dims3()?;
        let batch = PackedBatch::new((b, t), &self.embeddings.words.extend_mask(mask)?)?;
        Ok((batch.pack(embedded, cx.path)?, batch))
    }

    /// Some layers, one after the other.
    fn stack(
        &self,
        layers: &[Arc<Layer>],
        mut xs: Tensor,
        batch: &PackedBatch,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        for layer in layers {
            xs = match (self.checkpoint_layers, cx.pass) {
                (true, Pass::Train { .. }) => {
                    let (block, batch, cx) = (layer.clone(), batch.clone(), cx.clone().without_tape());
                    ops::checkpoint(&xs, &layer.parameters()?, move |xs| block.forward(xs, &batch, &cx))?
                }
                _ => layer.forward(&xs, batch, cx)?,
            };
        }
        Ok(xs)
    }

    /// Whether training keeps each layer's input alone and computes the layer again in backward
    /// ([`ops::checkpoint`]): less memory for one more forward pass.
    pub fn set_checkpoint_layers(&mut self, on: bool) {
        self.checkpoint_layers = on;
    }

    /// The word embedding (vocab, hidden), which a masked-language-model head is tied to.
    pub fn word_embeddings(&self) -> &Weight {
        self.embeddings.words.words()
    }
}

impl AdaptableModel for RobertaEncoder {
    fn default_targets(&self) -> &'static [&'static str] {
        &["query", "key", "value"]
    }

    linears!(layers);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        Some(&mut self.embeddings.words)
    }
}

/// A padded batch between the layers: its real tokens alone, where that saves enough.
#[derive(Clone)]
struct PackedBatch {
    shape: (usize, usize), // (b, t)
    mask: Mask,
    real: Option<Rows>,
    /// The tokens (one a row) whose hidden states are wanted of a layer; all where absent.
    only: Option<Rows>,
}

impl PackedBatch {
    fn new(shape: (usize, usize), attention_mask: &Tensor) -> candle_core::Result<Self> {
        let mask = Mask { padding: Some(attention_mask.clone()), ..Mask::default() };
        let mut real = None;
        // On a GPU, to read the mask would hold everything up.
        if attention_mask.device().is_cpu() && attention_mask.dims() == [shape.0, shape.1] {
            let rows = Rows::of_mask(attention_mask)?;
            let has_first_tokens =
                (0..shape.0).all(|row| rows.places().binary_search(&((row * shape.1) as u32)).is_ok());
            // Below a tenth of padding the copies cost what they save.
            let saves = (1..=rows.total() * 9 / 10).contains(&rows.count());
            real = Some(rows).filter(|_| saves && has_first_tokens);
        }
        Ok(Self { shape, mask, real, only: None })
    }

    /// Where the first token of each row is among the packed ones.
    fn first_tokens(&self, device: &Device) -> candle_core::Result<Rows> {
        let (b, t) = self.shape;
        let at = (0..b).map(|row| (row * t) as u32);
        match &self.real {
            Some(real) => {
                let packed = at.map(|place| real.places().partition_point(|real| *real < place) as u32);
                Rows::new(packed.collect(), real.count(), device)
            }
            None => Rows::new(at.collect(), b * t, device),
        }
    }

    /// (b, t, d) as (n, d).
    fn pack(&self, xs: Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        match &self.real {
            Some(real) => real.take(&xs, path),
            None => Ok(xs),
        }
    }

    /// (n, d) as (b, t, d), zero on padding.
    fn pad(&self, xs: Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        let Some(real) = &self.real else { return Ok(xs) };
        let (b, t) = self.shape;
        real.put(&xs, path)?.reshape((b, t, ()))
    }
}

/// Words, positions and token types, summed, normalised, dropped.
#[derive(Debug)]
struct Embeddings {
    words: AdaptableEmbedding,
    positions: Tensor,   // (max positions, d)
    token_types: Tensor, // (types, d)
    norm: LayerNorm,
    dropout: Dropout,
    family: Family,
    pad_token_id: u32,
    first_position: u32,
    max_length: usize,
}

impl Embeddings {
    fn load(path: &str, vb: &Weights, config: &RobertaConfig, noise: Noise) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let table =
            |name: &str, rows: usize| vb.pp(name).get_with_hints((rows, config.hidden_size), "weight", init);
        let words = (config.vocab_size, config.hidden_size);
        Ok(Self {
            words: AdaptableEmbedding::new(vb.pp("word_embeddings").table(words, init)?),
            positions: table("position_embeddings", config.max_position_embeddings)?,
            token_types: table("token_type_embeddings", config.type_vocab_size)?,
            norm: LayerNorm::load(config.hidden_size, config.layer_norm_eps, &vb.pp("LayerNorm"))?,
            dropout: Dropout::new(config.hidden_dropout_prob, noise, path),
            family: config.model_type,
            pad_token_id: config.pad_id(),
            first_position: config.first_position(),
            max_length: config.max_length(),
        })
    }

    fn forward(&self, ids: &Tensor, types: Option<&Tensor>, cx: &Context) -> candle_core::Result<Tensor> {
        let (_, t) = ids.dims2()?;
        let p = self.words.virtual_tokens();
        self.words.check_length(p + t, self.max_length)?;
        let words = self.words.forward(ids, cx.path)?; // (b, p + t, d)
        let positions = ops::embedding(&self.position_ids(ids)?, &self.positions, cx.path)?;
        let types = match types {
            Some(types) => {
                let types = types.pad_with_zeros(1, p, 0)?;
                ops::embedding(&types, &self.token_types, cx.path)?
            }
            None => self.token_types.narrow(0, 0, 1)?.unsqueeze(0)?, // (1, 1, d)
        };
        let sum = words.broadcast_add(&positions)?.broadcast_add(&types)?;
        self.dropout.forward(&self.norm.forward_on(&sum, cx.path)?, cx)
    }

    /// `(b, p + t)` or `(1, p + t)` of u32. RoBERTa numbers the real tokens of each row, virtual ones
    /// first, after the padding id and gives padding that id itself; BERT numbers columns.
    fn position_ids(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let (p, t) = (self.words.virtual_tokens() as u32, ids.dim(1)? as u32);
        match self.family {
            Family::Bert => Tensor::arange(0, p + t, ids.device())?.unsqueeze(0),
            Family::Roberta => {
                // In f32, exactly: positions are small, and not every backend sums integers.
                let real = ids.ne(self.pad_token_id)?.to_dtype(DType::F32)?;
                let (b, before) = (ids.dim(0)?, f64::from(self.first_position - 1));
                let own =
                    ((((real.cumsum(D::Minus1)? + f64::from(p))? * real)? + before)?).to_dtype(DType::U32)?;
                if p == 0 {
                    return Ok(own);
                }
                let first = Tensor::arange(self.first_position, self.first_position + p, ids.device())?;
                Tensor::cat(&[&first.unsqueeze(0)?.broadcast_as((b, p as usize))?, &own], 1)
            }
        }
    }
}

/// Self-attention and feed-forward block, each followed by dropout, residual and layer norm.
#[derive(Debug)]
struct Layer {
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
    heads: usize,
}

impl Layer {
    fn load(path: &str, vb: &Weights, config: &RobertaConfig, noise: Noise) -> Result<Self> {
        let (d, inner, eps) = (config.hidden_size, config.intermediate_size, config.layer_norm_eps);
        let linear = |name: &str, in_dim, out_dim| {
            let std = config.initializer_range;
            adaptable_linear(&format!("{path}.{name}"), in_dim, out_dim, std, &vb.pp(name))
        };
        let dropout = |rate, name: &str| Dropout::new(rate, noise, &format!("{path}.{name}"));
        Ok(Self {
            query: linear("attention.self.query", d, d)?,
            key: linear("attention.self.key", d, d)?,
            value: linear("attention.self.value", d, d)?,
            attention_output: linear("attention.output.dense", d, d)?,
            attention_norm: LayerNorm::load(d, eps, &vb.pp("attention.output.LayerNorm"))?,
            intermediate: linear("intermediate.dense", d, inner)?,
            output: linear("output.dense", inner, d)?,
            output_norm: LayerNorm::load(d, eps, &vb.pp("output.LayerNorm"))?,
            probs_dropout: dropout(config.attention_probs_dropout_prob, "attention.self"),
            attention_dropout: dropout(config.hidden_dropout_prob, "attention.output"),
            output_dropout: dropout(config.hidden_dropout_prob, "output"),
            heads: config.num_attention_heads,
        })
    }

    /// Of `xs` (n, d), or (b, t, d) where the batch is not packed, the tokens that are wanted: in the
    /// same shape, or (b, d).
    fn forward(&self, xs: &Tensor, batch: &PackedBatch, cx: &Context) -> candle_core::Result<Tensor> {
        let wanted = match &batch.only {
            Some(only) => only.take(xs, cx.path)?,
            None => xs.clone(),
        };
        let q = self.query.forward(&wanted, cx)?;
        let q = if batch.only.is_some() { q.unsqueeze(1)? } else { batch.pad(q, cx.path)? }; // (b, t or 1, d)
        let k = batch.pad(self.key.forward(xs, cx)?, cx.path)?; // (b, t, d)
        let v = batch.pad(self.value.forward(xs, cx)?, cx.path)?;
        let scale = (q.dim(D::Minus1)? as f64 / self.heads as f64).sqrt().recip();
        let dropout = self.probs_dropout.active(cx);
        let context =
            ops::attention(&q, &k, &v, self.heads, self.heads, scale, &batch.mask, dropout, cx.path)?;
        let context =
            if batch.only.is_some() { context.squeeze(1)? } else { batch.pack(context, cx.path)? };
        let attended = self.attention_output.forward(&context, cx)?;
        let attended = self.attention_dropout.forward(&attended, cx)?;
        let xs = self.attention_norm.forward_add(&attended, &wanted, cx.path)?;
        let inner = self.feed_forward(&xs, cx)?;
        self.output_norm.forward_add(&self.output_dropout.forward(&inner, cx)?, &xs, cx.path)
    }

    fn feed_forward(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        if let (Some(up), Some(down)) = (self.intermediate.as_linear(cx), self.output.as_linear(cx)) {
            return ops::feed_forward(xs, up.weight(), up.bias(), down.weight(), down.bias(), cx.path);
        }
        self.output.forward(&ops::gelu(&self.intermediate.forward(xs, cx)?, cx.path)?, cx)
    }

    /// Everything that may be trained in it.
    fn parameters(&self) -> candle_core::Result<Vec<Tensor>> {
        let norms = [&self.attention_norm, &self.output_norm].into_iter().flat_map(LayerNorm::parameters);
        Ok(parameters(self)?.into_iter().chain(norms).collect())
    }
}

impl AdaptableModel for Layer {
    linears!(query, key, value, attention_output, intermediate, output);
}
