//! Access to the linear layers of a model.

use super::embedding::AdaptableEmbedding;
use super::interface::Adapter;
use super::linear::AdaptableLinear;
use crate::error::{Error, Result};

/// Access to all linear layers of a model. Injection, saving, loading, merging and counting are closures that
/// visit them. The trait also gives access to the word embedding, which prompt tuning adapts.
///
/// # Example
/// To make your own model adaptable, use [`AdaptableLinear`] for its linear layers and list them with
/// [`linears!`](crate::linears), which implements both visiting methods:
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
/// assert_eq!(params.trainable_count(), 2 * (4 + 8) + 2 + 3); // parameters of `up` alone
///
/// let xs = Tensor::ones((1, 4), DType::F32, &device)?;
/// let cx = Pass::Train { draw: 0 }.into();
/// let ys = model.down.forward(&model.up.forward(&xs, &cx)?, &cx)?;
/// assert_eq!(ys.dims(), [1, 4]);
/// # Ok::<(), monteclora::Error>(())
/// ```
pub trait AdaptableModel {
    /// The names of the layers that are adapted unless the user names others: the query, key and value
    /// projections, as in the paper. Difference: PEFT leaves the keys out. Empty by default: a model without
    /// default targets needs them named by the user, and a block of a model is not asked for them.
    fn default_targets(&self) -> &'static [&'static str] {
        &[]
    }

    /// Calls `f` on every layer, in the order of the model.
    ///
    /// # Errors
    /// The first error of `f`.
    fn visit_linears(&self, f: &mut dyn FnMut(&AdaptableLinear) -> Result<()>) -> Result<()>;

    /// Calls `f` on every layer, to change it in place.
    ///
    /// # Errors
    /// The first error of `f`.
    fn visit_linears_mut(&mut self, f: &mut dyn FnMut(&mut AdaptableLinear) -> Result<()>) -> Result<()>;

    /// Returns the word embedding, which virtual tokens can precede; `None` for a model without support for
    /// them.
    fn embedding_mut(&mut self) -> Option<&mut AdaptableEmbedding> {
        None
    }
}

/// Calls `f` on every layer's active adapter that is of the method `T`, in the order of the model; returns
/// their number.
///
/// # Errors
/// The first error of `f`.
pub fn visit_active<T: Adapter + 'static>(
    model: &dyn AdaptableModel,
    mut f: impl FnMut(&T) -> Result<()>,
) -> Result<usize> {
    let mut count = 0;
    model.visit_linears(&mut |layer| {
        let Some(adapter) = layer.active_as::<T>() else { return Ok(()) };
        count += 1;
        f(adapter)
    })?;
    Ok(count)
}

/// The error that a model has no active adapter of `method`.
pub(crate) fn no_active(method: &str) -> Error {
    Error::config("adapter", format!("no layer has an active {method} adapter"))
}

/// The error that the active adapter `name` of `layer` is not of `method`.
pub(crate) fn other_method(layer: &AdaptableLinear, name: &str, method: &str) -> Error {
    Error::config("adapter", format!("{name:?} of {} is no {method} adapter", layer.path()))
}
