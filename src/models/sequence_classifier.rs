//! The interfaces of models that classify a whole sequence, and of their configurations.

use std::fmt::Debug;

use candle_core::Tensor;
use candle_nn::VarBuilder;

use super::weights::Weights;
use crate::adapter::{AdaptableModel, Context};
use crate::error::Result;
use crate::noise::Noise;

/// A model with a head that classifies or scores a whole sequence. It can be shared between threads: a
/// forward pass changes no state.
pub trait SequenceClassifier: AdaptableModel + Debug + Send + Sync {
    /// Computes the logits, or the scores of a regression.
    ///
    /// # Shapes
    /// - `input_ids`, `token_type_ids`: `(b, t)` of u32; models without token types ignore
    ///   `token_type_ids`
    /// - `attention_mask`: `(b, t)` of u8, 1 on real tokens
    /// - output: `(b, num_labels)`, the head's dtype
    ///
    /// # Errors
    /// If shapes differ, or the sequence is longer than the model's.
    fn logits(
        &self,
        input_ids: &Tensor,
        token_type_ids: &Tensor,
        attention_mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<Tensor>;

    /// Sets whether training keeps only each layer's input and recomputes the layer in the backward pass
    /// ([`crate::ops::checkpoint`]). This saves memory and costs one more forward pass.
    fn set_checkpoint_layers(&mut self, on: bool);

    /// The number of outputs.
    fn num_labels(&self) -> usize;

    /// The id of the padding token.
    fn pad_id(&self) -> u32;
}

/// The configuration of a classifier of one architecture.
pub(crate) trait ClassifierConfig: Debug + Send + Sync {
    /// The number of token ids.
    fn vocab_size(&self) -> usize;

    /// The longest sequence that the model was trained on, in tokens.
    fn max_length(&self) -> usize;

    /// The most tokens that the model takes.
    fn longest(&self) -> usize {
        self.max_length()
    }

    /// The prefix of the tensor names of the model's body, without its dot.
    fn prefix(&self) -> &'static str;

    /// The tensors of the head that have one row per output.
    fn output_tensors(&self) -> &'static [&'static str] {
        &["classifier.weight", "classifier.bias"]
    }

    /// The padding token that a saved configuration names.
    fn saved_pad_id(&self) -> Option<u32>;

    /// Loads the model from `vb` and its task head from `head`.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    fn load(&self, vb: Weights<'_>, head: VarBuilder, noise: Noise) -> Result<Box<dyn SequenceClassifier>>;
}
