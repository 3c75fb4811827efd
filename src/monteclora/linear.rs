//! MonteCLoRA as a standalone layer.

use super::config::MonteCLoRAConfig;
use super::layer::MonteCLoRA;
use crate::adapter::{AdaptedLinear, BaseLinear, Params};
use crate::error::Result;

/// A frozen linear layer with a MonteCLoRA adapter.
///
/// `forward_t(xs, true)` makes a fresh draw at every call. `forward_t(xs, false)` computes the posterior mean
/// and is deterministic; [`mean`](AdaptedLinear::mean) offers it as a plain `Module`.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, Module, ModuleT};
/// use monteclora::{MonteCLoRAConfig, MonteCLoRALinear, Noise, Params, Pass};
///
/// let device = Device::Cpu;
/// let base = Linear::new(Tensor::ones((6, 4), DType::F32, &device)?, None);
/// let params = Params::new(Noise::new(0), &device);
/// let config = MonteCLoRAConfig { rank: 2, num_components: 3, ..Default::default() };
/// let layer = MonteCLoRALinear::new(base, &params, "proj", &config)?;
/// params.set("proj.default.b", &Tensor::ones((6, 2), DType::F32, &device)?)?; // it starts at zero
///
/// let xs = Tensor::ones((1, 4), DType::F32, &device)?;
/// let (one, two) = (layer.forward_t(&xs, true)?, layer.forward_t(&xs, true)?);
/// assert_ne!(one.to_vec2::<f32>()?, two.to_vec2::<f32>()?);
/// assert_eq!(layer.forward_t(&xs, false)?.to_vec2::<f32>()?, layer.mean().forward(&xs)?.to_vec2::<f32>()?);
/// // The first draw again:
/// let again = layer.forward_with(&xs, &Pass::Train { draw: 0 }.into())?;
/// assert_eq!(again.to_vec2::<f32>()?, one.to_vec2::<f32>()?);
/// # Ok::<(), monteclora::Error>(())
/// ```
pub type MonteCLoRALinear = AdaptedLinear<MonteCLoRA>;

impl AdaptedLinear<MonteCLoRA> {
    /// Wraps `base` and creates the parameters `{path}.default.a`, `.b`, `.std_prior` and
    /// `.expert_weights_prior`.
    ///
    /// # Errors
    /// As [`MonteCLoRA::new`].
    pub fn new(
        base: impl Into<BaseLinear>,
        params: &Params,
        path: &str,
        config: &MonteCLoRAConfig,
    ) -> Result<Self> {
        let base = base.into();
        let adapter = MonteCLoRA::new(params, path, "default", base.dims()?, config)?;
        Ok(Self::from_parts(base, adapter))
    }
}
