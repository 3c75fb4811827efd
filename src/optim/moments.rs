//! What an optimiser remembers, and how one goes on from it.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use crate::adapter::Params;
use crate::error::{Error, Result};
use crate::util::finite::is_finite;

/// What an optimiser remembers of one parameter.
#[derive(Debug, Clone)]
pub struct Moments {
    /// The running mean of its gradients.
    pub first: Tensor,
    /// The running mean of their squares; under IVON of the Hessian's diagonal.
    pub second: Tensor,
    /// The steps it has taken: the correction of a mean that began at zero depends on its own
    /// number, not on that of parameters which began earlier.
    pub steps: usize,
}

/// A copy of these moments in the dtype and the place of the parameters of `params`.
///
/// # Errors
/// If a name is unknown to the store, a trainable parameter is missing, a shape differs, or moments hold NaN,
/// infinity or a second moment below `least`.
pub(super) fn restored(
    params: &Params,
    moments: &BTreeMap<String, Moments>,
    least: f64,
) -> Result<BTreeMap<String, Moments>> {
    if let Some((name, _)) = params.trainable().iter().find(|(name, _)| !moments.contains_key(name)) {
        return Err(Error::tensor(name, "there are no moments of this trainable parameter"));
    }
    let mut restored = BTreeMap::new();
    for (name, Moments { first, second, steps }) in moments {
        let Some(param) = params.get(name) else {
            return Err(Error::tensor(name, "there is no parameter of this name"));
        };
        let shape = param.var.shape();
        if let Some(other) = [first, second].into_iter().find(|moment| moment.shape() != shape) {
            let reason = format!("expected moments of shape {shape:?}, got {:?}", other.shape());
            return Err(Error::tensor(name, reason));
        }
        let floats = [DType::F64, DType::F32, DType::F16, DType::BF16];
        if let Some(other) = [first, second].into_iter().find(|moment| !floats.contains(&moment.dtype())) {
            let reason = format!("expected moments of F64, F32, F16 or BF16, got {:?}", other.dtype());
            return Err(Error::tensor(name, reason));
        }
        // The root of what is below zero is NaN.
        if !(is_finite(first)? && is_finite(&(second - least)?.sqrt()?)?) {
            let reason = format!("its moments hold NaN, infinity or a second moment below {least}");
            return Err(Error::tensor(name, reason));
        }
        let copy = |moment: &Tensor| -> Result<Tensor> {
            Ok(moment.to_device(param.var.device())?.to_dtype(param.var.dtype())?.force_contiguous()?)
        };
        restored.insert(name.clone(), Moments { first: copy(first)?, second: copy(second)?, steps: *steps });
    }
    Ok(restored)
}
