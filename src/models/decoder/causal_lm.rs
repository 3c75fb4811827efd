//! The decoder with a language-model head.

use candle_core::{Device, Tensor};
use candle_nn::Init;

use super::config::DecoderConfig;
use super::model::Decoder;
use crate::adapter::{linears, AdaptableEmbedding, AdaptableModel, Context};
use crate::error::Result;
use crate::models::causal::{Cache, CausalLm};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, Weight};

/// A decoder with a head that predicts the next token.
#[derive(Debug)]
pub struct DecoderForCausalLM {
    decoder: Decoder,
    head: Weight, // (vocab, d)
    config: DecoderConfig,
}

impl DecoderForCausalLM {
    /// Loads the decoder and its head: `lm_head.weight`, or the token embedding under `tie_word_embeddings`.
    /// `noise` is the source of dropout.
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(vb: impl Into<Weights<'a>>, config: &DecoderConfig, noise: Noise) -> Result<Self> {
        let vb = vb.into();
        let decoder = Decoder::load(&vb, config, noise)?;
        let head = if config.tie_word_embeddings {
            decoder.embeddings().clone()
        } else {
            let init = Init::Randn { mean: 0.0, stdev: config.initializer_range };
            let shape = (config.vocab_size, config.hidden_size);
            vb.pp("lm_head").table(shape, init)?
        };
        Ok(Self { decoder, head, config: config.clone() })
    }

    /// The configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }
}

impl CausalLm for DecoderForCausalLM {
    fn device(&self) -> &Device {
        self.decoder.device()
    }

    fn set_checkpoint_layers(&mut self, on: bool) {
        self.decoder.set_checkpoint_layers(on);
    }

    fn max_length(&self) -> usize {
        self.decoder.max_length()
    }

    fn cache(&self, capacity: usize) -> Cache {
        self.decoder.cache(capacity)
    }

    fn hidden(
        &self,
        input_ids: &Tensor,
        attention_mask: &Tensor,
        cache: Option<&mut Cache>,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        self.decoder.forward(input_ids, attention_mask, cache, cx)
    }

    fn head(&self, hidden: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        let logits = match cx.only_predicts {
            true => self.head.linear(hidden, None, cx.path)?,
            false => self.head.linear_by_blocks(hidden, None, cx.path)?,
        };
        match self.config.logit_cap {
            Some(cap) => ops::soft_cap(&logits, cap, cx.path),
            None => Ok(logits),
        }
    }

    fn token_loss(&self, hidden: &Tensor, targets: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        let cap = self.config.logit_cap;
        ops::capped_linear_cross_entropy(hidden, &self.head, targets, ops::IGNORED_LABEL, cap, cx.path)
    }
}

impl AdaptableModel for DecoderForCausalLM {
    fn default_targets(&self) -> &'static [&'static str] {
        self.decoder.default_targets()
    }

    linears!(decoder);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        self.decoder.embedding_mut()
    }
}
