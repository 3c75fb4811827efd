//! An adapter file in memory, independent of any model, and its validation.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::config::PeftConfig;
use super::keys::{self, TensorKind};
use super::method::AdapterMethod;
use crate::adapter::Prior;
#[cfg(feature = "models")]
use crate::adapter::{Params, Role};
use crate::error::{Error, Result};
use crate::labels::Labels;
use crate::monteclora::MonteCLoRAConfig;
use crate::util::finite::first_non_finite;

/// The name of the configuration file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The name of the weights file.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The name of the file with this crate's data beyond PEFT's format.
pub const OWN_FILE: &str = "monteclora.json";

/// The contents of an adapter's files.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    /// The configuration.
    pub config: PeftConfig,
    /// The adapted layers by their Hugging Face path.
    pub layers: BTreeMap<String, LayerTensors>,
    /// The tensors of modules that are saved whole (a task head), by their name in the model, such
    /// as `classifier.dense.weight`.
    pub saved_modules: BTreeMap<String, Tensor>,
    /// The settings of a MonteCLoRA adapter beyond PEFT's six fields, stored in `monteclora.json`. Where the
    /// two files disagree, PEFT's counts.
    pub monteclora: Option<MonteCLoRAConfig>,
    /// The prior that a LoRA adapter was trained with, stored in `monteclora.json`.
    pub prior: Option<Prior>,
    /// The class names of the saved head, in the order of its rows, if known; stored in `monteclora.json`,
    /// because PEFT's format has no place for them.
    pub labels: Option<Labels>,
}

/// The tensors of one adapted layer, in single precision.
///
/// # Shapes
/// - `a`: `(rank, in_dim)`
/// - `b`: `(out_dim, rank)`
#[derive(Debug, Clone)]
pub struct LayerTensors {
    /// The down-projection, unscaled.
    pub a: Tensor,
    /// The up-projection, unscaled.
    pub b: Tensor,
    /// MonteCLoRA's variational parameters, if the adapter has them.
    pub sampler: Option<SamplerTensors>,
}

/// The tensors of PEFT's MonteCLoRA sampler. The first two are trained; the others are buffers
/// that PEFT overwrites at each training step.
///
/// # Shapes
/// - `std_prior`: `(rank)`; `expert_weights_prior`, `expert_weights`: `(components)`
/// - `gaussian_var_prior`: `(rank, rank)`
#[derive(Debug, Clone)]
pub struct SamplerTensors {
    /// The logarithm of the standard deviations, rho.
    pub std_prior: Tensor,
    /// The logarithm of the Dirichlet concentration, c.
    pub expert_weights_prior: Tensor,
    /// The last draw of the mixture weights.
    pub expert_weights: Tensor,
    /// The last draw of the covariance.
    pub gaussian_var_prior: Tensor,
}

impl SamplerTensors {
    /// Creates the sampler tensors from the trained ones; the buffers get PEFT's initial values: equal
    /// weights, unit covariance.
    ///
    /// # Errors
    /// If a tensor is not a vector.
    pub fn new(std_prior: Tensor, expert_weights_prior: Tensor) -> Result<Self> {
        let (rank, components) = (std_prior.dims1()?, expert_weights_prior.dims1()?);
        let weights = Tensor::full(1f32 / components as f32, components, &Device::Cpu)?;
        let variance = Tensor::eye(rank, DType::F32, &Device::Cpu)?;
        Ok(Self { std_prior, expert_weights_prior, expert_weights: weights, gaussian_var_prior: variance })
    }
}

impl LayerTensors {
    pub(super) fn tensor(&self, kind: TensorKind) -> Option<&Tensor> {
        let sampler = self.sampler.as_ref();
        match kind {
            TensorKind::A => Some(&self.a),
            TensorKind::B => Some(&self.b),
            TensorKind::StdPrior => sampler.map(|s| &s.std_prior),
            TensorKind::ExpertWeightsPrior => sampler.map(|s| &s.expert_weights_prior),
            TensorKind::ExpertWeights => sampler.map(|s| &s.expert_weights),
            TensorKind::GaussianVarPrior => sampler.map(|s| &s.gaussian_var_prior),
        }
    }
}

impl AdapterFile {
    /// Checks the tensors against the configuration: that each layer is a target, that ranks and the number
    /// of components agree, that every value is finite, and that the saved modules are those that the
    /// configuration lists. Also validates this crate's own settings.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the tensor's name on disk, or [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        self.config.check().map_err(|reason| Error::config("adapter configuration", reason))?;
        if let (Some(own), AdapterMethod::MonteCLoRA(used)) = (&self.monteclora, self.method()) {
            let valid = own.validate().and_then(|()| used.validate());
            valid.map_err(|error| Error::config(OWN_FILE, error.to_string()))?;
        }
        if self.layers.is_empty() {
            return Err(Error::config("adapter", "it adapts no layer"));
        }
        let paths: Vec<&str> = self.layers.keys().map(String::as_str).collect();
        let (targets, ranks) = (self.config.are_targets(&paths)?, self.config.ranks_of(&paths)?);
        // Not needed here, but a malformed pattern is reported with the file.
        self.config.alphas_of(&paths)?;
        for (((path, layer), is_target), rank) in self.layers.iter().zip(targets).zip(ranks) {
            if !is_target {
                return Err(Error::tensor(
                    TensorKind::A.key(path),
                    "target_modules does not name this layer",
                ));
            }
            self.check_layer(path, layer, rank)?;
        }
        let modules: Vec<&str> = self.saved_modules.keys().map(|name| keys::module(name)).collect();
        for ((name, tensor), is_saved) in self.saved_modules.iter().zip(self.config.are_saved(&modules)?) {
            if keys::module(name).is_empty() || !is_saved {
                return Err(Error::tensor(name, "modules_to_save does not name it"));
            }
            check_finite(&format!("{}{name}", keys::PREFIX), tensor)?;
        }
        let lists = self.config.modules_to_save.as_ref().filter(|modules| !modules.is_empty());
        match lists {
            Some(modules) if self.saved_modules.is_empty() => {
                let reason =
                    format!("there is no tensor of {}, which the configuration lists", modules.join(", "));
                Err(Error::config("modules_to_save", reason))
            }
            _ => Ok(()),
        }
    }

    /// The head parameters that are missing from the file, if it contains others.
    #[cfg(feature = "models")]
    pub(super) fn of_the_base(&self, params: &Params) -> Vec<String> {
        let heads = params.of_role(Role::Head).into_iter();
        let heads = heads.map(|(name, _)| name).filter(|name| !self.saved_modules.contains_key(name));
        heads.filter(|_| !self.saved_modules.is_empty()).collect()
    }

    /// Describes settings without effect, one sentence each: rank patterns, alpha patterns and target names
    /// that match no layer, and modules to save without a tensor. [`Self::apply`] logs them as warnings
    /// (`tracing`).
    ///
    /// # Errors
    /// If a pattern is not a valid regular expression.
    pub fn warnings(&self) -> Result<Vec<String>> {
        let paths: Vec<&str> = self.layers.keys().map(String::as_str).collect();
        let modules: Vec<&str> = self.saved_modules.keys().map(|name| keys::module(name)).collect();
        self.config.without_effect(&paths, &modules)
    }

    /// The adapter without the head of its task, for another one.
    pub fn without_head(mut self) -> Self {
        self.saved_modules.clear();
        self.labels = None;
        self.config.modules_to_save = None;
        self.config.task_type = None;
        self
    }

    /// The method of the file's layers, with PEFT's settings and, if this crate wrote the file, its own.
    ///
    /// An adapter that PEFT wrote gets [`MonteCLoRAConfig::peft`], the distribution it was trained with.
    pub fn method(&self) -> AdapterMethod {
        AdapterMethod::from_peft(&self.config, self.monteclora.as_ref(), self.prior)
    }

    fn check_layer(&self, path: &str, layer: &LayerTensors, rank: usize) -> Result<()> {
        let components = match (&self.config.monteclora_config, &layer.sampler) {
            (Some(fields), Some(_)) => fields.num_samples,
            (None, None) => 0,
            (Some(_), None) => {
                let reason = "it is missing, although the configuration has a monteclora_config";
                return Err(Error::tensor(TensorKind::StdPrior.key(path), reason));
            }
            (None, Some(_)) => {
                let reason = "it is there, although the configuration has no monteclora_config";
                return Err(Error::tensor(TensorKind::StdPrior.key(path), reason));
            }
        };
        for kind in TensorKind::ALL {
            let Some(tensor) = layer.tensor(kind) else { continue };
            let key = kind.key(path);
            let (fits, expected) = match (kind, tensor.dims()) {
                (TensorKind::A, dims) => {
                    (matches!(dims, [r, n] if *r == rank && *n > 0), format!("({rank}, in_dim)"))
                }
                (TensorKind::B, dims) => {
                    (matches!(dims, [n, r] if *r == rank && *n > 0), format!("(out_dim, {rank})"))
                }
                (TensorKind::StdPrior, dims) => (dims == [rank], format!("({rank})")),
                (TensorKind::GaussianVarPrior, dims) => (dims == [rank, rank], format!("({rank}, {rank})")),
                (TensorKind::ExpertWeightsPrior | TensorKind::ExpertWeights, dims) => {
                    (dims == [components], format!("({components})"))
                }
            };
            if !fits {
                return Err(Error::tensor(
                    key,
                    format!("expected shape {expected}, got {:?}", tensor.dims()),
                ));
            }
            check_finite(&key, tensor)?;
        }
        Ok(())
    }
}

/// Checks that every value of `tensor` is finite.
fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    match first_non_finite(tensor)? {
        Some((at, value)) => Err(Error::tensor(name, format!("value {at} is {value}"))),
        None => Ok(()),
    }
}
