//! Copies an adapter out of a model, and loads one into a model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::adapter::{AdapterFile, LayerTensors, SamplerTensors};
use super::config::TargetModules;
use super::keys::{self, TensorKind};
use super::method::AdapterMethod;
use super::renamed;
use super::task_type::TaskType;
use crate::adapter::{AdaptableLinear, AdaptableModel, Adapter, LowRank, Params, Role};
use crate::adapters::{Lora, LoraConfig};
use crate::error::{Error, Result};
use crate::inject::activate::{self, check_unmerged};
use crate::inject::{self, TargetLayer};
use crate::labels::Labels;
use crate::monteclora::{DrawGroup, MonteCLoRA, MonteCLoRAConfig};

/// The base model and the task of an adapter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterMetadata {
    /// The base model: a hub repository or a folder.
    pub base_model: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
    /// The task.
    pub task: Option<TaskType>,
    /// The class names of a task head, in the order of its rows.
    pub labels: Option<Labels>,
}

impl AdapterFile {
    /// Copies the adapter named `adapter` out of a model, with the trained head in `params`; later training
    /// does not change the copy. `method` is the one the layers were made with; a layer with a different rank
    /// or scale gets a pattern of its own.
    ///
    /// # Errors
    /// If no layer has an adapter of this name, or one is neither LoRA nor MonteCLoRA or does not match
    /// `method`.
    pub fn from_model(
        model: &dyn AdaptableModel,
        adapter: &str,
        params: &Params,
        method: &AdapterMethod,
        metadata: &AdapterMetadata,
    ) -> Result<Self> {
        let (mut layers, mut scales, mut others) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        model.visit_linears(&mut |layer| {
            match layer.adapter(adapter) {
                Some(found) => {
                    let (scale, tensors) = take(layer.path(), found, method)?;
                    scales.insert(layer.path().to_string(), scale);
                    layers.insert(layer.path().to_string(), tensors);
                }
                None => others.push(layer.path().to_string()),
            }
            Ok(())
        })?;
        if layers.is_empty() {
            return Err(Error::config("adapter", format!("no layer has an adapter {adapter:?}")));
        }
        let names = renamed::targets(layers.keys(), &others);
        Self::assembled(layers, scales, names, params, method, metadata)
    }

    /// Copies the adapters of standalone layers ([`AdaptedLinear`](crate::AdaptedLinear)), each with the path
    /// it was made with, and the trained head in `params`, as [`Self::from_model`] does. PEFT finds the
    /// layers by these paths.
    ///
    /// # Example
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::Linear;
    /// use monteclora::adapters::{LoraConfig, LoraLinear};
    /// use monteclora::peft::{AdapterFile, AdapterMetadata, AdapterMethod};
    /// use monteclora::{Noise, Params};
    ///
    /// let params = Params::new(Noise::new(0), &Device::Cpu);
    /// let config = LoraConfig { rank: 2, ..Default::default() };
    /// let base = Linear::new(Tensor::ones((6, 4), DType::F32, &Device::Cpu)?, None);
    /// let up = LoraLinear::new(base, &params, "block.up", &config)?;
    ///
    /// let (layers, method) = ([("block.up", up.adapter() as _)], AdapterMethod::Lora(config));
    /// let file = AdapterFile::from_layers(&layers, &params, &method, &AdapterMetadata::default())?;
    /// assert_eq!(file.layers["block.up"].b.dims(), [6, 2]);
    /// file.apply_to_layers(&layers, &params)?; // and back, after `AdapterFile::read`
    /// # Ok::<(), monteclora::Error>(())
    /// ```
    ///
    /// # Errors
    /// If there is no layer, a path occurs twice, or an adapter is neither LoRA nor MonteCLoRA or does not
    /// match `method`.
    pub fn from_layers(
        layers: &[(&str, &dyn Adapter)],
        params: &Params,
        method: &AdapterMethod,
        metadata: &AdapterMetadata,
    ) -> Result<Self> {
        let (mut all, mut scales) = (BTreeMap::new(), BTreeMap::new());
        for (path, adapter) in layers {
            let (scale, tensors) = take(path, *adapter, method)?;
            scales.insert(path.to_string(), scale);
            if all.insert(path.to_string(), tensors).is_some() {
                return Err(Error::config("layers", format!("{path} comes twice")));
            }
        }
        let names = TargetModules::Names(all.keys().cloned().collect());
        Self::assembled(all, scales, names, params, method, metadata)
    }

    /// Builds the file from the layers, their scales and the targets.
    fn assembled(
        layers: BTreeMap<String, LayerTensors>,
        scales: BTreeMap<String, f64>,
        targets: TargetModules,
        params: &Params,
        method: &AdapterMethod,
        metadata: &AdapterMetadata,
    ) -> Result<Self> {
        let heads = params.of_role(Role::Head).into_iter();
        let saved_modules = heads.map(|(name, param)| Ok((name, single(param.var.as_tensor())?)));
        let saved_modules = saved_modules.collect::<Result<BTreeMap<_, _>>>()?;

        let mut config = method.to_peft();
        config.target_modules = Some(targets);
        config.modules_to_save = modules(saved_modules.keys(), metadata.task);
        config.base_model_name_or_path = metadata.base_model.clone();
        config.revision = metadata.revision.clone();
        config.task_type = metadata.task.map(|task| task.name().to_string());
        for (path, layer) in &layers {
            let rank = layer.a.dim(0)?;
            if rank != config.r {
                config.rank_pattern.push((renamed::pattern(path).to_string(), rank));
            }
            let root = if config.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
            let alpha = scales[path] * root;
            if (alpha - config.lora_alpha).abs() > 1e-9 * alpha.abs() {
                config.alpha_pattern.push((renamed::pattern(path).to_string(), alpha));
            }
        }
        let (monteclora, prior) = match method {
            AdapterMethod::Lora(config) => (None, config.prior),
            AdapterMethod::MonteCLoRA(config) => (Some(config.clone()), None),
        };
        let labels = metadata.labels.clone();
        let file = Self { config, layers, saved_modules, monteclora, prior, labels };
        file.check()?;
        Ok(file)
    }

    /// Loads this adapter into standalone layers, which must have been made with the paths and scales of the
    /// file, and its saved modules into the head parameters of the same names.
    ///
    /// # Errors
    /// If `layers` and the layers of the file are not the same, a scale or shape differs, or a tensor has no
    /// parameter in `params`. On an error nothing has changed.
    pub fn apply_to_layers(&self, layers: &[(&str, &dyn Adapter)], params: &Params) -> Result<()> {
        self.check()?;
        let paths: Vec<&str> = self.layers.keys().map(String::as_str).collect();
        let scales: BTreeMap<&str, f64> = paths.iter().copied().zip(self.config.scales_of(&paths)?).collect();
        if let Some(path) = paths.iter().find(|path| !layers.iter().any(|(own, _)| own == *path)) {
            let available = layers.iter().map(|(path, _)| *path).collect::<Vec<_>>().join(", ");
            return Err(Error::NoTarget { targets: path.to_string(), available });
        }
        let mut values = self.saved_modules.clone();
        for (path, adapter) in layers {
            let (own, _) = take(path, *adapter, &self.method())?;
            let Some((layer, scale)) = self.layers.get(*path).zip(scales.get(path)) else {
                return Err(Error::tensor(TensorKind::A.key(path), "it is missing from the file"));
            };
            if (own - scale).abs() > 1e-6 * scale {
                let reason = format!(
                    "{path} was made with the scale {own}, the file has {scale} (alpha over rank, or over \
                     its square root with use_rslora)"
                );
                return Err(Error::config("alpha", reason));
            }
            let name = format!("{path}.{}", inject::DEFAULT_ADAPTER);
            values.extend([(format!("{name}.a"), layer.a.clone()), (format!("{name}.b"), layer.b.clone())]);
            if let Some(sampler) = &layer.sampler {
                values.insert(format!("{name}.std_prior"), sampler.std_prior.clone());
                values.insert(format!("{name}.expert_weights_prior"), sampler.expert_weights_prior.clone());
            }
        }
        params.restore(&values)
    }

    /// Loads this adapter into a model under the name `adapter`: creates its parameters in `params`, and
    /// overwrites the head parameters that have the names of its saved modules. It becomes the active
    /// adapter; adapters of other names are deactivated and frozen.
    ///
    /// For a vision-language model, the file and the model may each use the decoder's path from before or
    /// after transformers 4.52. Layers of the vision part are skipped with a warning, because only the
    /// decoder is supported.
    ///
    /// All adapters of a model share its task head (PEFT keeps one for each adapter). If the model has
    /// another adapter, a file with a different head is rejected, because that adapter would then use a head
    /// it was not trained with. Head parameters that the configuration does not save keep their values, with
    /// a warning.
    ///
    /// # Errors
    /// If a layer of the file is not in the model or does not fit it, a layer that the configuration targets
    /// has no tensors, the name is taken, a layer is merged, a saved module has no parameter of its name and
    /// shape, a head parameter that the configuration saves is not in the file, or the head differs from that
    /// of the model's other adapters. On an error nothing has changed.
    pub fn apply(&self, model: &mut dyn AdaptableModel, adapter: &str, params: &Params) -> Result<()> {
        check_unmerged(model)?;
        self.check()?;
        match self.fitted_to(model)? {
            Some(fitted) => fitted.apply_named(model, adapter, params),
            None => self.apply_named(model, adapter, params),
        }
    }

    /// [`Self::apply`] for a file with the layer paths of the model.
    fn apply_named(&self, model: &mut dyn AdaptableModel, adapter: &str, params: &Params) -> Result<()> {
        self.check_model(model, adapter, params)?;
        #[cfg(feature = "models")] // which enables `tracing`
        self.warnings()?.iter().for_each(|what| tracing::warn!("adapter_config.json: {what}"));
        #[cfg(feature = "models")]
        self.of_the_base(params)
            .iter()
            .for_each(|name| tracing::warn!("{name}: not in the adapter, the model's own value is kept"));
        let method = match self.method() {
            AdapterMethod::MonteCLoRA(config) => {
                AdapterMethod::MonteCLoRA(inject::with_share(model, &config, self.layers.len())?)
            }
            lora => lora,
        };
        let paths: Vec<&str> = self.layers.keys().map(String::as_str).collect();
        let (ranks, alphas) = (self.config.ranks_of(&paths)?, self.config.alphas_of(&paths)?);
        let targets = paths.iter().zip(ranks).zip(alphas);
        let targets: Vec<TargetLayer> = targets
            .map(|((path, rank), alpha)| TargetLayer { path: path.to_string(), rank, alpha })
            .collect();
        let heads = self.saved_modules.keys().filter_map(|name| Some((name.clone(), params.get(name)?.var)));
        let before = heads.map(|(name, var)| Ok((name, var.as_detached_tensor().copy()?)));
        let before = before.collect::<Result<BTreeMap<_, _>>>()?;
        let head = self.saved_modules.iter().try_for_each(|(name, tensor)| params.set(name, tensor));
        let group = Arc::default();
        let done = head.and_then(|()| {
            inject::inject(model, adapter, &targets, params, &mut |linear, target, params| {
                self.layer(&method, &group, linear, target, adapter, params)
            })
        });
        done.or_else(|error| params.restore(&before).and(Err(error)))
    }

    /// Creates the adapter of one layer with the file's values.
    fn layer(
        &self,
        method: &AdapterMethod,
        group: &Arc<DrawGroup>,
        linear: &AdaptableLinear,
        target: &TargetLayer,
        adapter: &str,
        params: &Params,
    ) -> Result<Box<dyn Adapter>> {
        let (path, dims, rank, alpha) = (linear.path(), linear.dims()?, target.rank, target.alpha);
        let made: Box<dyn Adapter> = match method {
            AdapterMethod::Lora(config) => {
                let config = LoraConfig { rank, alpha, ..config.clone() };
                Box::new(Lora::new(params, path, adapter, dims, &config)?)
            }
            AdapterMethod::MonteCLoRA(config) => {
                let config = MonteCLoRAConfig { rank, alpha, ..config.clone() };
                Box::new(MonteCLoRA::in_group(group, params, path, adapter, dims, &config)?)
            }
        };
        let (name, layer) = (format!("{path}.{adapter}"), &self.layers[path]);
        params.set(&format!("{name}.a"), &layer.a)?;
        params.set(&format!("{name}.b"), &layer.b)?;
        if let Some(sampler) = &layer.sampler {
            params.set(&format!("{name}.std_prior"), &sampler.std_prior)?;
            params.set(&format!("{name}.expert_weights_prior"), &sampler.expert_weights_prior)?;
        }
        Ok(made)
    }

    /// Checks that every layer and saved module of the file has a matching place in the model, and that it is
    /// free.
    fn check_model(&self, model: &dyn AdaptableModel, adapter: &str, params: &Params) -> Result<()> {
        let mut available = BTreeSet::new();
        model.visit_linears(&mut |layer| {
            available.insert(layer.path().to_string());
            Ok(())
        })?;
        let paths: Vec<&str> = available.iter().map(String::as_str).collect();
        let alphas: BTreeMap<&str, f64> = paths.iter().copied().zip(self.config.alphas_of(&paths)?).collect();
        // PEFT resolves `all-linear` when it saves; a file that still has it does not tell which layers it
        // means.
        let resolved = match &self.config.target_modules {
            None => false,
            Some(TargetModules::Pattern(word)) => word != "all-linear",
            Some(TargetModules::Names(_)) => true,
        };
        let named: BTreeMap<&str, bool> = if resolved {
            paths.iter().copied().zip(self.config.are_targets(&paths)?).collect()
        } else {
            BTreeMap::new()
        };
        model.visit_linears(&mut |linear| match self.layers.get(linear.path()) {
            Some(layer) => self.check_linear(linear, layer, alphas[linear.path()], adapter, params),
            None if named.get(linear.path()) == Some(&true) => Err(Error::tensor(
                TensorKind::A.key(linear.path()),
                "it is missing, although target_modules names the layer",
            )),
            None => Ok(()),
        })?;
        if let Some(path) = self.layers.keys().find(|path| !available.contains(*path)) {
            let available = available.into_iter().collect::<Vec<_>>().join(", ");
            return Err(Error::NoTarget { targets: path.clone(), available });
        }
        let others = activate::names(model)?.into_iter().find(|other| other != adapter);
        for (name, tensor) in &self.saved_modules {
            let Some(param) = params.get(name) else {
                return Err(Error::tensor(name, no_place(name, params)));
            };
            if param.var.dims() != tensor.dims() {
                let reason = format!("expected shape {:?}, got {:?}", param.var.dims(), tensor.dims());
                return Err(Error::tensor(name, reason));
            }
            if let Some(other) = others.as_ref().filter(|_| !same(param.var.as_tensor(), tensor)) {
                let reason = format!(
                    "it differs from the head in use, which adapter {other:?} shares: load each adapter into \
                     its own model"
                );
                return Err(Error::tensor(name, reason));
            }
        }
        // If a head is only partly in the file, the rest would keep its random initial values. What PEFT does
        // not save, such as DeBERTa's pooler, comes from the base model.
        let is_classifier = self.config.task() == Some(TaskType::SequenceClassification);
        let whole_head = self.saved_modules.is_empty() && is_classifier;
        let heads = params.of_role(Role::Head).into_iter();
        let heads: Vec<String> = heads.map(|(name, _)| name).collect();
        let modules: Vec<&str> = heads.iter().map(|name| keys::module(name)).collect();
        for (name, is_saved) in heads.iter().zip(self.config.are_saved(&modules)?) {
            if (whole_head || is_saved) && !self.saved_modules.contains_key(name) {
                let reason = "it is missing from the file, although the adapter has a task head";
                return Err(Error::tensor(name, reason));
            }
        }
        Ok(())
    }

    fn check_linear(
        &self,
        linear: &AdaptableLinear,
        layer: &LayerTensors,
        alpha: f64,
        adapter: &str,
        params: &Params,
    ) -> Result<()> {
        let (path, (in_dim, out_dim)) = (linear.path(), linear.dims()?);
        let rank = layer.a.dim(0)?;
        for (kind, tensor, expected) in
            [(TensorKind::A, &layer.a, [rank, in_dim]), (TensorKind::B, &layer.b, [out_dim, rank])]
        {
            if tensor.dims() != expected {
                let reason = format!("the layer needs shape {expected:?}, got {:?}", tensor.dims());
                return Err(Error::tensor(kind.key(path), reason));
            }
        }
        let name = format!("{path}.{adapter}.a");
        if linear.adapter(adapter).is_some() || params.get(&name).is_some() {
            return Err(Error::config("adapter", format!("{path} has an adapter {adapter:?} already")));
        }
        match self.method() {
            AdapterMethod::Lora(config) => LoraConfig { rank, alpha, ..config }.validate(),
            AdapterMethod::MonteCLoRA(config) => MonteCLoRAConfig { rank, alpha, ..config }.validate(),
        }
    }
}

/// The reason why the saved tensor `name` has no place in a model whose trained head is in `params`.
fn no_place(name: &str, params: &Params) -> String {
    let heads = params.of_role(Role::Head).into_iter();
    let heads: BTreeSet<String> = heads.map(|(name, _)| keys::module(&name).to_string()).collect();
    if heads.contains(keys::module(name)) {
        return "the model has no trainable parameter of this name".to_string();
    }
    let there = match heads.len() {
        0 => "has none".to_string(),
        _ => format!("has {}", heads.into_iter().collect::<Vec<_>>().join(", ")),
    };
    format!(
        "modules_to_save is only supported for a task head, and the model {there}; train the adapter without \
         this module, or merge it into the checkpoint"
    )
}

/// Copies the scale and the tensors of one layer's adapter.
fn take(path: &str, adapter: &dyn Adapter, method: &AdapterMethod) -> Result<(f64, LayerTensors)> {
    let (pair, sampler): (&LowRank, _) = match method {
        AdapterMethod::Lora(_) => match adapter.as_any().downcast_ref::<Lora>() {
            Some(lora) => (lora.low_rank(), None),
            None => return Err(Error::config("method", format!("the adapter of {path} is not LoRA"))),
        },
        AdapterMethod::MonteCLoRA(config) => match adapter.as_any().downcast_ref::<MonteCLoRA>() {
            Some(layer) => {
                let posterior = layer.posterior();
                let (rank, in_dim) = layer.low_rank().a().dims2()?;
                let of_file = MonteCLoRAConfig { rank, ..config.clone() }.at_width(in_dim).sample_scaler;
                let own = posterior.sample_scaler();
                if own != of_file {
                    let reason = format!(
                        "{path} has {own}, the method has {of_file}: all layers of a file must have the same"
                    );
                    return Err(Error::config("sample_scaler", reason));
                }
                let trained = (single(posterior.std_prior())?, single(posterior.expert_weights_prior())?);
                (layer.low_rank(), Some(SamplerTensors::new(trained.0, trained.1)?))
            }
            None => return Err(Error::config("method", format!("the adapter of {path} is not MonteCLoRA"))),
        },
    };
    Ok((pair.scale(), LayerTensors { a: single(pair.a())?, b: single(pair.b())?, sampler }))
}

/// Whether `held` equals `file` after conversion to the dtype of `held`.
fn same(held: &Tensor, file: &Tensor) -> bool {
    let values = |tensor: &Tensor| {
        let tensor = tensor.detach().to_device(&Device::Cpu)?.to_dtype(held.dtype())?;
        tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()
    };
    matches!((values(held), values(file)), (Ok(held), Ok(file)) if held == file)
}

/// A copy in single precision on the host.
fn single(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.copy()?)
}

/// The modules of the head's parameters. For a classifier, both names that PEFT lists are included.
fn modules<'a>(heads: impl Iterator<Item = &'a String>, task: Option<TaskType>) -> Option<Vec<String>> {
    let mut names: BTreeSet<String> =
        heads.map(|name| name.split('.').next().unwrap_or(name).to_string()).collect();
    if names.is_empty() {
        return None;
    }
    if task == Some(TaskType::SequenceClassification) {
        names.extend(["classifier".to_string(), "score".to_string()]);
    }
    Some(names.into_iter().collect())
}
