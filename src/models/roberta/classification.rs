//! The encoder with a head that classifies or scores a whole sequence.

use candle_core::Tensor;
use candle_nn::{Linear, VarBuilder};

use super::config::{Family, RobertaConfig};
use super::encoder::RobertaEncoder;
use crate::adapter::{linears, AdaptableEmbedding, AdaptableLinear, AdaptableModel, Context, Linears};
use crate::error::Result;
use crate::models::layers::{adaptable_linear, linear, project, Dropout};
use crate::models::sequence_classifier::{ClassifierConfig, SequenceClassifier};
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops;

/// RoBERTa, BERT or ELECTRA with a classification head on the first token.
#[derive(Debug)]
pub struct RobertaForSequenceClassification {
    encoder: RobertaEncoder,
    head: Head,
    config: RobertaConfig,
}

/// The classification heads.
///
/// - RoBERTa: dropout, dense, tanh, dropout, projection; all of them belong to the task.
/// - ELECTRA: the same with GELU instead of tanh.
/// - BERT: the pooler (dense, tanh) belongs to the encoder; dropout and projection belong to the task.
#[derive(Debug)]
enum Head {
    Roberta { before: Dropout, dense: Linear, gelu: bool, after: Dropout, out_proj: Linear },
    Bert { pooler: AdaptableLinear, dropout: Dropout, classifier: Linear },
}

impl RobertaForSequenceClassification {
    /// Loads the encoder from `vb` and the task head from `head` (names start at `classifier`). With an
    /// adapter method, `vb` is a frozen checkpoint and `head` comes from
    /// [`Params::var_builder`](crate::adapter::Params::var_builder).
    ///
    /// # Errors
    /// If the configuration is not supported, or a tensor is missing or of another shape.
    pub fn load<'a>(
        vb: impl Into<Weights<'a>>,
        head: VarBuilder,
        config: &RobertaConfig,
        noise: Noise,
    ) -> Result<Self> {
        let vb = vb.into();
        let encoder = RobertaEncoder::load(&vb, config, noise)?;
        let (d, labels, std) = (config.hidden_size, config.num_labels(), config.initializer_range);
        let dropout = |name: &str| Dropout::new(config.head_dropout(), noise, name);
        let classifier = head.pp("classifier");
        let head = match config.model_type {
            Family::Roberta | Family::Electra => Head::Roberta {
                before: dropout("classifier.before"),
                dense: linear(d, d, std, &classifier.pp("dense"))?,
                gelu: config.model_type == Family::Electra,
                after: dropout("classifier.after"),
                out_proj: linear(d, labels, std, &classifier.pp("out_proj"))?,
            },
            Family::Bert => {
                let vb = vb.body("bert", "pooler.dense.weight").pp("pooler.dense");
                Head::Bert {
                    pooler: adaptable_linear("bert.pooler.dense", d, d, std, &vb)?,
                    dropout: dropout("classifier"),
                    classifier: linear(d, labels, std, &classifier)?,
                }
            }
        };
        Ok(Self { encoder, head, config: config.clone() })
    }

    /// Sets whether training keeps only each layer's input and recomputes the layer in the backward pass
    /// ([`ops::checkpoint`]). This saves memory and costs one more forward pass.
    pub fn set_checkpoint_layers(&mut self, on: bool) {
        self.encoder.set_checkpoint_layers(on);
    }

    /// The configuration, with the number of labels the head has.
    pub fn config(&self) -> &RobertaConfig {
        &self.config
    }

    /// Computes the logits, or the scores of a regression.
    ///
    /// # Shapes
    /// - `input_ids`: `(b, t)` of u32
    /// - `token_type_ids`: `(b, t)` of u32; all zero where absent
    /// - `attention_mask`: `(b, t)` of u8, 1 on real tokens
    /// - output: `(b, num_labels)`, the head's dtype
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
        let first = self.encoder.first_token(input_ids, token_type_ids, attention_mask, cx)?; // (b, d)
        match &self.head {
            Head::Roberta { before, dense, gelu, after, out_proj } => {
                let xs = project(dense, &before.forward(&first, cx)?, cx)?;
                let xs = if *gelu { ops::gelu(&xs, cx.path)? } else { xs.tanh()? };
                project(out_proj, &after.forward(&xs, cx)?, cx)
            }
            Head::Bert { pooler, dropout, classifier } => {
                let pooled = pooler.forward(&first, cx)?.tanh()?;
                project(classifier, &dropout.forward(&pooled, cx)?, cx)
            }
        }
    }
}

impl SequenceClassifier for RobertaForSequenceClassification {
    fn logits(
        &self,
        input_ids: &Tensor,
        token_type_ids: &Tensor,
        attention_mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor> {
        // RoBERTa has only one token type, but its tokenizers number the two texts of a pair all the same.
        let types = (self.config().type_vocab_size > 1).then_some(token_type_ids);
        self.forward(input_ids, types, attention_mask, cx)
    }

    fn set_checkpoint_layers(&mut self, on: bool) {
        self.set_checkpoint_layers(on); // the inherent method
    }

    fn num_labels(&self) -> usize {
        self.config().num_labels()
    }

    fn pad_id(&self) -> u32 {
        self.config().pad_id()
    }
}

impl ClassifierConfig for RobertaConfig {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_length(&self) -> usize {
        self.max_length()
    }

    fn output_tensors(&self) -> &'static [&'static str] {
        match self.model_type {
            Family::Roberta | Family::Electra => &["classifier.out_proj.weight", "classifier.out_proj.bias"],
            Family::Bert => &["classifier.weight", "classifier.bias"],
        }
    }

    fn prefix(&self) -> &'static str {
        self.model_type.prefix()
    }

    fn saved_pad_id(&self) -> Option<u32> {
        Some(self.pad_id())
    }

    fn load(&self, vb: Weights<'_>, head: VarBuilder, noise: Noise) -> Result<Box<dyn SequenceClassifier>> {
        Ok(Box::new(RobertaForSequenceClassification::load(vb, head, self, noise)?))
    }
}

impl AdaptableModel for RobertaForSequenceClassification {
    fn default_targets(&self) -> &'static [&'static str] {
        self.encoder.default_targets()
    }

    linears!(encoder, head);

    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        self.encoder.embedding_mut()
    }
}

impl Linears for Head {
    fn visit(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()> {
        match self {
            Self::Bert { pooler, .. } => f(pooler),
            Self::Roberta { .. } => Ok(()),
        }
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()> {
        match self {
            Self::Bert { pooler, .. } => f(pooler),
            Self::Roberta { .. } => Ok(()),
        }
    }
}
