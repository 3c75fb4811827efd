//! Puts adapters on the targets of a model: on all of them or on none.

use std::collections::{BTreeMap, BTreeSet};

use super::activate::{self, check_unmerged};
use super::targets::{no_target, paths, TargetLayer};
use crate::adapter::{check_adapter_name, AdaptableLinear, AdaptableModel, Adapter, Params};
use crate::error::{Error, Result};

/// The default name of an adapter.
pub const DEFAULT_ADAPTER: &str = "default";

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
