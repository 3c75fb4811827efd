//! What a method is to a linear layer.

use std::any::Any;

use candle_core::Tensor;

use super::base::BaseLinear;
use super::context::Context;
use super::params::Role;

/// A method's change to one linear layer. Its forward is pure: it alters no state.
pub trait Adapter: Send + Sync + std::fmt::Debug {
    /// The adapted layer's output.
    ///
    /// # Shapes
    /// - `xs`: `(.., in_dim)`, any float dtype
    /// - output: `(.., out_dim)`, the dtype of `xs`
    ///
    /// # Errors
    /// If shapes or dtypes do not fit the base.
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor>;

    /// The trainable tensors, by role.
    fn parameters(&self) -> Vec<(Role, Tensor)>;

    /// The change of the weight of `base` that the adapter amounts to in this context's pass, without dropout:
    /// `(out_dim, in_dim)` in the adapter's dtype at least, where there is one. A method without a posterior has
    /// one change for all passes.
    ///
    /// # Errors
    /// If candle fails.
    fn delta(&self, base: &BaseLinear, cx: &Context) -> candle_core::Result<Option<Tensor>>;

    /// The concrete method, for those that know it (the regulariser, files).
    fn as_any(&self) -> &dyn Any;
}
