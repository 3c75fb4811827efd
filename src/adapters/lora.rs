//! LoRA (Hu et al. 2021), as an adapter and as a standalone layer.
//!
//! ```text
//! y = W0 x + b + s B A dropout(x)
//! ```

use std::any::Any;
use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::adapter::{
    low_rank, visit_active, AdaptableModel, AdaptedLinear, Adapter, BaseLinear, Context, LowRank, Params,
    Prior, PriorStart, Role,
};
use crate::error::Result;
use crate::ops::{joined, Tape};

/// The options of a LoRA adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// The rank r of the update.
    pub rank: usize,
    /// The update is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Probability of dropping an input of the low-rank branch, in training.
    pub dropout: f64,
    /// Scale by `alpha / sqrt(rank)` instead (rsLoRA).
    pub use_rslora: bool,
    /// A prior on the update: LoRA is then trained to the maximum of the posterior (MAP) instead of the
    /// likelihood. The trainer adds it to the loss. It is saved in `monteclora.json`, since PEFT's file has
    /// no field for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prior: Option<Prior>,
}

impl Default for LoraConfig {
    /// The paper's RoBERTa setting.
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, dropout: 0.0, use_rslora: false, prior: None }
    }
}

impl LoraConfig {
    /// Checks every option.
    ///
    /// # Errors
    /// If one is outside its domain; the error names it.
    pub fn validate(&self) -> Result<()> {
        self.prior.map_or(Ok(()), |prior| prior.validate())?;
        low_rank::validate(self.rank, self.alpha, self.dropout)
    }
}

/// A LoRA adapter of one linear layer.
#[derive(Debug, Clone)]
pub struct Lora {
    pair: LowRank,
}

impl Lora {
    /// Creates the adapter's parameters `{path}.{adapter}.a` and `.b` in the store.
    ///
    /// # Errors
    /// If an option is outside its domain (rank 0 included), or a name is taken.
    pub fn new(
        params: &Params,
        path: &str,
        adapter: &str,
        (in_dim, out_dim): (usize, usize),
        config: &LoraConfig,
    ) -> Result<Self> {
        config.validate()?;
        let scale = low_rank::scaling(config.rank, config.alpha, config.use_rslora);
        let name = format!("{path}.{adapter}");
        let pair = LowRank::new(params, &name, (in_dim, out_dim), config.rank, scale, config.dropout)?;
        Ok(Self { pair })
    }

    /// A, B and their scale.
    pub fn low_rank(&self) -> &LowRank {
        &self.pair
    }
}

/// Computes the energy of a prior on every layer whose active adapter is LoRA, and on the task head: a
/// scalar, to be weighted by `temperature / n`. Returns `None` if no layer has an active LoRA adapter.
///
/// # Errors
/// If the prior is about the start of training and `start` is missing.
pub fn prior_energy(
    model: &dyn AdaptableModel,
    prior: &Prior,
    start: Option<&PriorStart>,
) -> Result<Option<Tensor>> {
    prior_energy_on(model, prior, start, None)
}

/// [`prior_energy`], differentiated by `tape` on a CUDA device.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
pub(crate) fn prior_energy_on(
    model: &dyn AdaptableModel,
    prior: &Prior,
    start: Option<&PriorStart>,
    tape: Option<&Tape>,
) -> Result<Option<Tensor>> {
    // Grouped by what layers must share to be computed in one batch.
    let mut groups: BTreeMap<String, Vec<LowRank>> = BTreeMap::new();
    visit_active(model, |Lora { pair }| {
        let key = format!("{:?} {:?} {:?}", pair.a().dims(), pair.b().dims(), pair.a().device().location());
        groups.entry(key).or_default().push(pair.clone());
        Ok(())
    })?;
    #[cfg(feature = "cuda")]
    if let Some(tape) = tape.filter(|_| !groups.is_empty()) {
        let layers = groups.values().flatten().map(|pair| (pair, None)).collect();
        if let Some(energy) = prior.energy_on_device(layers, start, tape)? {
            return Ok(Some(energy));
        }
    }
    let layers = groups.values().map(Vec::len).sum();
    let mut total = None;
    for group in groups.values() {
        let energy = prior.energy(&group.iter().collect::<Vec<_>>(), None, start, layers)?;
        total = Some(joined(total, energy)?);
    }
    match (total, prior.head_energy(start)?) {
        (Some(layers), Some(head)) => Ok(Some(joined(Some(layers), head)?)),
        (total, _) => Ok(total),
    }
}

impl Adapter for Lora {
    fn forward(&self, xs: &Tensor, base: &BaseLinear, cx: &Context) -> candle_core::Result<Tensor> {
        self.pair.forward(xs, base, self.pair.a(), cx)
    }

    fn parameters(&self) -> Vec<(Role, Tensor)> {
        vec![(Role::A, self.pair.a().clone()), (Role::B, self.pair.b().clone())]
    }

    fn delta(&self, _base: &BaseLinear, _cx: &Context) -> candle_core::Result<Option<Tensor>> {
        self.pair.delta().map(Some)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A frozen linear layer with a LoRA adapter, for use in any candle model.
///
/// `forward_t(xs, true)` applies dropout and counts its own draws; `forward_t(xs, false)` applies no dropout.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, ModuleT};
/// use monteclora::adapters::{LoraConfig, LoraLinear};
/// use monteclora::{Noise, Params};
///
/// let device = Device::Cpu;
/// let base = Linear::new(Tensor::ones((6, 4), DType::F32, &device)?, None);
/// let params = Params::new(Noise::new(0), &device);
/// let config = LoraConfig { rank: 2, ..Default::default() };
/// let layer = LoraLinear::new(base, &params, "proj", &config)?;
/// let ys = layer.forward_t(&Tensor::ones((1, 4), DType::F32, &device)?, true)?;
/// assert_eq!(ys.to_vec2::<f32>()?, [[4.0; 6]]); // B is zero at the start
/// assert_eq!(params.trainable_count(), 2 * (4 + 6));
/// # Ok::<(), monteclora::Error>(())
/// ```
pub type LoraLinear = AdaptedLinear<Lora>;

impl AdaptedLinear<Lora> {
    /// Wraps `base`; the parameters are `{path}.default.a` and `.b`.
    ///
    /// # Errors
    /// As [`Lora::new`].
    pub fn new(
        base: impl Into<BaseLinear>,
        params: &Params,
        path: &str,
        config: &LoraConfig,
    ) -> Result<Self> {
        let base = base.into();
        let adapter = Lora::new(params, path, "default", base.dims()?, config)?;
        Ok(Self::from_parts(base, adapter))
    }
}
