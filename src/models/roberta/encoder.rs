//! The encoder: embeddings and a stack of post-norm transformer layers.

use candle_core::Tensor;

use super::config::{Family, RobertaConfig};
use crate::adapter::{linears, AdaptableEmbedding, AdaptableLinear, AdaptableModel, Context};
use crate::error::Result;
use crate::models::encoder::{
    Embeddings, EmbeddingsShape, LayerNames, LayerShape, PositionIds, PostNormLayer, Stack,
};
use crate::models::layers::adaptable_linear;
use crate::models::packed::PackedBatch;
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{LayerNorm, Weight};

/// The encoder of RoBERTa, BERT or ELECTRA.
#[derive(Debug)]
pub struct RobertaEncoder {
    embeddings: Embeddings,
    /// From embeddings to layers, if their widths differ (ELECTRA).
    projection: Option<AdaptableLinear>,
    layers: Stack<PostNormLayer>,
}

impl RobertaEncoder {
    /// Loads the encoder from `vb`, with or without the family's prefix.
    ///
    /// If `vb` creates new parameters, they are initialised by `initializer_range`, under the prefix.
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(vb: impl Into<Weights<'a>>, config: &RobertaConfig, noise: Noise) -> Result<Self> {
        config.validate()?;
        let prefix = config.model_type.prefix();
        let vb = vb.into().body(prefix, "embeddings.word_embeddings.weight");
        let shape = LayerShape {
            names: &LayerNames::BERT,
            hidden: config.hidden_size,
            inner: config.intermediate_size,
            heads: config.num_attention_heads,
            norm_eps: config.layer_norm_eps,
            init_std: config.initializer_range,
            probs_dropout: config.attention_probs_dropout_prob,
            attention_dropout: config.hidden_dropout_prob,
            output_dropout: config.hidden_dropout_prob,
            relative: None,
        };
        let layers = (0..config.num_hidden_layers).map(|i| {
            let path = format!("{prefix}.encoder.layer.{i}");
            PostNormLayer::load(&path, &vb.pp("encoder").pp("layer").pp(i), &shape, noise)
        });
        let (width, hidden) = (config.embedding_width(), config.hidden_size);
        let project = || {
            let path = format!("{prefix}.embeddings_project");
            adaptable_linear(&path, width, hidden, config.initializer_range, &vb.pp("embeddings_project"))
        };
        Ok(Self {
            embeddings: load_embeddings(&vb.pp("embeddings"), config, noise)?,
            projection: (width != hidden).then(project).transpose()?,
            layers: Stack::new(layers.collect::<Result<_>>()?),
        })
    }

    /// Computes the last hidden states, without those of virtual tokens. Values on padding are meaningless.
    /// On the CPU, if at least a tenth of the batch is padding, only its real tokens are computed.
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
        let xs = batch.pad(self.layers.forward(xs, &batch, cx)?, cx.path)?;
        self.embeddings.without_virtual(xs)
    }

    /// Computes the last hidden state of each row's first token, which represents the row; with virtual
    /// tokens, it is the first virtual token. The last layer computes keys and values for all tokens, but
    /// everything else only for the first tokens, which with twelve layers saves a fourteenth of a step.
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
        self.layers.first_token(xs, batch, cx)
    }

    /// Computes the first layer's input, packed if that saves time, and the layout of the batch.
    fn embed(
        &self,
        ids: &Tensor,
        types: Option<&Tensor>,
        mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<(Tensor, PackedBatch)> {
        let (xs, batch) = self.embeddings.embed(ids, types, mask, cx)?;
        match &self.projection {
            Some(projection) => Ok((projection.forward(&xs, cx)?, batch)),
            None => Ok((xs, batch)),
        }
    }

    /// Sets whether training keeps only each layer's input and recomputes the layer in the backward pass
    /// ([`ops::checkpoint`](crate::ops::checkpoint)). This saves memory and costs one more forward pass.
    pub fn set_checkpoint_layers(&mut self, on: bool) {
        self.layers.set_checkpoint_layers(on);
    }

    /// The word embedding (vocab, hidden), to which the masked-language-model head is tied.
    pub fn word_embeddings(&self) -> &Weight {
        self.embeddings.words().words()
    }
}

/// Loads the embeddings. RoBERTa numbers the real tokens of each row, virtual tokens first, from the padding
/// id plus 1, and gives padding the position of the padding id. BERT and ELECTRA number columns.
fn load_embeddings(vb: &Weights, config: &RobertaConfig, noise: Noise) -> Result<Embeddings> {
    let numbering = match config.model_type {
        Family::Roberta => {
            PositionIds::RealTokens { pad_id: config.pad_id(), first: config.first_position() }
        }
        Family::Bert | Family::Electra => PositionIds::Columns,
    };
    let width = config.embedding_width();
    let shape = EmbeddingsShape {
        path: &format!("{}.embeddings", config.model_type.prefix()),
        words: "word_embeddings",
        vocab: config.vocab_size,
        width,
        positions: Some((config.max_position_embeddings, numbering)),
        token_types: Some(config.type_vocab_size),
        norm: LayerNorm::load(width, config.layer_norm_eps, &vb.pp("LayerNorm"))?,
        dropout: config.hidden_dropout_prob,
        init_std: config.initializer_range,
        max_length: config.max_length(),
    };
    Embeddings::load(vb, shape, noise)
}

impl AdaptableModel for RobertaEncoder {
    fn default_targets(&self) -> &'static [&'static str] {
        &["query", "key", "value"]
    }

    linears!(projection, layers);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        Some(self.embeddings.words_mut())
    }
}
