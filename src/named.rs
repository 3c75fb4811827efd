//! Several adapters on one model, by their names: which there are, which is active, which go.
//!
//! Each of these changes the whole model or, on an error, nothing of it.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::params::Params;
use crate::slot::Linears;

/// The names of a model's adapters, sorted.
///
/// # Errors
/// If the walk fails.
pub fn names(model: &dyn Linears) -> Result<Vec<String>> {
    let mut names = BTreeSet::new();
    model.visit_linears(&mut |slot| {
        names.extend(slot.names().map(str::to_string));
        Ok(())
    })?;
    Ok(names.into_iter().collect())
}

/// Makes the adapter `name` the active one of every layer that has it, and none of the others; or,
/// with None, switches all of them off.
///
/// # Errors
/// If no layer has an adapter of this name, or one is merged.
pub fn activate(model: &mut dyn Linears, name: Option<&str>) -> Result<()> {
    if let Some(name) = name {
        check_name(model, name)?;
    }
    check_unmerged(model)?;
    model.visit_linears_mut(&mut |slot| {
        let here = name.filter(|name| slot.adapter(name).is_some());
        slot.activate(here)
    })
}

/// Takes the adapter `name` away, and its parameters out of `params`. Where it was active, none is.
///
/// # Errors
/// If no layer has an adapter of this name, or one is merged.
pub fn remove(model: &mut dyn Linears, name: &str, params: &Params) -> Result<()> {
    check_name(model, name)?;
    check_unmerged(model)?;
    model.visit_linears_mut(&mut |slot| {
        if slot.remove(name)?.is_some() {
            let prefix = format!("{}.{name}.", slot.path());
            for (param, _) in params.all().into_iter().filter(|(param, _)| param.starts_with(&prefix)) {
                params.remove(&param);
            }
        }
        Ok(())
    })
}

fn check_name(model: &dyn Linears, name: &str) -> Result<()> {
    let names = names(model)?;
    match names.iter().any(|known| known == name) {
        true => Ok(()),
        false => {
            let reason = format!("there is no {name:?}; the model has: {}", names.join(", "));
            Err(Error::config("adapter", reason))
        }
    }
}

pub(crate) fn check_unmerged(model: &dyn Linears) -> Result<()> {
    model.visit_linears(&mut |slot| match slot.is_merged() {
        true => Err(Error::config("adapter", format!("{} is merged: unmerge it first", slot.path()))),
        false => Ok(()),
    })
}
