//! The interface of models that classify a whole sequence.

use std::fmt::Debug;

use candle_core::Tensor;

use crate::adapter::{AdaptableModel, Context};

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
