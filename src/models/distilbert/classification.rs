//! DistilBERT with a head that classifies or scores a whole sequence.

use candle_core::Tensor;
use candle_nn::{Linear, VarBuilder};

use super::config::DistilBertConfig;
use crate::adapter::{linears, AdaptableEmbedding, AdaptableModel, Context};
use crate::error::Result;
use crate::models::encoder::{
    Embeddings, EmbeddingsShape, LayerNames, LayerShape, PositionIds, PostNormLayer, Stack,
};
use crate::models::layers::{linear, project, Dropout};
use crate::models::sequence_classifier::{ClassifierConfig, SequenceClassifier};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::LayerNorm;

/// Added to the variance in every layer norm; the configuration has no field for it.
const NORM_EPS: f64 = 1e-12;

const NAMES: LayerNames = LayerNames {
    query: "attention.q_lin",
    key: "attention.k_lin",
    value: "attention.v_lin",
    attention_output: "attention.out_lin",
    attention_norm: "sa_layer_norm",
    intermediate: "ffn.lin1",
    output: "ffn.lin2",
    output_norm: "output_layer_norm",
};

/// DistilBERT with a classification head on the first token: dense, ReLU, dropout, projection.
#[derive(Debug)]
pub struct DistilBertForSequenceClassification {
    embeddings: Embeddings,
    layers: Stack<PostNormLayer>,
    pre_classifier: Linear,
    dropout: Dropout,
    classifier: Linear,
    config: DistilBertConfig,
}

impl DistilBertForSequenceClassification {
    /// Loads the encoder from `vb`, with or without the prefix `distilbert`, and the task head from `head`
    /// (names start at `pre_classifier` and `classifier`). With an adapter method, `vb` is a frozen
    /// checkpoint and `head` comes from [`Params::var_builder`](crate::adapter::Params::var_builder).
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(
        vb: impl Into<Weights<'a>>,
        head: VarBuilder,
        config: &DistilBertConfig,
        noise: Noise,
    ) -> Result<Self> {
        config.validate()?;
        let vb = vb.into().body("distilbert", "embeddings.word_embeddings.weight");
        let (d, std) = (config.dim, config.initializer_range);
        let embeddings = EmbeddingsShape {
            path: "distilbert.embeddings",
            words: "word_embeddings",
            vocab: config.vocab_size,
            width: d,
            positions: Some((config.max_position_embeddings, PositionIds::Columns)),
            token_types: None,
            norm: LayerNorm::load(d, NORM_EPS, &vb.pp("embeddings.LayerNorm"))?,
            dropout: config.dropout,
            init_std: std,
            max_length: config.max_position_embeddings,
        };
        let shape = LayerShape {
            names: &NAMES,
            hidden: d,
            inner: config.hidden_dim,
            heads: config.n_heads,
            norm_eps: NORM_EPS,
            init_std: std,
            probs_dropout: config.attention_dropout,
            attention_dropout: 0.0,
            output_dropout: config.dropout,
            relative: None,
        };
        let layers = (0..config.n_layers).map(|i| {
            let path = format!("distilbert.transformer.layer.{i}");
            PostNormLayer::load(&path, &vb.pp("transformer.layer").pp(i), &shape, noise)
        });
        Ok(Self {
            embeddings: Embeddings::load(&vb.pp("embeddings"), embeddings, noise)?,
            layers: Stack::new(layers.collect::<Result<_>>()?),
            pre_classifier: linear(d, d, std, &head.pp("pre_classifier"))?,
            dropout: Dropout::new(config.seq_classif_dropout, noise, "classifier"),
            classifier: linear(d, config.num_labels(), std, &head.pp("classifier"))?,
            config: config.clone(),
        })
    }

    /// The configuration, with the number of labels the head has.
    pub fn config(&self) -> &DistilBertConfig {
        &self.config
    }
}

impl SequenceClassifier for DistilBertForSequenceClassification {
    fn logits(
        &self,
        input_ids: &Tensor,
        _token_type_ids: &Tensor,
        attention_mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let cx = &*cx.of_one_pass();
        let (xs, batch) = self.embeddings.embed(input_ids, None, attention_mask, cx)?; // (n, d)
        let first = self.layers.first_token(xs, batch, cx)?; // (b, d)
        let pooled = project(&self.pre_classifier, &first, cx)?.relu()?;
        project(&self.classifier, &self.dropout.forward(&pooled, cx)?, cx)
    }

    fn set_checkpoint_layers(&mut self, on: bool) {
        self.layers.set_checkpoint_layers(on);
    }

    fn num_labels(&self) -> usize {
        self.config.num_labels()
    }

    fn pad_id(&self) -> u32 {
        self.config.pad_id()
    }
}

impl ClassifierConfig for DistilBertConfig {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_length(&self) -> usize {
        self.max_position_embeddings
    }

    fn prefix(&self) -> &'static str {
        "distilbert"
    }

    fn saved_pad_id(&self) -> Option<u32> {
        Some(self.pad_id())
    }

    fn load(&self, vb: Weights<'_>, head: VarBuilder, noise: Noise) -> Result<Box<dyn SequenceClassifier>> {
        Ok(Box::new(DistilBertForSequenceClassification::load(vb, head, self, noise)?))
    }
}

impl AdaptableModel for DistilBertForSequenceClassification {
    fn default_targets(&self) -> &'static [&'static str] {
        &["q_lin", "k_lin", "v_lin"]
    }

    linears!(layers);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        Some(self.embeddings.words_mut())
    }
}
