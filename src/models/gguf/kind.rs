//! The storage formats of matrices in written GGUF files.

use std::str::FromStr;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::models::quantize::bytes;
use crate::util::finite::first_non_finite;

/// The storage format of the matrices in a written GGUF file; vectors stay f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GgufKind {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// 8 bits per value, and a scale for every 32 values.
    Q8_0,
    /// 4.5 bits per value; about 6.5 (`Q6_K`) for the head, or the embedding if it is also the head.
    Q4K,
}

impl FromStr for GgufKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.to_ascii_lowercase().as_str() {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "q8_0" => Ok(Self::Q8_0),
            "q4k" | "q4_k" => Ok(Self::Q4K),
            _ => Err(Error::config("gguf", format!("expected f32, f16, q8_0 or q4k, got {text}"))),
        }
    }
}

impl GgufKind {
    /// llama.cpp's number of the file type.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q8_0 => 7,
            Self::Q4K => 14,
        }
    }

    /// The type of a tensor of this shape. It falls back as in llama.cpp if no block divides the width.
    pub(super) fn of(self, shape: &[usize], is_head: bool) -> GgmlDType {
        let [_, width] = shape else { return GgmlDType::F32 };
        let wanted: &[GgmlDType] = match (self, is_head) {
            (Self::F32, _) => &[GgmlDType::F32],
            (Self::F16, _) => &[],
            (Self::Q8_0, _) => &[GgmlDType::Q8_0],
            (Self::Q4K, true) => &[GgmlDType::Q6K, GgmlDType::Q8_0],
            (Self::Q4K, false) => &[GgmlDType::Q4K, GgmlDType::Q5_0],
        };
        let fits = |kind: &&GgmlDType| width.is_multiple_of(kind.block_size());
        wanted.iter().find(fits).copied().unwrap_or(GgmlDType::F16)
    }
}

/// Encodes a tensor as `kind`.
pub(super) fn encoded(tensor: &Tensor, kind: GgmlDType) -> Result<Vec<u8>> {
    let tensor = tensor.detach().to_device(&Device::Cpu)?;
    if kind == GgmlDType::F16 && first_non_finite(&tensor.to_dtype(DType::F16)?)?.is_some() {
        return Err(Error::config("gguf", "a weight exceeds the range of half precision: use f32"));
    }
    Ok(bytes(&tensor, kind)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_that_no_block_divides_get_what_llama_cpp_takes() {
        use GgmlDType as T;
        for (kind, width, is_head, expected) in [
            (GgufKind::Q4K, 512, false, T::Q4K),
            (GgufKind::Q4K, 512, true, T::Q6K),
            (GgufKind::Q4K, 96, false, T::Q5_0),
            (GgufKind::Q4K, 96, true, T::Q8_0),
            (GgufKind::Q4K, 40, true, T::F16),
            (GgufKind::Q8_0, 96, false, T::Q8_0),
            (GgufKind::Q8_0, 172, false, T::F16),
            (GgufKind::F16, 512, true, T::F16),
            (GgufKind::F32, 40, false, T::F32),
        ] {
            assert_eq!(kind.of(&[8, width], is_head), expected, "{kind:?} {width}");
        }
        assert_eq!(GgufKind::Q4K.of(&[512], false), T::F32);
        assert!("q4k".parse::<GgufKind>().is_ok() && "iq2".parse::<GgufKind>().is_err());
    }
}
