//! Puts LoRA, MonteCLoRA or any other adapters on the targets of a model: on all of them or on none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::activate::{self, check_unmerged};
use super::targets::{no_target, paths, TargetLayer, Targets};
use crate::adapter::{check_adapter_name, AdaptableLinear, AdaptableModel, Adapter, Params};
use crate::adapters::{Lora, LoraConfig, LoraFa};
use crate::error::{Error, Result};
use crate::monteclora::{MonteCLoRA, MonteCLoRAConfig, Released};

/// Default limit of the noise in a model's sample buffers, as a fraction of the bytes of its linear layers.
/// Draws beyond it are recomputed, which does not change any result.
pub const BUFFER_SHARE: f64 = 0.01;

/// The default name of an adapter.
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

/// [`lora`] under another name. A model can have several adapters; the last one added is active and trained
/// until [`crate::inject::activate::activate`] selects another. A task head is trained with them and shared
/// by all.
///
/// # Errors
/// As [`lora`], and if a target has an adapter of this name.
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

/// Puts a LoRA-FA adapter named [`DEFAULT_ADAPTER`], whose A is frozen, on every target; returns the targets.
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
    Ok(resolved)
}

/// Puts the adapter of the authors' released code, named [`DEFAULT_ADAPTER`], on every target; returns the
/// targets. Its A is frozen: the optimiser does not change it, [`ReleasedWalk`](crate::ReleasedWalk) does.
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
    Ok(resolved)
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

/// `config` with an equal share of [`BUFFER_SHARE`] as each layer's buffer limit, unless it sets a limit.
pub(crate) fn with_share(
    model: &dyn AdaptableModel,
    config: &MonteCLoRAConfig,
    layers: usize,
) -> Result<MonteCLoRAConfig> {
    let share = BUFFER_SHARE * base_bytes(model)? as f64 / layers as f64;
    Ok(MonteCLoRAConfig { buffer_bytes: config.buffer_bytes.or(Some(share as usize)), ..config.clone() })
}

/// Creates the adapter of one layer. The store it is given creates parameters on the layer's device.
pub type Make<'a> = dyn FnMut(&AdaptableLinear, &TargetLayer, &Params) -> Result<Box<dyn Adapter>> + 'a;

/// Puts an adapter of any method on every target. The adapter `name` becomes the only active one: adapters of
/// other names are deactivated on all layers, and their parameters are frozen. Of its own parameters, those
/// that it trains ([`Adapter::parameters`]) are trainable. On an error no target gets an adapter, and the
/// parameters created so far are removed.
///
/// # Errors
/// The first error of `make`; or if the name is not valid, a target is not a layer of the model or occurs
/// twice, a target already has an adapter of this name, or a layer is merged.
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
            // Several calls may use the same name: all its adapters are active, and no others.
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
    // Its own are frozen first too: an adapter need not train all that it creates.
    activate::set_trainable(model, params, false, |_| true)?;
    activate::set_trainable(model, params, true, |own| own == name)
}

/// The size in bytes of the weights of a model's linear layers.
fn base_bytes(model: &dyn AdaptableModel) -> Result<usize> {
    let mut bytes = 0;
    model.visit_linears(&mut |layer| {
        bytes += layer.base().bytes();
        Ok(())
    })?;
    Ok(bytes)
}
