//! The decoder with a sequence-classification head.

use candle_core::{DType, Tensor, D};
use candle_nn::{Init, VarBuilder};

use super::config::DecoderConfig;
use super::model::Decoder;
use crate::adapter::{linears, AdaptableEmbedding, AdaptableModel, Context};
use crate::error::Result;
use crate::models::sequence_classifier::{ClassifierConfig, SequenceClassifier};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops;

/// A decoder with a linear classifier on the last real token.
#[derive(Debug)]
pub struct DecoderForSequenceClassification {
    decoder: Decoder,
    score: Tensor, // (labels, d)
    config: DecoderConfig,
}

impl DecoderForSequenceClassification {
    /// Loads the decoder from `vb` and the task head, `score.weight`, from `head`. With an adapter method,
    /// these are a frozen checkpoint and [`Params::var_builder`](crate::adapter::Params::var_builder).
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(
        vb: impl Into<Weights<'a>>,
        head: VarBuilder,
        config: &DecoderConfig,
        noise: Noise,
    ) -> Result<Self> {
        let decoder = Decoder::load(vb, config, noise)?;
        let init = Init::Randn { mean: 0.0, stdev: config.initializer_range };
        let shape = (config.num_labels, config.hidden_size);
        let score = head.pp("score").get_with_hints(shape, "weight", init)?;
        Ok(Self { decoder, score, config: config.clone() })
    }

    /// Turns gradient checkpointing ([`ops::checkpoint`]) on or off: training keeps only the input of each
    /// layer and recomputes the layer in the backward pass. Saves memory; costs one more forward pass.
    pub fn set_checkpoint_layers(&mut self, on: bool) {
        self.decoder.set_checkpoint_layers(on);
    }

    /// The configuration, including the head's number of labels.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Returns the logits of each sequence, or the scores of a regression.
    ///
    /// # Shapes
    /// - `input_ids`: `(b, t)` of u32
    /// - `attention_mask`: `(b, t)` of u8, 1 on real tokens; padding on either side
    /// - output: `(b, num_labels)`, the head's dtype
    ///
    /// # Errors
    /// If the shapes do not fit, or the sequence is longer than the model's maximum.
    pub fn forward(
        &self,
        input_ids: &Tensor,
        attention_mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let hidden = self.decoder.forward(input_ids, attention_mask, None, cx)?;
        let (b, t, _) = hidden.dims3()?;
        // The column of the last real token; in f32, which is exact here and has an argmax on every backend.
        let columns = Tensor::arange(0u32, t as u32, hidden.device())?.to_dtype(DType::F32)?;
        let mask = ops::carry(attention_mask, hidden.device())?;
        let last = mask.to_dtype(DType::F32)?.broadcast_mul(&columns)?.argmax(D::Minus1)?;
        let starts: Vec<u32> = (0..b).map(|row| (row * t) as u32).collect();
        let at = (Tensor::from_vec(starts, b, hidden.device())? + last)?;
        let chosen = hidden.flatten_to(1)?.index_select(&at, 0)?; // (b, d)
        ops::linear(&chosen.to_dtype(self.score.dtype())?, &self.score, None, cx.path)
    }
}

impl SequenceClassifier for DecoderForSequenceClassification {
    fn logits(
        &self,
        input_ids: &Tensor,
        _token_type_ids: &Tensor,
        attention_mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        self.forward(input_ids, attention_mask, cx)
    }

    fn set_checkpoint_layers(&mut self, on: bool) {
        self.set_checkpoint_layers(on); // the inherent method
    }

    fn num_labels(&self) -> usize {
        self.config().num_labels
    }

    fn pad_id(&self) -> u32 {
        self.config().pad_id()
    }
}

impl ClassifierConfig for DecoderConfig {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_length(&self) -> usize {
        self.max_length()
    }

    fn output_tensors(&self) -> &'static [&'static str] {
        &["score.weight"]
    }

    fn prefix(&self) -> &'static str {
        "model"
    }

    fn saved_pad_id(&self) -> Option<u32> {
        self.pad_token_id.or_else(|| self.eos_token_ids.first().copied())
    }

    fn load(&self, vb: Weights<'_>, head: VarBuilder, noise: Noise) -> Result<Box<dyn SequenceClassifier>> {
        Ok(Box::new(DecoderForSequenceClassification::load(vb, head, self, noise)?))
    }
}

impl AdaptableModel for DecoderForSequenceClassification {
    fn default_targets(&self) -> &'static [&'static str] {
        self.decoder.default_targets()
    }

    linears!(decoder);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        self.decoder.embedding_mut()
    }
}
