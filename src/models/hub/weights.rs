//! Safetensors weights, checked and memory-mapped.
//!
//! A tensor is checked when it is requested: its dtype, its shape, and that all elements are finite, both as
//! stored in its file and in the dtype in which it is loaded.

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::safetensors::{Load, MmapedSafetensors};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::SafeTensors;

use crate::error::{Error, Result};
use crate::util::lfs_pointer;

/// The sorted names of the tensors in a safetensors file, after checking that its header, the bounds of each
/// tensor and the file's length agree.
pub(super) fn tensor_names(path: &Path) -> Result<Vec<String>> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map lives for this function and only its header is read. Another process that
    // shortens the file meanwhile could still fault this one: the weights of a model that is in
    // use must not be rewritten in place (the hub's cache and safetensors rename whole files).
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    lfs_pointer::refuse(&map, path)?;
    let (_, metadata) = SafeTensors::read_metadata(&map)
        .map_err(|e| Error::format(path, format!("not a whole safetensors file: {e}")))?;
    let mut names: Vec<String> = metadata.tensors().into_keys().collect();
    names.sort_unstable();
    Ok(names)
}

/// A builder over memory-mapped files, which [`tensor_names`] must have checked.
pub(super) fn map_builder(paths: &[PathBuf], dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
    let backend = MappedWeights::of(paths)?;
    Ok(VarBuilder::from_backend(Box::new(backend), dtype, device.clone()))
}

/// Maps the files into memory.
pub(super) fn map(paths: &[PathBuf]) -> Result<MmapedSafetensors> {
    // SAFETY: as above, the files must not be rewritten in place while the map lives. Mapping is
    // what keeps a model of many gigabytes from being read whole before its first tensor.
    #[allow(unsafe_code)]
    let mapped = unsafe { MmapedSafetensors::multi(paths) }?;
    Ok(mapped)
}

/// The memory-mapped files behind a `VarBuilder`, which [`tensor_names`] must have checked.
pub(super) struct MappedWeights {
    mapped: MmapedSafetensors,
    paths: Vec<PathBuf>,
}

impl MappedWeights {
    pub fn of(paths: &[PathBuf]) -> Result<Self> {
        Ok(Self { mapped: map(paths)?, paths: paths.to_vec() })
    }

    /// The names of the tensors.
    pub fn names(&self) -> Vec<String> {
        self.mapped.tensors().into_iter().map(|(name, _)| name).collect()
    }

    /// The tensor `name` as stored, if there is one.
    pub fn view(&self, name: &str) -> Option<TensorView<'_>> {
        self.mapped.get(name).ok()
    }

    /// Loads the tensor `name`, if it is a valid weight.
    fn load(&self, name: &str, shape: Option<&Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
        let Ok(view) = self.mapped.get(name) else { return Err(self.missing(name)) };
        if let Some(shape) = shape.filter(|shape| shape.dims() != view.shape()) {
            return Err(self.unfit(name, format!("expected shape {shape:?}, got {:?}", view.shape())));
        }
        match is_finite(&view) {
            Some(true) => match first_beyond(&view, dtype) {
                Some((at, value)) => {
                    let hint = if dtype == DType::F16 { ": load the base as bf16 or f32" } else { "" };
                    let reason =
                        format!("value {at} is {value}, more than {} can hold{hint}", dtype.as_str());
                    Err(self.unfit(name, reason))
                }
                None => Ok(view.load(device)?.to_dtype(dtype)?),
            },
            Some(false) => Err(self.unfit(name, "it holds NaN or infinity".to_string())),
            None => {
                let reason = format!("expected weights of F64, F32, F16 or BF16, got {:?}", view.dtype());
                Err(self.unfit(name, reason))
            }
        }
    }

    /// The error for a tensor that is in no file.
    pub fn missing(&self, name: &str) -> Error {
        let tied =
            |name: &str| name.ends_with("embed_tokens.weight") || name.ends_with("word_embeddings.weight");
        let names = || self.mapped.tensors().into_iter().map(|(name, _)| name);
        let hint = if name.ends_with("lm_head.weight") && names().any(|name| tied(&name)) {
            ": if lm_head shares the embedding's weight, set \"tie_word_embeddings\": true in config.json"
                .to_string()
        } else if ["pooler.dense.weight", "head.dense.weight"].iter().any(|layer| name.ends_with(layer)) {
            // A masked-language-model BERT lacks the former, a bare ModernBERT the latter.
            ": the checkpoint was saved without this layer before the classifier; create it once, in Python, \
             by AutoModelForSequenceClassification.from_pretrained(DIR).save_pretrained(DIR), and use \
             --new-head"
                .to_string()
        } else {
            names().min().map(|first| format!(" (it has others, such as {first})")).unwrap_or_default()
        };
        match self.paths.as_slice() {
            [path] => Error::format(path, format!("there is no tensor {name}{hint}")),
            paths => {
                let dir = paths.first().and_then(|path| path.parent()).unwrap_or(Path::new("."));
                let reason = format!("none of the {} shards has a tensor {name}{hint}", paths.len());
                Error::format(dir, reason)
            }
        }
    }

    /// The error for an invalid tensor.
    pub fn unfit(&self, name: &str, reason: String) -> Error {
        let holds = |path: &&PathBuf| tensor_names(path).is_ok_and(|names| names.iter().any(|n| n == name));
        match self.paths.iter().find(holds) {
            Some(path) => Error::format(path, format!("tensor {name}: {reason}")),
            None => Error::tensor(name, reason),
        }
    }
}

impl SimpleBackend for MappedWeights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _hint: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Ok(self.load(name, Some(&shape), dtype, device)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        Ok(self.load(name, None, dtype, device)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.mapped.get(name).is_ok()
    }
}

/// The index and value of the first element that becomes infinite in `dtype`.
fn first_beyond(view: &TensorView, dtype: DType) -> Option<(usize, f64)> {
    // From this magnitude on, a cast rounds to infinity: half a step beyond the largest finite number.
    let bound = match dtype {
        DType::F16 => 65520.0,
        DType::BF16 => (2.0 - 2f64.powi(-8)) * 2f64.powi(127),
        DType::F32 => (2.0 - 2f64.powi(-24)) * 2f64.powi(127),
        _ => return None,
    };
    macro_rules! first {
        ($bytes:literal, $number:expr) => {{
            let (numbers, _) = view.data().as_chunks::<$bytes>();
            let beyond = |bytes: &[u8; $bytes]| f64::abs($number(*bytes)) >= bound;
            let at = numbers.par_iter().position_first(beyond)?;
            Some((at, $number(numbers[at])))
        }};
    }
    match (view.dtype(), dtype) {
        (Dtype::F64, _) => first!(8, f64::from_le_bytes),
        (Dtype::F32, DType::F16 | DType::BF16) => first!(4, |bytes| f64::from(f32::from_le_bytes(bytes))),
        // A bf16 is the upper half of an f32.
        (Dtype::BF16, DType::F16) => {
            first!(2, |[low, high]: [u8; 2]| f64::from(f32::from_le_bytes([0, 0, low, high])))
        }
        _ => None,
    }
}

/// Whether every element is finite; `None` for a dtype that weights cannot have. It reads data that is copied
/// afterwards anyway, at memory bandwidth.
fn is_finite(view: &TensorView) -> Option<bool> {
    // All bits of the exponent set: NaN or infinity.
    macro_rules! check {
        ($bits:ty, $exponent:expr) => {
            view.data().par_chunks(1 << 20).all(|piece| {
                let (numbers, _) = piece.as_chunks();
                // No early exit, so that the loop has no branch.
                numbers.iter().fold(true, |finite, bytes| {
                    finite & (<$bits>::from_le_bytes(*bytes) & $exponent != $exponent)
                })
            })
        };
    }
    Some(match view.dtype() {
        Dtype::F64 => check!(u64, 0x7ff0_0000_0000_0000),
        Dtype::F32 => check!(u32, 0x7f80_0000),
        Dtype::F16 => check!(u16, 0x7c00),
        Dtype::BF16 => check!(u16, 0x7f80),
        _ => return None,
    })
}
