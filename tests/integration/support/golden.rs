//! Values that the reference implementations gave, in `tests/data`.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use super::{data, Outcome};

/// The tensors of `tests/data/{file}_golden.safetensors` whose names begin with `prefix/`, without it.
pub fn golden(file: &str, prefix: &str) -> Outcome<HashMap<String, Tensor>> {
    let path = data(&format!("{file}_golden.safetensors"));
    let all = candle_core::safetensors::load(path, &Device::Cpu)?.into_iter();
    let prefix = format!("{prefix}/");
    Ok(all.filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_string(), t))).collect())
}

/// These tensors as weights of a model.
pub fn vb(tensors: &HashMap<String, Tensor>, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.clone(), dtype, &Device::Cpu)
}
