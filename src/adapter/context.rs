//! What a forward pass is told beside its input, as one value: forward reads nothing else.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor, TensorId};

use super::pass::Pass;
use super::probe::Probe;
use super::together::Together;
use crate::ops::{OpPath, Tape};
use crate::util::check::positive;

/// A pass, and what it carries through the model: how operations run, the course of the
/// perturbation's scale, what a prediction keeps, who watches. Cheap to clone; clones share.
///
/// Most callers have a [`Pass`] alone: `&pass.into()`.
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
/// // Draw 3 of the posterior, made once for all batches of a prediction.
/// let draws = DrawCache::default();
/// let predict = Context::from(Pass::Posterior { draw: 3 }).with_draws(&draws);
/// let one = layer.forward_with(&xs, &predict)?.to_vec2::<f32>()?;
/// assert_eq!(one, layer.forward_with(&xs, &predict)?.to_vec2::<f32>()?);
/// // The same on the path that a device without kernels of ours takes.
/// let composed = layer.forward_with(&xs, &predict.with_path(OpPath::Composed))?.to_vec2::<f32>()?;
/// assert!((one[0][0] - composed[0][0]).abs() < 1e-5);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Context {
    /// Which weights.
    pub pass: Pass,
    /// Which implementation of the operations.
    pub path: OpPath,
    /// Factors on the scale of perturbations in training draws.
    pub scaler_factors: ScalerFactors,
    /// Draws that are made once and kept; none where absent.
    pub draws: Option<DrawCache>,
    /// Who is told of layers' outputs; nobody where absent.
    pub(crate) probe: Option<Probe>,
    /// Whether quantised layers may take kernels for few rows, which nothing differentiates.
    pub(crate) only_predicts: bool,
    /// Whether nobody differentiates what comes out, so that a model's layers hand on values alone.
    values_only: bool,
    /// What they leave to be differentiated together; nothing where absent.
    tape: Option<Tape>,
    /// What layers make for each other, within one forward pass of a model.
    together: Option<Together>,
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
            together: None,
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
    /// The same in another pass.
    pub fn with_pass(self, pass: Pass) -> Self {
        Self { pass, ..self }
    }

    /// The same with operations on another path.
    pub fn with_path(self, path: OpPath) -> Self {
        Self { path, ..self }
    }

    /// The same with posterior draws kept in `draws`.
    pub fn with_draws(self, draws: &DrawCache) -> Self {
        Self { draws: Some(draws.clone()), ..self }
    }

    /// The same with other factors on the scale of perturbations.
    pub fn with_scaler_factors(self, scaler_factors: ScalerFactors) -> Self {
        Self { scaler_factors, ..self }
    }

    /// The same with `probe` told of every layer's output.
    pub fn with_probe(self, probe: &Probe) -> Self {
        Self { probe: Some(probe.clone()), ..self }
    }

    /// The same where nobody differentiates what comes out: each layer of a model hands on values without what they were
    /// computed from, so that a pass keeps the activations of one layer in memory and not those of all, as training must.
    /// The values are the same.
    pub fn without_gradient(self) -> Self {
        Self { values_only: true, ..self }
    }

    /// [`Self::without_gradient`] for a text that is generated: few rows of a quantised layer take the kernels of
    /// [`ops::quantized_linear`](crate::ops::quantized_linear), which round them.
    pub fn only_to_predict(self) -> Self {
        Self { only_predicts: true, ..self.without_gradient() }
    }

    /// Whether what comes out may be differentiated.
    #[cfg_attr(not(feature = "models"), allow(dead_code))]
    pub(crate) fn is_differentiated(&self) -> bool {
        !self.values_only
    }

    /// What a layer of a model hands on to the next.
    #[cfg_attr(not(feature = "models"), allow(dead_code))]
    pub(crate) fn handed_on(&self, xs: Tensor) -> Tensor {
        match self.values_only {
            true => xs.detach(),
            false => xs,
        }
    }

    /// The same for a loss that [`Gradients::backward`](crate::optim::Gradients::backward) differentiates with `tape`.
    pub fn with_tape(self, tape: &Tape) -> Self {
        Self { tape: Some(tape.clone()), ..self }
    }

    /// The same for a loss that is differentiated by candle alone, as a block is that is computed again for its gradient.
    pub fn without_tape(self) -> Self {
        Self { tape: None, ..self }
    }

    /// What is left to be differentiated together.
    pub(crate) fn tape(&self) -> Option<&Tape> {
        self.tape.as_ref()
    }

    /// The context of one forward pass of a model, which begins here unless it has begun: its layers may make together
    /// what they need. Models call this where they begin, and hand it to nobody else, so that what was made from the
    /// parameters' values is gone before they change.
    #[cfg_attr(not(feature = "models"), allow(dead_code))]
    pub(crate) fn of_one_pass(&self) -> Cow<'_, Self> {
        match self.together {
            Some(_) => Cow::Borrowed(self),
            None => Cow::Owned(Self { together: Some(Together::default()), ..self.clone() }),
        }
    }

    /// What layers make for each other; none where a layer runs by itself.
    pub(crate) fn together(&self) -> Option<&Together> {
        self.together.as_ref()
    }
}

/// Factors on the scale eps of the perturbation, by layer. A schedule sets them between two steps; they
/// count in [`Pass::Train`] alone.
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
    /// The factor `common` of every layer but those in `by_layer`, by the adapter's name
    /// (`{path}.{adapter}`).
    ///
    /// # Errors
    /// Unless every factor is positive and finite.
    pub fn new(common: f64, by_layer: BTreeMap<String, f64>) -> crate::Result<Self> {
        [&common].into_iter().chain(by_layer.values()).try_for_each(|f| positive("scaler_factors", *f))?;
        Ok(Self { common, by_layer: Arc::new(by_layer) })
    }

    /// The factor of the adapter of this name.
    pub fn of(&self, adapter: &str) -> f64 {
        self.by_layer.get(adapter).copied().unwrap_or(self.common)
    }
}

/// Posterior draws that are kept while a prediction lasts: `r x in_dim` numbers for each layer and draw.
///
/// A draw of the posterior is the same weights for every batch of an evaluation and every token of a
/// text. Making it anew each time changes no number but costs more than the layer itself where one
/// token is a batch. What is kept carries no gradient and does not see later changes of the
/// parameters: it is for prediction.
#[derive(Debug, Clone, Default)]
pub struct DrawCache {
    kept: Arc<Mutex<HashMap<DrawKey, Tensor>>>,
}

/// What a kept A depends on beside the parameters' values: its layer (the mean's identity), the draw, the
/// bits of eps, the path it was made on.
type DrawKey = (TensorId, u64, u64, OpPath);

impl DrawCache {
    /// The tensor that `make` gives for the draw of a layer with this mean, at `eps` on `path`, made once.
    pub(crate) fn get(
        &self,
        (mean, draw, eps, path): (&Tensor, u64, f64, OpPath),
        make: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let key = (mean.id(), draw, eps.to_bits(), path);
        // Not held while the draw is made: a panic leaves the map whole, and others may ask.
        let lock = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tensor) = lock().get(&key) {
            return Ok(tensor.clone());
        }
        let tensor = make()?.detach();
        lock().insert(key, tensor.clone());
        Ok(tensor)
    }
}
