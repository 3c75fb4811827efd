//! ModernBERT with a head that classifies or scores a whole sequence.

use candle_core::Tensor;
use candle_nn::{Linear, VarBuilder};

use super::config::{LayerType, ModernBertConfig, Pooling};
use super::layer::{norm, Attention, Layer};
use crate::adapter::{linears, AdaptableEmbedding, AdaptableLinear, AdaptableModel, Context};
use crate::error::Result;
use crate::models::encoder::{Embeddings, EmbeddingsShape, Stack};
use crate::models::layers::{adaptable_linear_of, linear, project, Dropout};
use crate::models::packed::PackedBatch;
use crate::models::sequence_classifier::{ClassifierConfig, SequenceClassifier};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, LayerNorm};
use crate::util::dtype::wide;

/// ModernBERT with a classification head on the first token or on the mean of all tokens: dense, GELU, norm,
/// dropout, projection. Everything but the projection belongs to the checkpoint, like the pooler of BERT.
#[derive(Debug)]
pub struct ModernBertForSequenceClassification {
    embeddings: Embeddings,
    layers: Stack<Layer>,
    final_norm: LayerNorm,
    dense: AdaptableLinear,
    norm: LayerNorm,
    dropout: Dropout,
    classifier: Linear,
    /// Whether the last layer's attention sees the whole row.
    ends_global: bool,
    config: ModernBertConfig,
}

impl ModernBertForSequenceClassification {
    /// Loads the encoder, with or without the prefix `model`, and the head's first part (`head`) from `vb`,
    /// and the projection to classes (`classifier`) from `head`. With an adapter method, `vb` is a frozen
    /// checkpoint and `head` comes from [`Params::var_builder`](crate::adapter::Params::var_builder).
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(
        vb: impl Into<Weights<'a>>,
        head: VarBuilder,
        config: &ModernBertConfig,
        noise: Noise,
    ) -> Result<Self> {
        config.validate()?;
        let whole = vb.into();
        let vb = whole.body("model", "embeddings.tok_embeddings.weight");
        let (d, std) = (config.hidden_size, config.initializer_range);
        let embeddings = EmbeddingsShape {
            path: "model.embeddings",
            words: "tok_embeddings",
            vocab: config.vocab_size,
            width: d,
            positions: None,
            token_types: None,
            norm: norm(config, &vb.pp("embeddings.norm"))?,
            dropout: config.embedding_dropout,
            init_std: std,
            max_length: config.max_position_embeddings,
        };
        let attention = |layer_type| Attention::new(config, layer_type, &vb);
        let (full, sliding) = (attention(LayerType::FullAttention), attention(LayerType::SlidingAttention));
        let layers = (0..config.num_hidden_layers).map(|i| {
            let attention = match config.layer_type(i) {
                LayerType::FullAttention => &full,
                LayerType::SlidingAttention => &sliding,
            };
            Layer::load(i, &vb.pp("layers").pp(i), config, attention.clone(), noise)
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        Ok(Self {
            embeddings: Embeddings::load(&vb.pp("embeddings"), embeddings, noise)?,
            ends_global: layers.last().is_none_or(Layer::is_global),
            layers: Stack::new(layers),
            final_norm: norm(config, &vb.pp("final_norm"))?,
            dense: adaptable_linear_of(
                "head.dense",
                d,
                d,
                std,
                config.classifier_bias,
                &whole.pp("head.dense"),
            )?,
            norm: norm(config, &whole.pp("head.norm"))?,
            dropout: Dropout::new(config.classifier_dropout, noise, "classifier"),
            classifier: linear(d, config.num_labels(), std, &head.pp("classifier"))?,
            config: config.clone(),
        })
    }

    /// The configuration, with the number of labels the head has.
    pub fn config(&self) -> &ModernBertConfig {
        &self.config
    }

    /// The head's input, (b, d).
    fn pooled(&self, xs: Tensor, batch: PackedBatch, cx: &Context) -> candle_core::Result<Tensor> {
        let normed = |xs: &Tensor| self.final_norm.forward_on(xs, cx.path);
        match self.config.classifier_pooling {
            // A sliding window is aligned with the last query, so it does not fit first tokens alone.
            Pooling::Cls if self.ends_global => normed(&self.layers.first_token(xs, batch, cx)?),
            Pooling::Cls => {
                let xs = self.layers.forward(xs, &batch, cx)?;
                normed(&batch.first_tokens(xs.device())?.take(&xs, cx.path)?)
            }
            // Virtual tokens are included, as in PEFT.
            Pooling::Mean => {
                let xs = normed(&self.layers.forward(xs, &batch, cx)?)?;
                mean(&batch.pad(xs, cx.path)?, batch.padding())
            }
        }
    }
}

/// The mean of the tokens (b, t, d) that the mask (b, t) marks, (b, d).
fn mean(xs: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
    let dtype = wide(xs.dtype()); // bf16 cannot count beyond 256
    let real = mask.to_dtype(dtype)?.unsqueeze(2)?; // (b, t, 1)
    let sum = xs.to_dtype(dtype)?.broadcast_mul(&real)?.sum(1)?;
    sum.broadcast_div(&real.sum(1)?)?.to_dtype(xs.dtype())
}

impl SequenceClassifier for ModernBertForSequenceClassification {
    fn logits(
        &self,
        input_ids: &Tensor,
        _token_type_ids: &Tensor,
        attention_mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let cx = &*cx.of_one_pass();
        let (xs, batch) = self.embeddings.embed(input_ids, None, attention_mask, cx)?; // (n, d)
        let pooled = self.dense.forward(&self.pooled(xs, batch, cx)?, cx)?;
        let pooled = self.norm.forward_on(&ops::gelu(&pooled, cx.path)?, cx.path)?;
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

impl ClassifierConfig for ModernBertConfig {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_length(&self) -> usize {
        self.max_position_embeddings
    }

    fn prefix(&self) -> &'static str {
        "model"
    }

    fn saved_pad_id(&self) -> Option<u32> {
        Some(self.pad_id())
    }

    fn load(&self, vb: Weights<'_>, head: VarBuilder, noise: Noise) -> Result<Box<dyn SequenceClassifier>> {
        Ok(Box::new(ModernBertForSequenceClassification::load(vb, head, self, noise)?))
    }
}

impl AdaptableModel for ModernBertForSequenceClassification {
    fn default_targets(&self) -> &'static [&'static str] {
        &["Wqkv"]
    }

    linears!(layers, dense);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        Some(self.embeddings.words_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn a_mean_in_half_width_is_one_of_all_tokens() -> candle_core::Result<()> {
        let (ones, device) = (Tensor::ones((1, 300, 1), DType::BF16, &Device::Cpu)?, Device::Cpu);
        let xs = Tensor::cat(&[&ones, &ones.affine(2.0, 0.0)?, &ones.affine(9.0, 0.0)?], 1)?;
        let mask = Tensor::arange(0u32, 900, &device)?.lt(600u32)?.unsqueeze(0)?;
        assert_eq!(mean(&xs, &mask)?.to_dtype(DType::F32)?.to_vec2::<f32>()?, [[1.5]]);
        Ok(())
    }
}
