//! The optimiser state of a parameter, and how it is restored.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, TensorId};

use crate::adapter::Params;
use crate::error::{Error, Result};
use crate::util::finite::is_finite;

/// The optimiser state of one parameter.
#[derive(Debug, Clone)]
pub struct Moments {
    /// The running mean of the gradients.
    pub first: Tensor,
    /// The running mean of the squared gradients; under IVON, of the Hessian's diagonal.
    pub second: Tensor,
    /// The number of steps this parameter has taken. Bias correction depends on it, not on the steps of
    /// parameters that started earlier.
    pub steps: usize,
}

/// The identities of the parameters that an optimiser's moments belong to. Names do not identify them: if an
/// adapter is removed and another put in its place, the names are the same.
#[derive(Debug, Default)]
pub(super) struct Owners(BTreeMap<String, TensorId>);

impl Owners {
    /// The present parameters of `params`.
    pub fn of(params: &Params) -> Self {
        Self(params.all().into_iter().map(|(name, param)| (name, param.var.id())).collect())
    }

    /// Drops the moments of parameters that were removed from the store or replaced under the same name.
    pub fn forget_others(&mut self, params: &Params, moments: &mut BTreeMap<String, Moments>) {
        let now = Self::of(params);
        let is_same = |name: &String, id| self.0.get(name).is_none_or(|known| known == id);
        moments.retain(|name, _| now.0.get(name).is_some_and(|id| is_same(name, id)));
        *self = now;
    }
}

/// Returns a copy of `moments` in the dtype and on the device of the parameters of `params`.
///
/// # Errors
/// If a name is unknown to the store, a trainable parameter is missing, a shape differs, a moment is not of a
/// float type, or moments hold NaN, infinity or a second moment below `least`.
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
        let param = params.require(name)?;
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
        // The square root of a negative difference is NaN.
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
