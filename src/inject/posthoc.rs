//! Post-hoc MonteCLoRA: adds a posterior to a trained LoRA adapter.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::activate;
use super::injection::inject;
use super::methods::with_share;
use super::targets::TargetLayer;
use crate::adapter::{low_rank, no_active, other_method, AdaptableModel, Params, Prior, PriorForm, Role};
use crate::adapters::Lora;
use crate::error::{Error, Result};
use crate::monteclora::{MonteCLoRA, MonteCLoRAConfig};

/// Adds a MonteCLoRA adapter named `name` with the A, B, ranks and scales of the active LoRA adapter, trained
/// here or read from a file, and the other settings of `config`. Freezes everything except its rho and c: A,
/// B, a task head and the base do not change. Returns the adapted layers.
///
/// The mean does not depend on rho and c. So the mean prediction and its metrics stay those of the LoRA; only
/// averaged posterior draws can differ. The LoRA adapter is kept beside the new one, inactive, until
/// [`activate::remove`]. [`activate::activate`] makes A and B trainable again: call it before this function,
/// not after.
///
/// # Errors
/// If no layer has an active adapter, an active adapter is not LoRA, `config` does not fit (or its prior has
/// no gradient for what is trained), a layer has an adapter of this name, or a layer is merged. On an error
/// nothing has changed.
pub fn posthoc(
    model: &mut dyn AdaptableModel,
    name: &str,
    config: &MonteCLoRAConfig,
    params: &Params,
) -> Result<Vec<TargetLayer>> {
    check(config)?;
    let (mut targets, mut pairs) = (Vec::new(), BTreeMap::new());
    model.visit_linears(&mut |layer| {
        let (path, Some((active, adapter))) = (layer.path(), layer.active()) else { return Ok(()) };
        let Some(lora) = adapter.as_any().downcast_ref::<Lora>() else {
            return Err(other_method(layer, active, "LoRA"));
        };
        let pair = lora.low_rank();
        let rank = pair.a().dim(0)?;
        let alpha = alpha(pair.scale(), rank, config.use_rslora);
        targets.push(TargetLayer { path: path.to_string(), rank, alpha });
        pairs.insert(path.to_string(), (pair.a().detach(), pair.b().detach()));
        Ok(())
    })?;
    if targets.is_empty() {
        return Err(no_active("LoRA"));
    }
    let (config, group) = (with_share(model, config, targets.len())?, Arc::default());
    inject(model, name, &targets, params, &mut |layer, target, params| {
        let config = MonteCLoRAConfig { rank: target.rank, alpha: target.alpha, ..config.clone() };
        let made = MonteCLoRA::in_group(&group, params, layer.path(), name, layer.dims()?, &config)?;
        let (a, b) = &pairs[&target.path];
        params.set(&format!("{}.a", made.name()), a)?;
        params.set(&format!("{}.b", made.name()), b)?;
        Ok(Box::new(made))
    })?;
    params.set_trainable_where(false, |_, _| true);
    activate::set_trainable(model, params, true, |own| own == name)?;
    for role in [Role::A, Role::B] {
        params.set_trainable(role, false);
    }
    Ok(targets)
}

/// Rejects a prior that has no gradient for the parameters trained post hoc.
pub(crate) fn check(config: &MonteCLoRAConfig) -> Result<()> {
    let moves = |prior: Prior| matches!(prior.form, PriorForm::ExpectedUpdate { .. });
    if config.prior.is_some_and(|prior| !moves(prior)) {
        let reason = "A, B and the head are frozen post hoc, and of the priors only expected_update has a \
                      gradient for rho";
        return Err(Error::config("prior", reason));
    }
    Ok(())
}

/// The alpha whose scale is exactly `scale`: a quotient times its divisor may be off in the last bit.
fn alpha(scale: f64, rank: usize, use_rslora: bool) -> f64 {
    let near = scale / low_rank::scaling(rank, 1.0, use_rslora);
    let exact = |alpha: &f64| low_rank::scaling(rank, *alpha, use_rslora) == scale;
    [near, near.next_up(), near.next_down()].into_iter().find(exact).unwrap_or(near)
}
