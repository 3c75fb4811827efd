//! Merging adapters into the layers they adapt, on the model in use, and taking them apart again.

use candle_nn::Linear;

use crate::adapter::{AdaptableLinear, AdaptableModel};
use crate::error::{Error, Result};
use crate::inject::activate::check_unmerged;

/// Merges the active adapters' means into their layers: from then on each costs what its base costs
/// and computes its mean; posterior draws and training are refused until [`unmerge`]. What changes an
/// adapter's parameters meanwhile does not change the layer. The original weights stay beside it.
/// Returns the number of merged layers.
///
/// # Errors
/// If no adapter is active, one is merged already, a method has no change of weights, a merged weight would not be
/// finite, or a base is quantised ([`merge_dequantized`]).
pub fn merge(model: &mut dyn AdaptableModel) -> Result<usize> {
    merge_as(model, &AdaptableLinear::merged_layer)
}

/// [`merge`] for quantised bases too: such a layer becomes one of numbers, its dequantised weight and the change, which
/// takes four bytes a number in memory (two of a half-width base). What the base lost when it was quantised stays
/// lost; nothing is rounded once more.
///
/// # Errors
/// As [`merge`], but for the quantised.
pub fn merge_dequantized(model: &mut dyn AdaptableModel) -> Result<usize> {
    merge_as(model, &AdaptableLinear::merged_dequantized)
}

/// Puts what `merged` says of each layer in its place.
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
        return Err(Error::config("adapter", "no layer has an active adapter to merge"));
    }
    let mut merged = merged.into_iter();
    model.visit_linears_mut(&mut |layer| {
        layer.set_merged(merged.next().flatten());
        Ok(())
    })?;
    Ok(count)
}

/// Takes all merged layers apart again: the base's weights are the very same as before. Returns
/// their number, which may be 0.
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
