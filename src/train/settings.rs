//! Settings that must agree between the parts of a run.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::adapter::AdaptableModel;
use crate::data::batch::Batcher;
use crate::error::{Error, Result};

/// Settings by name, as text, that must agree between the parts of a run.
pub type Settings = BTreeMap<String, String>;

/// Returns a setting with its value as JSON: checkpoints must not depend on Rust's names.
///
/// # Errors
/// If `value` cannot be represented in JSON.
pub(super) fn setting(name: &str, value: &impl Serialize) -> Result<(String, String)> {
    let text = serde_json::to_string(value)
        .map_err(|error| Error::config(name, format!("it cannot be written: {error}")))?;
    Ok((name.to_string(), text))
}

/// Returns a checksum of data for the [`Settings`]. `numbers` is everything in the rows.
pub fn fingerprint(numbers: impl IntoIterator<Item = u32>) -> String {
    let mut hasher = crc32fast::Hasher::new();
    numbers.into_iter().for_each(|number| hasher.update(&number.to_le_bytes()));
    format!("CRC-32 {:08x}", hasher.finalize())
}

/// Returns the settings of data, batches, method and frozen base.
pub(super) fn of_run(
    batcher: &Batcher,
    method: &Settings,
    model: &dyn AdaptableModel,
    numbers: impl IntoIterator<Item = u32>,
) -> Settings {
    let rows = ("rows", fingerprint(numbers));
    let dtype = base_kind(model).map(|kind| ("dtype", kind));
    let own = batcher.settings().into_iter().chain([rows]).chain(dtype);
    let own = own.map(|(name, value)| (name.to_string(), value));
    own.chain(method.clone()).collect()
}

/// Returns the storage format of the linear layers' base weights, if there are any. For a dense model it is
/// the dtype of the first layer, as in checkpoints from before quantised layers existed. With a quantised
/// layer, all formats are listed, the quantised ones with the dtype that their rows are dequantised to.
fn base_kind(model: &dyn AdaptableModel) -> Option<String> {
    let (mut first, mut all, mut quantized) = (None, BTreeSet::new(), false);
    let looked = model.visit_linears(&mut |layer| {
        let base = layer.base();
        first.get_or_insert_with(|| base.kind());
        let dense = base.dense().is_some();
        let rows = base.dtype().as_str();
        all.insert(if dense { base.kind() } else { format!("{}/{rows}", base.kind()) });
        quantized |= !dense;
        Ok(())
    });
    let kind = if quantized { Some(all.into_iter().collect::<Vec<_>>().join(", ")) } else { first };
    looked.ok().and(kind)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::adapter::{linears, AdaptableLinear, BaseLinear};
    use crate::ops::QuantizedWeight;

    struct Layers(Vec<AdaptableLinear>);

    impl AdaptableModel for Layers {
        linears!(0);
    }

    fn dense(dtype: DType) -> BaseLinear {
        BaseLinear::new(Tensor::ones((2, 32), dtype, &Device::Cpu).unwrap(), None)
    }

    fn blocks(kind: GgmlDType, dtype: DType) -> BaseLinear {
        let weight = Tensor::ones((2, 32), DType::F32, &Device::Cpu).unwrap();
        let weight = Arc::new(QTensor::quantize(&weight, kind).unwrap());
        BaseLinear::new(QuantizedWeight::new(weight, dtype).unwrap(), None)
    }

    #[test]
    fn another_base_is_another_setting_and_a_dense_one_says_what_it_said() {
        use DType::{BF16, F32};
        use GgmlDType::{Q4_0, Q8_0};
        for (bases, expected) in [
            (vec![], None),
            (vec![dense(BF16)], Some("bf16")),
            (vec![dense(F32), dense(BF16)], Some("f32")),
            (vec![blocks(Q8_0, F32), blocks(Q8_0, F32)], Some("q8_0/f32")),
            (vec![blocks(Q8_0, BF16)], Some("q8_0/bf16")),
            (vec![dense(F32), blocks(Q8_0, F32), blocks(Q4_0, F32)], Some("f32, q4_0/f32, q8_0/f32")),
        ] {
            let layers = bases.into_iter().map(|base| AdaptableLinear::new("layer", base)).collect();
            assert_eq!(base_kind(&Layers(layers)).as_deref(), expected);
        }
    }
}
