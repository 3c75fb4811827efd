//! The scales of quantised blocks, to find non-finite values without dequantising.

use candle_core::quantized::GgmlDType;
use rayon::prelude::*;

/// The byte offsets of the scales in a block; each scale is an f16.
fn scales(kind: GgmlDType) -> &'static [usize] {
    match kind {
        GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
        GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q2K => &[80, 82],
        GgmlDType::Q3K => &[108],
        GgmlDType::Q6K => &[208],
        // The last two quantise the inputs of matrix products and do not occur in files.
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_1 | GgmlDType::Q8K => &[],
    }
}

/// Returns the first block with a NaN or infinite scale. `None` means that all values are finite.
pub(super) fn first_non_finite(bytes: &[u8], kind: GgmlDType) -> Option<usize> {
    let scales = scales(kind);
    let infinite = |block: &[u8]| {
        // NaN and infinity have all five exponent bits set; they are in the upper byte.
        scales.iter().any(|at| block.get(at + 1).is_some_and(|upper| upper & 0x7c == 0x7c))
    };
    bytes.par_chunks(kind.type_size()).position_first(infinite)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::{QStorage, QTensor};
    use candle_core::{Device, Result, Tensor};
    use std::borrow::Cow;

    #[test]
    fn scales_stand_where_dequantising_finds_them() -> Result<()> {
        use GgmlDType as T;
        for kind in [T::Q4_0, T::Q4_1, T::Q5_0, T::Q5_1, T::Q8_0, T::Q2K, T::Q3K, T::Q4K, T::Q5K, T::Q6K] {
            let (width, size) = (2 * kind.block_size(), kind.type_size());
            let numbers = Tensor::arange(0f32, width as f32, &Device::Cpu)?.reshape((1, width))?;
            let sound = QTensor::quantize(&numbers, kind)?.data()?.into_owned();
            assert_eq!(first_non_finite(&sound, kind), None, "{kind:?}");
            // Infinity at each offset of the second block. Bytes outside the scales hold integers.
            for at in (0..size).step_by(2) {
                let mut bytes = sound.clone();
                bytes[size + at..size + at + 2].copy_from_slice(&0x7c00u16.to_le_bytes());
                let storage = QStorage::from_data(Cow::Borrowed(&bytes), &Device::Cpu, kind)?;
                let values = QTensor::new(storage, (1, width))?.dequantize(&Device::Cpu)?.to_vec2::<f32>()?;
                let finite = values[0].iter().all(|value| value.is_finite());
                assert_eq!(first_non_finite(&bytes, kind), (!finite).then_some(1), "{kind:?} at {at}");
            }
        }
        Ok(())
    }
}
