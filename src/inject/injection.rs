//! Puts LoRA, MonteCLoRA or any other adapters on the targets of a model: on all of them or on none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::activate::{self, check_unmerged};
use super::targets::{no_target, paths, TargetLayer, Targets};
use crate::adapter::{check_adapter_name, AdaptableLinear, AdaptableModel, Adapter, Params, Role};
use crate::adapters::{Lora, LoraConfig, LoraFa};
use crate::error::{Error, Result};
use crate::monteclora::{MonteCLoRA, MonteCLoRAConfig, Released};

/// The most noise that the sample buffers of a model keep by default, as a share of the bytes of
/// its linear layers. Beyond that draws are made anew, which changes no result.
pub const BUFFER_SHARE: f64 = 0.01;

/// The name an adapter has unless it is given one.
pub const DEFAULT_ADAPTER: &str = "default";

/// Puts a LoRA adapter named [`DEFAULT_ADAPTER`] on every target; returns the targets.
///
/// # Errors
/// As [`Targets::resolve`], and if rank and layer do not fit. On an error nothing has changed.
pub fn lora(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &LoraConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    lora_named(model, DEFAULT_ADAPTER, targets, config, params)
}

/// [`lora`] under another name: a model holds several adapters, the last of which is active and
/// trained until [`crate::inject::activate::activate`] says otherwise. A task head is trained beside them and
/// shared by all.
///
/// # Errors
/// As [`lora`]; and if a target has an adapter of this name.
pub fn lora_named(
    model: &mut dyn AdaptableModel,
    name: &str,
    targets: &Targets,
    config: &LoraConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    let resolved = targets.resolve(model, config.rank, config.alpha)?;
    inject(model, name, &resolved, params, &mut |layer, target, params| {
        let config = LoraConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(Lora::new(params, layer.path(), name, layer.dims()?, &config)?))
    })?;
    Ok(resolved)
}

/// Puts a LoRA-FA adapter named [`DEFAULT_ADAPTER`] on every target, whose A is frozen; returns the targets.
///
/// # Errors
/// As [`lora`].
pub fn lora_fa(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &LoraConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    let resolved = targets.resolve(model, config.rank, config.alpha)?;
    inject(model, DEFAULT_ADAPTER, &resolved, params, &mut |layer, target, params| {
        let config = LoraConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(LoraFa::new(params, layer.path(), DEFAULT_ADAPTER, layer.dims()?, &config)?))
    })?;
    freeze_a(&resolved, params);
    Ok(resolved)
}

/// Puts the adapter of the authors' released code, named [`DEFAULT_ADAPTER`], on every target; its A is frozen:
/// [`ReleasedWalk`](crate::ReleasedWalk) moves it. Returns the targets.
///
/// # Errors
/// As [`lora`].
pub fn monteclora_released(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &MonteCLoRAConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    let resolved = targets.resolve(model, config.rank, config.alpha)?;
    inject(model, DEFAULT_ADAPTER, &resolved, params, &mut |layer, target, params| {
        let config = MonteCLoRAConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(Released::new(params, layer.path(), DEFAULT_ADAPTER, layer.dims()?, &config)?))
    })?;
    freeze_a(&resolved, params);
    Ok(resolved)
}

/// Freezes the A of the adapter named [`DEFAULT_ADAPTER`] on these layers.
fn freeze_a(targets: &[TargetLayer], params: &Params) {
    let names: BTreeSet<String> =
        targets.iter().map(|target| format!("{}.{DEFAULT_ADAPTER}.a", target.path)).collect();
    params.set_trainable_where(false, |name, param| param.role == Role::A && names.contains(name));
}

/// Puts a MonteCLoRA adapter named [`DEFAULT_ADAPTER`] on every target; returns the targets.
///
/// # Errors
/// As [`lora`].
pub fn monteclora(
    model: &mut dyn AdaptableModel,
    targets: &Targets,
    config: &MonteCLoRAConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    monteclora_named(model, DEFAULT_ADAPTER, targets, config, params)
}

/// [`monteclora`] under another name, as [`lora_named`].
///
/// # Errors
/// As [`lora_named`].
pub fn monteclora_named(
    model: &mut dyn AdaptableModel,
    name: &str,
    targets: &Targets,
    config: &MonteCLoRAConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    let resolved = targets.resolve(model, config.rank, config.alpha)?;
    let (config, group) = (with_share(model, config, resolved.len())?, Arc::default());
    inject(model, name, &resolved, params, &mut |layer, target, params| {
        let config = MonteCLoRAConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        Ok(Box::new(MonteCLoRA::in_group(&group, params, layer.path(), name, layer.dims()?, &config)?))
    })?;
    Ok(resolved)
}

/// `config` with each layer's share of [`BUFFER_SHARE`], where it names no limit itself.
pub(crate) fn with_share(
    model: &dyn AdaptableModel,
    config: &MonteCLoRAConfig,
    layers: usize,
) -> Result<MonteCLoRAConfig> {
    let share = BUFFER_SHARE * base_bytes(model)? as f64 / layers as f64;
    Ok(MonteCLoRAConfig { buffer_bytes: config.buffer_bytes.or(Some(share as usize)), ..config.clone() })
}

/// Makes an adapter for one layer, with parameters in a store that puts them on the layer's device.
pub type Make<'a> = dyn FnMut(&AdaptableLinear, &TargetLayer, &Params) -> Result<Box<dyn Adapter>> + 'a;

/// Puts an adapter of any method on every target: all of them or, on an error, none, and the
/// parameters that were started are taken back. Other layers let go of an adapter of another name,
/// and the parameters of adapters of other names are frozen.
///
/// # Errors
/// The first error of `make`; or if the name cannot be an adapter's, a target is no layer of the
/// model or comes twice, a layer has an adapter of this name, or one is merged.
pub fn inject(
    model: &mut dyn AdaptableModel,
    name: &str,
    targets: &[TargetLayer],
    params: &Params,
    make: &mut Make,
) -> Result<()> {
    check_adapter_name(name)?;
    check_unmerged(model)?;
    let mut wanted: BTreeMap<&str, &TargetLayer> = BTreeMap::new();
    for target in targets {
        if wanted.insert(&target.path, target).is_some() {
            return Err(Error::config("targets", format!("{} comes twice", target.path)));
        }
    }
    let known: BTreeSet<String> = params.all().into_iter().map(|(name, _)| name).collect();
    let mut adapters: BTreeMap<String, Box<dyn Adapter>> = BTreeMap::new();
    let made = model.visit_linears(&mut |layer| {
        let Some(target) = wanted.remove(layer.path()) else { return Ok(()) };
        if layer.adapter(name).is_some() {
            let reason = format!("{} has an adapter {name:?} already", layer.path());
            return Err(Error::config("adapter", reason));
        }
        adapters.insert(target.path.clone(), make(layer, target, &params.on(layer.base().device()))?);
        Ok(())
    });
    let made = made.and_then(|()| match wanted.first_key_value() {
        Some((path, _)) => Err(no_target(path, &paths(model)?)),
        None => Ok(()),
    });
    let added = made.and_then(|()| {
        model.visit_linears_mut(&mut |layer| match adapters.remove(layer.path()) {
            Some(adapter) => layer.add(name, adapter),
            // A name may come in several calls: all of it is active, and nothing else.
            None => {
                let here = layer.adapter(name).map(|_| name);
                layer.activate(here)
            }
        })
    });
    if let Err(error) = added {
        for (name, _) in params.all().iter().filter(|(name, _)| !known.contains(name)) {
            params.remove(name);
        }
        return Err(error);
    }
    activate::set_trainable(model, params, false, |other| other != name)?;
    activate::set_trainable(model, params, true, |own| own == name)
}

/// The bytes of the weights of a model's linear layers.
fn base_bytes(model: &dyn AdaptableModel) -> Result<usize> {
    let mut bytes = 0;
    model.visit_linears(&mut |layer| {
        bytes += layer.base().bytes();
        Ok(())
    })?;
    Ok(bytes)
}
