//! The interface that a fine-tuning method implements for one linear layer.

use std::any::Any;

use candle_core::Tensor;

use super::base::BaseLinear;
use super::context::Context;
use super::params::Role;

/// A method's change to one linear layer. The forward pass alters no state.
pub trait Adapter: Send + Sync + std::fmt::Debug {
    /// Computes the adapted layer's output.
    ///
    /// # Shapes
    /// - `xs`: `(.., in_dim)`, any float dtype
    /// - output: `(.., out_dim)`, the dtype of `xs`
    ///
    /// # Errors
    /// If shapes or dtypes do not fit the base.
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor>;

    /// Returns the trainable tensors with their roles.
    fn parameters(&self) -> Vec<(Role, Tensor)>;

    /// Returns the change of the weight of `base` that the adapter makes in this context's pass, without
    /// dropout: `(out_dim, in_dim)`, in the adapter's dtype or a wider one. Returns `None` if the method is
    /// not a change of the weight. A method without a posterior has the same change in every pass.
    ///
    /// # Errors
    /// If candle fails.
    fn delta(&self, base: &BaseLinear, cx: &Context) -> candle_core::Result<Option<Tensor>>;

    /// Returns the concrete method, for code that depends on it (the regulariser, file formats).
    fn as_any(&self) -> &dyn Any;
}
