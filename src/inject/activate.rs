//! Manages several named adapters on one model: lists, activates and removes them.
//!
//! Each operation changes the whole model or, on an error, nothing. The adapters share one store of
//! parameters; those of the active adapter are trainable, those of the others frozen.

use std::collections::{BTreeSet, HashSet};

use crate::adapter::{AdaptableModel, Params};
use crate::error::{Error, Result};

/// The names of a model's adapters, sorted.
///
/// # Errors
/// If the walk fails.
pub fn names(model: &dyn AdaptableModel) -> Result<Vec<String>> {
    let mut names = BTreeSet::new();
    model.visit_linears(&mut |layer| {
        names.extend(layer.names().map(str::to_string));
        Ok(())
    })?;
    Ok(names.into_iter().collect())
}

/// Activates the adapter `name` on every layer that has it and deactivates all others; `None` deactivates
/// every adapter. As in PEFT's `set_adapter`, everything that the active adapter trains
/// ([`Adapter::parameters`](crate::adapter::Adapter::parameters)) becomes trainable, and the parameters of
/// the others are frozen.
///
/// To train less of an adapter (with A and B frozen, say), freeze roles after this call.
/// [`Params::set_trainable`] acts on a role in every adapter. For a single adapter, use
/// [`Params::set_trainable_where`] on the parameters whose names begin with a layer's path and `.{name}.`.
///
/// # Errors
/// If no layer has an adapter of this name, or a layer is merged.
pub fn activate(model: &mut dyn AdaptableModel, name: Option<&str>, params: &Params) -> Result<()> {
    if let Some(name) = name {
        check_name(model, name)?;
    }
    check_unmerged(model)?;
    model.visit_linears_mut(&mut |layer| {
        let here = name.filter(|name| layer.adapter(name).is_some());
        layer.activate(here)
    })?;
    set_trainable(model, params, false, |other| Some(other) != name)?;
    set_trainable(model, params, true, |own| Some(own) == name)
}

/// Freezes all parameters of the adapters whose names are `chosen`, or makes trainable those that they train:
/// some methods keep A as initialised.
pub(crate) fn set_trainable(
    model: &dyn AdaptableModel,
    params: &Params,
    trainable: bool,
    chosen: impl Fn(&str) -> bool,
) -> Result<()> {
    let (mut prefixes, mut trained) = (Vec::new(), HashSet::new());
    model.visit_linears(&mut |layer| {
        for name in layer.names().filter(|name| chosen(name)) {
            prefixes.push(prefix(layer.path(), name));
            let adapter = layer.adapter(name);
            trained.extend(adapter.into_iter().flat_map(|a| a.parameters()).map(|(_, tensor)| tensor.id()));
        }
        Ok(())
    })?;
    params.set_trainable_where(trainable, |name, param| {
        let own = prefixes.iter().any(|prefix| name.starts_with(prefix));
        own && (!trainable || trained.contains(&param.var.id()))
    });
    Ok(())
}

/// The prefix of the names of an adapter's parameters in one layer.
fn prefix(path: &str, adapter: &str) -> String {
    format!("{path}.{adapter}.")
}

/// Removes the adapter `name`, and its parameters from `params`. If it was active, no adapter is active
/// afterwards: the others stay frozen until one is activated.
///
/// # Errors
/// If no layer has an adapter of this name, or a layer is merged.
pub fn remove(model: &mut dyn AdaptableModel, name: &str, params: &Params) -> Result<()> {
    check_name(model, name)?;
    check_unmerged(model)?;
    model.visit_linears_mut(&mut |layer| {
        if layer.remove(name)?.is_some() {
            let prefix = prefix(layer.path(), name);
            for (param, _) in params.all().into_iter().filter(|(param, _)| param.starts_with(&prefix)) {
                params.remove(&param);
            }
        }
        Ok(())
    })
}

fn check_name(model: &dyn AdaptableModel, name: &str) -> Result<()> {
    let names = names(model)?;
    if names.iter().any(|known| known == name) {
        Ok(())
    } else {
        let reason = format!("there is no {name:?}; the model has: {}", names.join(", "));
        Err(Error::config("adapter", reason))
    }
}

pub(crate) fn check_unmerged(model: &dyn AdaptableModel) -> Result<()> {
    model.visit_linears(&mut |layer| layer.check_unmerged())
}
