//! What every model that classifies a whole sequence offers.

use std::fmt::Debug;

use candle_core::Tensor;

use crate::adapter::{AdaptableModel, Context};

/// A model with a head that classifies or scores a whole sequence. One of them serves any number of threads: a
/// forward pass changes no state.
pub trait SequenceClassifier: AdaptableModel + Debug + Send + Sync {
    /// The logits, or the scores of a regression.
    ///
    /// # Shapes
    /// - `input_ids`, `token_type_ids`: `(b, t)` of u32; token types are left aside by models
    ///   that have none
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

    /// Whether training keeps each layer's input alone and computes the layer again in backward
    /// ([`crate::ops::checkpoint`]): less memory for one more forward pass.
    fn set_checkpoint_layers(&mut self, on: bool);

    /// The number of outputs.
    fn num_labels(&self) -> usize;

    /// The id that fills a batch.
    fn pad_id(&self) -> u32;
}
