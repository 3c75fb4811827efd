//! Merges adapters into the layers of a model in use, and unmerges them.

use candle_nn::Linear;

use crate::adapter::{AdaptableLinear, AdaptableModel};
use crate::error::{Error, Result};
use crate::inject::activate::check_unmerged;

/// Merges the means of the active adapters into their layers; returns the number of merged layers.
///
/// A merged layer computes its mean at the cost of its base layer. Posterior draws and training are errors
/// until [`unmerge`], and changes of an adapter's parameters do not affect the merged layer. The original
/// weights are kept.
///
/// # Errors
/// If no adapter is active, a layer is merged already, a method has no weight update, a merged weight would
/// not be finite, or a base is quantised (see [`merge_dequantized`]).
pub fn merge(model: &mut dyn AdaptableModel) -> Result<usize> {
    merge_as(model, &AdaptableLinear::merged_layer)
}

/// [`merge`] that also accepts quantised bases. Such a layer becomes a dense one, with the dequantised weight
/// plus the update, at four bytes per weight in memory (two for a half-precision base). The quantisation
/// error of the base remains; nothing is quantised again.
///
/// # Errors
/// As [`merge`], except for quantised bases.
pub fn merge_dequantized(model: &mut dyn AdaptableModel) -> Result<usize> {
    merge_as(model, &AdaptableLinear::merged_dequantized)
}

/// Replaces each layer by the result of `merge`.
fn merge_as(
    model: &mut dyn AdaptableModel,
    merge: &dyn Fn(&AdaptableLinear) -> Result<Option<Linear>>,
) -> Result<usize> {
    check_unmerged(model)?;
    let mut merged = Vec::new();
    model.visit_linears(&mut |layer| {
        merged.push(merge(layer)?);
        Ok(())
    })?;
    let count = merged.iter().flatten().count();
    if count == 0 {
        return Err(Error::config("adapter", "no layer has an active adapter: there is nothing to merge"));
    }
    let mut merged = merged.into_iter();
    model.visit_linears_mut(&mut |layer| {
        layer.set_merged(merged.next().flatten());
        Ok(())
    })?;
    Ok(count)
}

/// Unmerges all merged layers; the base weights are exactly those from before. Returns their number, which
/// may be 0.
///
/// # Errors
/// If the walk fails.
pub fn unmerge(model: &mut dyn AdaptableModel) -> Result<usize> {
    let mut count = 0;
    model.visit_linears_mut(&mut |layer| {
        count += usize::from(layer.is_merged());
        layer.set_merged(None);
        Ok(())
    })?;
    Ok(count)
}
