//! Everything a forward pass depends on besides its input.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor, TensorId};

use super::pass::Pass;
use super::pass_cache::PassCache;
use super::probe::Probe;
use crate::ops::{OpPath, Tape};
use crate::util::check::positive;

/// The settings of one forward pass: the [`Pass`], the implementation of the operations, the factors on the
/// perturbation's scale, cached draws, a probe for non-finite values. Cheap to clone; clones share state.
///
/// A [`Pass`] alone is enough for most callers: `&pass.into()`.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Linear;
/// use monteclora::ops::OpPath;
/// use monteclora::{Context, DrawCache, MonteCLoRAConfig, MonteCLoRALinear, Noise, Params, Pass};
///
/// let device = Device::Cpu;
/// let base = Linear::new(Tensor::ones((6, 4), DType::F32, &device)?, None);
/// let params = Params::new(Noise::new(0), &device);
/// let config = MonteCLoRAConfig { rank: 2, ..Default::default() };
/// let layer = MonteCLoRALinear::new(base, &params, "proj", &config)?;
/// params.set("proj.default.b", &Tensor::ones((6, 2), DType::F32, &device)?)?;
/// let xs = Tensor::ones((1, 4), DType::F32, &device)?;
///
/// // Posterior draw 3, made once for all batches of a prediction.
/// let draws = DrawCache::default();
/// let predict = Context::from(Pass::Posterior { draw: 3 }).with_draws(&draws);
/// let one = layer.forward_with(&xs, &predict)?.to_vec2::<f32>()?;
/// assert_eq!(one, layer.forward_with(&xs, &predict)?.to_vec2::<f32>()?);
/// // The same with the composed operations, which run on devices without fused kernels.
/// let composed = layer.forward_with(&xs, &predict.with_path(OpPath::Composed))?.to_vec2::<f32>()?;
/// assert!((one[0][0] - composed[0][0]).abs() < 1e-5);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Context {
    /// Which weights to use.
    pub pass: Pass,
    /// Which implementation of the operations to use.
    pub path: OpPath,
    /// Factors on the scale of the perturbations in training draws.
    pub scaler_factors: ScalerFactors,
    /// Keeps the posterior draws of a prediction, if set.
    pub draws: Option<DrawCache>,
    /// Checks each layer's output for NaN and infinity, if set.
    pub(crate) probe: Option<Probe>,
    /// Whether quantised layers may use the kernels for few rows, which have no gradient.
    pub(crate) only_predicts: bool,
    /// Whether no gradient is needed, so that each layer of a model returns a detached output.
    values_only: bool,
    /// Collects the backward steps that are taken for all layers at once, if set.
    tape: Option<Tape>,
    /// Shares results between the layers within one forward pass of a model, if set.
    pass_cache: Option<PassCache>,
}

impl From<Pass> for Context {
    fn from(pass: Pass) -> Self {
        let (path, scaler_factors) = (OpPath::Fused, ScalerFactors::default());
        Self {
            pass,
            path,
            scaler_factors,
            draws: None,
            probe: None,
            only_predicts: false,
            values_only: false,
            tape: None,
            pass_cache: None,
        }
    }
}

impl From<&Pass> for Context {
    fn from(pass: &Pass) -> Self {
        (*pass).into()
    }
}

impl From<&Context> for Context {
    fn from(cx: &Context) -> Self {
        cx.clone()
    }
}

impl Context {
    /// Replaces the pass.
    pub fn with_pass(self, pass: Pass) -> Self {
        Self { pass, ..self }
    }

    /// Replaces the implementation of the operations.
    pub fn with_path(self, path: OpPath) -> Self {
        Self { path, ..self }
    }

    /// Keeps posterior draws in `draws`.
    pub fn with_draws(self, draws: &DrawCache) -> Self {
        Self { draws: Some(draws.clone()), ..self }
    }

    /// Returns the weight of this pass: `mean`, or what `make` returns for the index of the draw and `eps`, the
    /// scale of the perturbation, with its sign. A posterior draw is kept if the context keeps draws.
    pub(crate) fn drawn<'a>(
        &self,
        mean: &'a Tensor,
        eps: f64,
        make: impl FnOnce(u64, f64) -> Result<Tensor>,
    ) -> Result<Cow<'a, Tensor>> {
        let Some(draw) = self.pass.posterior_draw()? else { return Ok(Cow::Borrowed(mean)) };
        let eps = eps * self.pass.sign();
        Ok(Cow::Owned(match (&self.pass, &self.draws) {
            (Pass::Posterior { .. }, Some(kept)) => {
                kept.get((mean, draw, eps, self.path), || make(draw, eps))?
            }
            _ => make(draw, eps)?,
        }))
    }

    /// Replaces the factors on the scale of the perturbations.
    pub fn with_scaler_factors(self, scaler_factors: ScalerFactors) -> Self {
        Self { scaler_factors, ..self }
    }

    /// Checks every layer's output with `probe`.
    pub fn with_probe(self, probe: &Probe) -> Self {
        Self { probe: Some(probe.clone()), ..self }
    }

    /// A context for inference: the output of each layer of a model is detached, so that only one layer's
    /// activations are in memory, not those of all layers as in training. Values do not change.
    pub fn without_gradient(self) -> Self {
        Self { values_only: true, ..self }
    }

    /// [`Self::without_gradient`] for text generation: quantised layers compute few rows with the faster
    /// kernels of [`ops::quantized_linear`](crate::ops::quantized_linear), which round the input.
    pub fn only_to_predict(self) -> Self {
        Self { only_predicts: true, ..self.without_gradient() }
    }

    /// Whether the output may be differentiated.
    #[cfg_attr(not(feature = "models"), allow(dead_code))]
    pub(crate) fn is_differentiated(&self) -> bool {
        !self.values_only
    }

    /// Returns a layer's output as the next layer of the model receives it: detached if no gradient is
    /// needed.
    #[cfg_attr(not(feature = "models"), allow(dead_code))]
    pub(crate) fn handed_on(&self, xs: Tensor) -> Tensor {
        match self.values_only {
            true => xs.detach(),
            false => xs,
        }
    }

    /// For a loss that [`Gradients::backward`](crate::optim::Gradients::backward) differentiates together
    /// with `tape`.
    pub fn with_tape(self, tape: &Tape) -> Self {
        Self { tape: Some(tape.clone()), ..self }
    }

    /// For a loss that candle differentiates alone, such as a block that is recomputed for its gradient.
    pub fn without_tape(self) -> Self {
        Self { tape: None, ..self }
    }

    /// The tape of the pass, if any.
    pub(crate) fn tape(&self) -> Option<&Tape> {
        self.tape.as_ref()
    }

    /// Returns the context for one forward pass of a model, in which layers share what they compute together.
    /// Within such a pass, returns the context unchanged. A model calls this at the start of its forward pass
    /// and uses the result for that pass only, so that nothing computed from old parameter values is kept.
    pub fn of_one_pass(&self) -> Cow<'_, Self> {
        match self.pass_cache {
            Some(_) => Cow::Borrowed(self),
            None => Cow::Owned(Self { pass_cache: Some(PassCache::default()), ..self.clone() }),
        }
    }

    /// What the layers of a model share within one forward pass; `None` for a layer that runs by itself.
    pub(crate) fn pass_cache(&self) -> Option<&PassCache> {
        self.pass_cache.as_ref()
    }
}

/// Factors on the perturbation's scale eps, by layer. A schedule changes them between two steps; they apply
/// in [`Pass::Train`] only.
#[derive(Debug, Clone, PartialEq)]
pub struct ScalerFactors {
    common: f64,
    by_layer: Arc<BTreeMap<String, f64>>,
}

impl Default for ScalerFactors {
    fn default() -> Self {
        Self { common: 1.0, by_layer: Arc::default() }
    }
}

impl ScalerFactors {
    /// Creates factors from those in `by_layer`, keyed by adapter name (`{path}.{adapter}`), and `common` for
    /// all other layers.
    ///
    /// # Errors
    /// Unless every factor is positive and finite.
    pub fn new(common: f64, by_layer: BTreeMap<String, f64>) -> crate::Result<Self> {
        [&common].into_iter().chain(by_layer.values()).try_for_each(|f| positive("scaler_factors", *f))?;
        Ok(Self { common, by_layer: Arc::new(by_layer) })
    }

    /// The factor of the adapter with this name.
    pub fn of(&self, adapter: &str) -> f64 {
        self.by_layer.get(adapter).copied().unwrap_or(self.common)
    }
}

/// A cache of posterior draws for the duration of a prediction: `r x in_dim` numbers per layer and draw.
///
/// A posterior draw has the same weights for every batch of an evaluation and every token of a text.
/// Recomputing it each time gives the same numbers, but costs more than the layer itself where a batch is a
/// single token. Cached draws carry no gradient and do not follow later changes of the parameters: use a
/// cache for prediction only.
#[derive(Debug, Clone, Default)]
pub struct DrawCache {
    kept: Arc<Mutex<HashMap<DrawKey, Tensor>>>,
}

/// What a cached A depends on besides the parameters' values: the layer (the id of its mean), the draw, the
/// bits of eps, and the implementation that computed it.
type DrawKey = (TensorId, u64, u64, OpPath);

impl DrawCache {
    /// Returns the cached tensor for this draw of the layer with this mean, at `eps` on `path`, or caches
    /// what `make` returns.
    fn get(
        &self,
        (mean, draw, eps, path): (&Tensor, u64, f64, OpPath),
        make: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let key = (mean.id(), draw, eps.to_bits(), path);
        // The lock is not held while `make` runs, so that other threads can use the cache. A panic leaves the
        // map whole.
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tensor) = lock().get(&key) {
            return Ok(tensor.clone());
        }
        let tensor = make()?.detach();
        lock().insert(key, tensor.clone());
        Ok(tensor)
    }
}
