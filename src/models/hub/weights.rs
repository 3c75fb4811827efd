//! Safetensors weights, checked and memory-mapped, and the prefix under which a model's lie.
//!
//! A checkpoint of a bare encoder has no `roberta.` before its names and one with a head has it;
//! [`with_prefix`] finds out which.

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use memmap2::Mmap;
use safetensors::SafeTensors;

use crate::error::{Error, Result};

/// The names of the tensors in a safetensors file, sorted, once its header, the bounds of each
/// tensor and the file's length have been found to agree.
pub(super) fn tensor_names(path: &Path) -> Result<Vec<String>> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map lives for this function and only its header is read. Another process that
    // shortens the file meanwhile could still fault this one: the weights of a model that is in
    // use must not be rewritten in place (the hub's cache and safetensors rename whole files).
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    let (_, metadata) = SafeTensors::read_metadata(&map)
        .map_err(|e| Error::format(path, format!("not a whole safetensors file: {e}")))?;
    let mut names: Vec<String> = metadata.tensors().into_keys().collect();
    names.sort_unstable();
    Ok(names)
}

/// A builder over memory-mapped files that [`tensor_names`] has checked.
pub(super) fn map_builder(paths: &[PathBuf], dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
    // SAFETY: as above, the files must not be rewritten in place while the builder lives. Mapping
    // is what keeps a model of many gigabytes from being read whole before its first tensor.
    #[allow(unsafe_code)]
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(paths, dtype, device) }?;
    Ok(vb)
}

/// The files' tensors as they lie there.
pub(super) fn map(paths: &[PathBuf]) -> Result<MmapedSafetensors> {
    // SAFETY: as for [`map_builder`].
    #[allow(unsafe_code)]
    let mapped = unsafe { MmapedSafetensors::multi(paths) }?;
    Ok(mapped)
}

/// `vb` at the first of the prefixes `candidates` (`"roberta"`, `"bert"`, or `""` for none) under
/// which the tensor `probe` lies, such as `embeddings.word_embeddings.weight`.
///
/// # Errors
/// [`Error::Tensor`] if there is no such tensor under any of them; it names what was looked for.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use monteclora::models::hub::with_prefix;
///
/// let tensor = Tensor::zeros(2, DType::F32, &Device::Cpu)?;
/// let tensors = [("bert.pooler.bias".to_string(), tensor)].into();
/// let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
/// assert_eq!(with_prefix(&vb, &["roberta", "bert", ""], "pooler.bias")?.prefix(), "bert");
/// assert!(with_prefix(&vb, &["roberta", ""], "pooler.bias").is_err());
/// # Ok::<(), monteclora::Error>(())
/// ```
pub fn with_prefix<'a>(vb: &VarBuilder<'a>, candidates: &[&str], probe: &str) -> Result<VarBuilder<'a>> {
    let at = |prefix: &str| match prefix.trim_end_matches('.') {
        "" => vb.clone(),
        prefix => vb.pp(prefix),
    };
    let found = candidates.iter().map(|prefix| at(prefix)).find(|vb| vb.contains_tensor(probe));
    found.ok_or_else(|| {
        let full = |vb: VarBuilder| match vb.prefix() {
            prefix if prefix.is_empty() => probe.to_string(),
            prefix => format!("{prefix}.{probe}"),
        };
        let names: Vec<String> = candidates.iter().map(|prefix| full(at(prefix))).collect();
        Error::tensor(probe, format!("the weights have none of {}", names.join(", ")))
    })
}
