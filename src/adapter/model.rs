//! The one walk over a model.

use super::embedding::AdaptableEmbedding;
use super::linear::AdaptableLinear;
use crate::error::Result;

/// The one walk over a model's linear layers. Injection, saving, loading, merging and counting
/// are closures over it. Beside them, the place for what sits on no linear layer.
pub trait AdaptableModel {
    /// The names of the layers that are adapted unless the user names others: the projections to
    /// queries, keys and values, as in the paper. Difference: PEFT leaves the keys out.
    fn default_targets(&self) -> &'static [&'static str];

    /// Calls `f` on every slot, in the model's own order.
    ///
    /// # Errors
    /// The first error of `f`.
    fn visit_linears(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()>;

    /// Calls `f` on every slot, to change it in place.
    ///
    /// # Errors
    /// The first error of `f`.
    fn visit_linears_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()>;

    /// The word embedding, before which virtual tokens can stand; None of a model that has no such place.
    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        None
    }
}
