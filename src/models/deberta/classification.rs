//! DeBERTa-v3 with a head that classifies or scores a whole sequence.

use std::sync::Arc;

use candle_core::Tensor;
use candle_nn::{Init, Linear, VarBuilder};

use super::config::DebertaConfig;
use crate::adapter::{linears, AdaptableEmbedding, AdaptableModel, Context};
use crate::error::Result;
use crate::models::encoder::{
    Embeddings, EmbeddingsShape, LayerNames, LayerShape, PostNormLayer, RelativePositions, Stack,
};
use crate::models::layers::{linear, project, Dropout};
use crate::models::sequence_classifier::{ClassifierConfig, SequenceClassifier};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, LayerNorm};

const NAMES: LayerNames = LayerNames {
    query: "attention.self.query_proj",
    key: "attention.self.key_proj",
    value: "attention.self.value_proj",
    ..LayerNames::BERT
};

/// DeBERTa-v3 with a classification head on the first token: dropout, dense, GELU, dropout, projection.
///
/// The whole head belongs to the task, because checkpoints have no pooler. Difference: PEFT leaves `pooler`
/// frozen at its random initialisation unless `modules_to_save` names it; adapters written by this crate name
/// it, and it is trained.
#[derive(Debug)]
pub struct DebertaForSequenceClassification {
    embeddings: Embeddings,
    layers: Stack<PostNormLayer>,
    pooler_dropout: Dropout,
    pooler: Linear,
    dropout: Dropout,
    classifier: Linear,
    config: DebertaConfig,
}

impl DebertaForSequenceClassification {
    /// Loads the encoder from `vb`, with or without the prefix `deberta`, and the task head from `head`
    /// (names start at `pooler` and `classifier`). With an adapter method, `vb` is a frozen checkpoint and
    /// `head` comes from [`Params::var_builder`](crate::adapter::Params::var_builder).
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(
        vb: impl Into<Weights<'a>>,
        head: VarBuilder,
        config: &DebertaConfig,
        noise: Noise,
    ) -> Result<Self> {
        config.validate()?;
        let vb = vb.into().body("deberta", "embeddings.word_embeddings.weight");
        let (d, eps, std) = (config.hidden_size, config.layer_norm_eps, config.initializer_range);
        let embeddings = EmbeddingsShape {
            path: "deberta.embeddings",
            words: "word_embeddings",
            vocab: config.vocab_size,
            width: d,
            positions: None,
            token_types: None,
            norm: LayerNorm::load(d, eps, &vb.pp("embeddings.LayerNorm"))?,
            dropout: config.hidden_dropout_prob,
            init_std: std,
            max_length: usize::MAX, // positions are relative
        };
        let encoder = vb.pp("encoder");
        let shape = LayerShape {
            names: &NAMES,
            hidden: d,
            inner: config.intermediate_size,
            heads: config.num_attention_heads,
            norm_eps: eps,
            init_std: std,
            probs_dropout: config.attention_probs_dropout_prob,
            attention_dropout: config.hidden_dropout_prob,
            output_dropout: config.hidden_dropout_prob,
            relative: Some(Arc::new(positions(&encoder, config)?)),
        };
        let layers = (0..config.num_hidden_layers).map(|i| {
            let path = format!("deberta.encoder.layer.{i}");
            PostNormLayer::load(&path, &encoder.pp("layer").pp(i), &shape, noise)
        });
        Ok(Self {
            embeddings: Embeddings::load(&vb.pp("embeddings"), embeddings, noise)?,
            layers: Stack::new(layers.collect::<Result<_>>()?),
            pooler_dropout: Dropout::new(config.pooler_dropout, noise, "pooler"),
            pooler: linear(d, d, std, &head.pp("pooler.dense"))?,
            dropout: Dropout::new(config.head_dropout(), noise, "classifier"),
            classifier: linear(d, config.num_labels(), std, &head.pp("classifier"))?,
            config: config.clone(),
        })
    }

    /// The configuration, with the number of labels the head has.
    pub fn config(&self) -> &DebertaConfig {
        &self.config
    }
}

/// Loads the table of relative positions.
fn positions(encoder: &Weights, config: &DebertaConfig) -> Result<RelativePositions> {
    let (d, buckets) = (config.hidden_size, config.buckets());
    let init = Init::Randn { mean: 0.0, stdev: config.initializer_range };
    let norm = config.norm_rel_ebd == "layer_norm";
    let norm = norm.then(|| LayerNorm::load(d, config.layer_norm_eps, &encoder.pp("LayerNorm")));
    Ok(RelativePositions {
        table: encoder.pp("rel_embeddings").get_with_hints((2 * buckets.span(), d), "weight", init)?,
        norm: norm.transpose()?,
        buckets,
    })
}

impl SequenceClassifier for DebertaForSequenceClassification {
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
        let pooled = project(&self.pooler, &self.pooler_dropout.forward(&first, cx)?, cx)?;
        let pooled = self.dropout.forward(&ops::gelu(&pooled, cx.path)?, cx)?;
        project(&self.classifier, &pooled, cx)
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

impl ClassifierConfig for DebertaConfig {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_length(&self) -> usize {
        self.max_position_embeddings
    }

    fn longest(&self) -> usize {
        usize::MAX // positions are relative
    }

    fn prefix(&self) -> &'static str {
        "deberta"
    }

    fn saved_pad_id(&self) -> Option<u32> {
        Some(self.pad_id())
    }

    fn load(&self, vb: Weights<'_>, head: VarBuilder, noise: Noise) -> Result<Box<dyn SequenceClassifier>> {
        Ok(Box::new(DebertaForSequenceClassification::load(vb, head, self, noise)?))
    }
}

impl AdaptableModel for DebertaForSequenceClassification {
    fn default_targets(&self) -> &'static [&'static str] {
        &["query_proj", "key_proj", "value_proj"]
    }

    linears!(layers);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        Some(self.embeddings.words_mut())
    }
}
