//! Quantisation of weights at load, one matrix at a time.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;

use super::weights::{QuantizedSource, Wanted};
use crate::error::{Error, Result};
use crate::ops::QuantizedWeight;

/// The kinds of blocks by their names in llama.cpp and candle.
const KINDS: [(&str, GgmlDType); 12] = [
    ("bf16", GgmlDType::BF16),
    ("f16", GgmlDType::F16),
    ("q4_0", GgmlDType::Q4_0),
    ("q4_1", GgmlDType::Q4_1),
    ("q5_0", GgmlDType::Q5_0),
    ("q5_1", GgmlDType::Q5_1),
    ("q8_0", GgmlDType::Q8_0),
    ("q2k", GgmlDType::Q2K),
    ("q3k", GgmlDType::Q3K),
    ("q4k", GgmlDType::Q4K),
    ("q5k", GgmlDType::Q5K),
    ("q6k", GgmlDType::Q6K),
];

/// The number of elements that one task quantises.
const PIECE: usize = 1 << 18;

/// The kind of blocks that a model's matrices are quantised to at load. BF16 and F16 keep the numbers of a
/// checkpoint of that dtype in half the memory of f32, while activations stay f32; on the CPU this is faster
/// than a base of that dtype, whose products are computed in it.
///
/// Linear layers use this kind. The embedding and the head are more sensitive and use Q6K, or the layers' own
/// kind if that has at least 8 bits. If the row length of a matrix is not a multiple of the block size (256 for the K kinds), the
/// matrix uses the nearest kind with blocks of 32, as in llama.cpp; if it is not a multiple of 32 either, the
/// matrix is not quantised. Both cases are logged. Other tensors (norms, biases, task heads) are never
/// quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantization(GgmlDType);

impl Quantization {
    /// The kind of blocks of the linear layers.
    pub fn kind(self) -> GgmlDType {
        self.0
    }

    /// A source that quantises each matrix of `builder` (best in f32 on the CPU) when it is fetched, so that
    /// at most one of them is in memory unquantised at any time.
    pub fn source(self, builder: &VarBuilder<'static>) -> Arc<dyn QuantizedSource> {
        Arc::new(AtLoad { builder: builder.root(), kind: self.0, told: Mutex::default() })
    }
}

impl FromStr for Quantization {
    type Err = Error;

    /// Parses `bf16`, `f16`, `q4_0`, `q4_1`, `q5_0`, `q5_1`, `q8_0`, `q2k`, `q3k`, `q4k` (also written `q4_k`), `q5k` or
    /// `q6k`, in any case.
    fn from_str(name: &str) -> Result<Self> {
        let plain = name.to_lowercase().replace("_k", "k");
        match KINDS.iter().find(|(known, _)| *known == plain) {
            Some((_, kind)) => Ok(Self(*kind)),
            None => {
                let known: Vec<_> = KINDS.iter().map(|(known, _)| *known).collect();
                Err(Error::config("quantize", format!("expected {}, got {name:?}", known.join(", "))))
            }
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&name(self.0))
    }
}

/// The name of a kind, as in [`QuantizedWeight::kind`].
fn name(kind: GgmlDType) -> String {
    format!("{kind:?}").to_lowercase()
}

/// Quantises the matrices of a builder as they are fetched.
struct AtLoad {
    builder: VarBuilder<'static>,
    kind: GgmlDType,
    told: Mutex<BTreeSet<String>>,
}

impl QuantizedSource for AtLoad {
    fn get(&self, wanted: &Wanted) -> Result<Option<QuantizedWeight>> {
        let (rows, columns) = wanted.shape;
        let is_wide = matches!(self.kind, GgmlDType::Q8_0 | GgmlDType::BF16 | GgmlDType::F16);
        let meant = if wanted.is_table && !is_wide { GgmlDType::Q6K } else { self.kind };
        let Some(kind) = fitting(meant, columns) else {
            self.tell(format!(
                "matrices with rows of {columns} are not quantised: no block size divides the row length"
            ));
            return Ok(None);
        };
        if kind != meant {
            let (meant, kind) = (name(meant), name(kind));
            self.tell(format!(
                "matrices with rows of {columns} become {kind}: the block size of {meant} does not divide \
                 the row length"
            ));
        }
        let dense = self.builder.get_with_hints((rows, columns), wanted.name, wanted.init)?;
        let blocks = quantize(dense, kind, wanted.device)?;
        Ok(Some(QuantizedWeight::new(Arc::new(blocks), wanted.dtype)?))
    }
}

impl AtLoad {
    /// Logs a warning, once for each text.
    fn tell(&self, what: String) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if !told.contains(&what) {
            tracing::warn!("quantize: {what}");
            told.insert(what);
        }
    }
}

/// `kind`, or else the nearest kind, whose block size divides `columns`; `None` if neither does.
fn fitting(kind: GgmlDType, columns: usize) -> Option<GgmlDType> {
    let nearest = match kind {
        GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
        GgmlDType::Q4K => GgmlDType::Q5_0,
        GgmlDType::Q5K => GgmlDType::Q5_1,
        GgmlDType::Q6K => GgmlDType::Q8_0,
        other => other,
    };
    [kind, nearest].into_iter().find(|kind| columns > 0 && columns.is_multiple_of(kind.block_size()))
}

/// Quantises a matrix to blocks of `kind`, on `device`.
fn quantize(dense: Tensor, kind: GgmlDType, device: &Device) -> Result<QTensor> {
    let dense = dense.detach().to_device(&Device::Cpu)?;
    let (shape, bytes) = (dense.dims2()?, bytes(&dense, kind)?);
    drop(dense);
    Ok(QTensor::new(QStorage::from_data(Cow::Owned(bytes), device, kind)?, shape)?)
}

/// Quantises a tensor on the host to blocks of `kind`, in chunks of rows on all threads.
///
/// # Errors
/// If the block size does not divide the row length.
pub(super) fn bytes(dense: &Tensor, kind: GgmlDType) -> candle_core::Result<Vec<u8>> {
    let rows = if dense.rank() == 2 { dense.clone() } else { dense.flatten_all()?.unsqueeze(0)? };
    let (count, columns) = rows.dims2()?;
    let piece = (PIECE / columns.max(1)).max(1);
    let starts: Vec<usize> = (0..count).step_by(piece).collect();
    let work = |&first: &usize| -> candle_core::Result<Vec<u8>> {
        let rows = rows.narrow(0, first, piece.min(count - first))?.to_dtype(DType::F32)?;
        // Candle quantises from the start of a tensor's storage, even if the tensor is a view with an offset.
        Ok(QTensor::quantize(&rows.force_contiguous()?, kind)?.data()?.into_owned())
    };
    let parts = starts.par_iter().map(work).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(parts.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_a_large_matrix_is_quantised() -> Result<()> {
        let (rows, columns) = (3 * PIECE / 96 + 5, 96);
        let numbers = Tensor::arange(0f32, (rows * columns) as f32, &Device::Cpu)?;
        let dense = (numbers / (rows * columns) as f64)?.reshape((rows, columns))?;
        let builder = VarBuilder::from_tensors(
            [("w".to_string(), dense.clone())].into_iter().collect(),
            DType::F32,
            &Device::Cpu,
        );
        let source = "q8_0".parse::<Quantization>()?.source(&builder);
        let (init, device) = (candle_nn::Init::Const(0.0), &Device::Cpu);
        let wanted =
            Wanted { name: "w", shape: (rows, columns), is_table: false, init, dtype: DType::F32, device };
        let blocks = source.get(&wanted)?.unwrap().dequantize()?;
        let worst = (blocks - &dense)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(worst < 0.005, "{worst}"); // half of a step of 1 / 127
                                           // The numbers of a checkpoint of the same dtype are kept as they are, also in a table.
        let rounded = dense.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
        for is_table in [false, true] {
            let wanted = Wanted { is_table, ..wanted };
            let kept = "bf16".parse::<Quantization>()?.source(&builder).get(&wanted)?.unwrap();
            assert_eq!((kept.kind().as_str(), kept.bytes()), ("bf16", 2 * rows * columns));
            let worst = (kept.dequantize()? - &rounded)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert_eq!(worst, 0.0);
        }
        Ok(())
    }

    #[test]
    fn a_part_of_a_tensor_is_quantised_as_it_stands_alone() -> Result<()> {
        let all = Tensor::arange(0f32, 128f32, &Device::Cpu)?.reshape((4, 32))?;
        let (part, alone) = (all.narrow(0, 2, 2)?, all.narrow(0, 2, 2)?.force_contiguous()?);
        assert_eq!(bytes(&part, GgmlDType::Q8_0)?, bytes(&alone, GgmlDType::Q8_0)?);
        assert_ne!(bytes(&part, GgmlDType::Q8_0)?, bytes(&all.narrow(0, 0, 2)?, GgmlDType::Q8_0)?);
        Ok(())
    }
}
