//! A frozen linear layer with a MonteCLoRA adapter, for anyone's candle model.
//!
//! It needs nothing else of this crate: the layer counts its own draws.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;
use candle_nn::{Linear, Module, ModuleT};

use super::config::MonteCLoRAConfig;
use super::layer::MonteCLoRA;
use crate::adapters::low_rank;
use crate::error::Result;
use crate::params::Params;
use crate::slot::{Adapter, Pass};

/// A frozen linear layer with a MonteCLoRA adapter.
///
/// `forward_t(xs, true)` makes a fresh draw at every call; `forward_t(xs, false)` is the posterior
/// mean, deterministic. [`Self::mean`] is the latter as a plain `Module`.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, Module, ModuleT};
/// use monteclora::monteclora::{MonteCLoRAConfig, MonteCLoRALinear};
/// use monteclora::{noise::Noise, params::Params, slot::Pass};
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
/// let again = layer.forward_with(&xs, &Pass::Train { draw: 0 })?;
/// assert_eq!(again.to_vec2::<f32>()?, one.to_vec2::<f32>()?);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug)]
pub struct MonteCLoRALinear {
    base: Linear,
    adapter: MonteCLoRA,
    draws: AtomicU64,
}

impl MonteCLoRALinear {
    /// Wraps `base`; the parameters are `{path}.default.a`, `.b`, `.std_prior` and
    /// `.expert_weights_prior`.
    ///
    /// # Errors
    /// As [`MonteCLoRA::new`].
    pub fn new(base: Linear, params: &Params, path: &str, config: &MonteCLoRAConfig) -> Result<Self> {
        let adapter = MonteCLoRA::new(params, path, "default", low_rank::dims(&base)?, config)?;
        Ok(Self { base, adapter, draws: AtomicU64::new(0) })
    }

    /// The frozen layer.
    pub fn base(&self) -> &Linear {
        &self.base
    }

    /// The adapter.
    pub fn adapter(&self) -> &MonteCLoRA {
        &self.adapter
    }

    /// The same, to change it in place.
    pub fn adapter_mut(&mut self) -> &mut MonteCLoRA {
        &mut self.adapter
    }

    /// The index of the next draw of `forward_t(_, true)`.
    pub fn next_draw(&self) -> u64 {
        self.draws.load(Ordering::Relaxed)
    }

    /// Sets that index: a checkpoint keeps it.
    pub fn set_next_draw(&self, draw: u64) {
        self.draws.store(draw, Ordering::Relaxed);
    }

    /// The output in a given pass; changes no state.
    ///
    /// # Shapes
    /// - `xs`: `(.., in_dim)`
    /// - output: `(.., out_dim)`
    ///
    /// # Errors
    /// If shapes or dtypes do not fit.
    pub fn forward_with(&self, xs: &Tensor, pass: &Pass) -> candle_core::Result<Tensor> {
        self.adapter.forward(xs, &self.base, pass)
    }

    /// The view of the posterior mean, a plain `Module`.
    pub fn mean(&self) -> MonteCLoRAMean<'_> {
        MonteCLoRAMean(self)
    }
}

impl ModuleT for MonteCLoRALinear {
    fn forward_t(&self, xs: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let pass = match train {
            true => Pass::Train { draw: self.draws.fetch_add(1, Ordering::Relaxed) },
            false => Pass::Mean,
        };
        self.forward_with(xs, &pass)
    }
}

/// A [`MonteCLoRALinear`] at its posterior mean.
#[derive(Debug, Clone, Copy)]
pub struct MonteCLoRAMean<'a>(&'a MonteCLoRALinear);

impl Module for MonteCLoRAMean<'_> {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        self.0.forward_with(xs, &Pass::Mean)
    }
}
