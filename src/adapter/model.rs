//! The one walk over a model.

use super::embedding::AdaptableEmbedding;
use super::linear::AdaptableLinear;
use crate::error::Result;

/// The one walk over a model's linear layers. Injection, saving, loading, merging and counting
/// are closures over it. Beside them, the place for what sits on no linear layer.
///
/// # Example
/// A model of one's own is adaptable when its linears are [`AdaptableLinear`]s and it walks over them, in both
/// forms by [`linears!`](crate::linears):
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Linear;
/// use monteclora::inject::{self, Targets};
/// use monteclora::{linears, AdaptableLinear, AdaptableModel, MonteCLoRAConfig, Noise, Params, Pass};
///
/// struct Block {
///     up: AdaptableLinear,
///     down: AdaptableLinear,
/// }
///
/// impl AdaptableModel for Block {
///     fn default_targets(&self) -> &'static [&'static str] {
///         &["up"]
///     }
///     linears!(up, down);
/// }
///
/// let (device, params) = (Device::Cpu, Params::new(Noise::new(1), &Device::Cpu));
/// let linear = |rows, columns| Tensor::ones((rows, columns), DType::F32, &device).map(|w| Linear::new(w, None));
/// let mut model = Block {
///     up: AdaptableLinear::new("block.up", linear(8, 4)?),
///     down: AdaptableLinear::new("block.down", linear(4, 8)?),
/// };
/// let config = MonteCLoRAConfig { rank: 2, num_components: 3, ..Default::default() };
/// inject::monteclora(&mut model, &Targets::default(), &config, &params)?;
/// assert_eq!(params.trainable_count(), 2 * (4 + 8) + 2 + 3); // of `up` alone
///
/// let xs = Tensor::ones((1, 4), DType::F32, &device)?;
/// let cx = Pass::Train { draw: 0 }.into();
/// let ys = model.down.forward(&model.up.forward(&xs, &cx)?, &cx)?;
/// assert_eq!(ys.dims(), [1, 4]);
/// # Ok::<(), monteclora::Error>(())
/// ```
pub trait AdaptableModel {
    /// The names of the layers that are adapted unless the user names others: the projections to
    /// queries, keys and values, as in the paper. Difference: PEFT leaves the keys out. None by default: a
    /// model without them wants its targets named, a block of a model is asked for none.
    fn default_targets(&self) -> &'static [&'static str] {
        &[]
    }

    /// Calls `f` on every layer, in the model's own order.
    ///
    /// # Errors
    /// The first error of `f`.
    fn visit_linears(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()>;

    /// Calls `f` on every layer, to change it in place.
    ///
    /// # Errors
    /// The first error of `f`.
    fn visit_linears_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()>;

    /// The word embedding, before which virtual tokens can stand; None of a model that has no such place.
    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        None
    }
}
