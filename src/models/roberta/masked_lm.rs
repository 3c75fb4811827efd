//! The encoder with a masked-language-model head, for pre-training.

use candle_core::{Tensor, D};
use candle_nn::{Init, Linear};

use super::config::{Family, RobertaConfig};
use super::encoder::RobertaEncoder;
use crate::adapter::{linears, AdaptableEmbedding, AdaptableModel, Context};
use crate::error::{Error, Result};
use crate::models::layers::linear;
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, LayerNorm};

/// RoBERTa or BERT with a masked-language-model head, its projection tied to the word embedding.
#[derive(Debug)]
pub struct RobertaForMaskedLM {
    encoder: RobertaEncoder,
    dense: Linear,
    norm: LayerNorm,
    bias: Tensor, // (vocab)
}

impl RobertaForMaskedLM {
    /// Loads the encoder and the head from `vb`.
    ///
    /// # Errors
    /// If the configuration is not supported (ELECTRA's discriminator has no such head), or a tensor is
    /// missing or of another shape.
    pub fn load<'a>(vb: impl Into<Weights<'a>>, config: &RobertaConfig, noise: Noise) -> Result<Self> {
        let vb = vb.into();
        let (d, eps) = (config.hidden_size, config.layer_norm_eps);
        let (dense, norm, bias) = match config.model_type {
            Family::Roberta => ("lm_head.dense", "lm_head.layer_norm", "lm_head"),
            Family::Bert => {
                ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions")
            }
            Family::Electra => {
                let reason = "ELECTRA's discriminator cannot predict masked tokens: expected roberta or bert";
                return Err(Error::config("model_type", reason));
            }
        };
        Ok(Self {
            encoder: RobertaEncoder::load(&vb, config, noise)?,
            dense: linear(d, d, config.initializer_range, &vb.pp(dense))?,
            norm: LayerNorm::load(d, eps, &vb.pp(norm))?,
            bias: vb.pp(bias).get_with_hints(config.vocab_size, "bias", Init::Const(0.0))?,
        })
    }

    /// Sets whether training keeps only each layer's input and recomputes the layer in the backward pass
    /// ([`ops::checkpoint`]). This saves memory and costs one more forward pass.
    pub fn set_checkpoint_layers(&mut self, on: bool) {
        self.encoder.set_checkpoint_layers(on);
    }

    /// Computes the logits at the given positions. The projection onto the vocabulary is skipped elsewhere,
    /// since only one token in seven is masked.
    ///
    /// # Shapes
    /// - `input_ids`: `(b, t)` of u32
    /// - `token_type_ids`: `(b, t)` of u32; all zero where absent
    /// - `attention_mask`: `(b, t)` of u8, 1 on real tokens
    /// - `positions`: `(n)` of u32, each `row * t + column`
    /// - output: `(n, vocab_size)`
    ///
    /// # Errors
    /// If shapes differ, the sequence is too long, or a position is out of range.
    pub fn forward(
        &self,
        input_ids: &Tensor,
        token_type_ids: Option<&Tensor>,
        attention_mask: &Tensor,
        positions: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        let hidden = self.encoder.forward(input_ids, token_type_ids, attention_mask, cx)?;
        let d = hidden.dim(D::Minus1)?;
        let picked = hidden.reshape(((), d))?.index_select(positions, 0)?; // (n, d)
        let xs = ops::gelu(&ops::linear(&picked, self.dense.weight(), self.dense.bias(), cx.path)?, cx.path)?;
        let xs = self.norm.forward_on(&xs, cx.path)?;
        self.encoder.word_embeddings().linear_by_blocks(&xs, Some(&self.bias), cx.path)
    }
}

impl AdaptableModel for RobertaForMaskedLM {
    fn default_targets(&self) -> &'static [&'static str] {
        self.encoder.default_targets()
    }

    linears!(encoder);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        self.encoder.embedding_mut()
    }
}
