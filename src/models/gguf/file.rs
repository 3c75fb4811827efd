//! A memory-mapped GGUF file: metadata values by key, tensors by name.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::{QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;

use super::architecture::Architecture;
use super::header::{Header, TensorInfo};
use super::value::Value;
use crate::error::{Error, Result};
use crate::util::lfs_pointer;

/// A model in a GGUF file, the format of llama.cpp and Ollama.
///
/// Opening reads and checks the header; weights stay on disk until requested. Clones share the mapping.
#[derive(Clone)]
pub struct Gguf {
    path: PathBuf,
    map: Arc<Mmap>,
    header: Arc<Header>,
    architecture: &'static Architecture,
}

impl Gguf {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// If the file cannot be read, is not GGUF, is truncated, is one part of a split model or not a model, or
    /// has an unsupported architecture or tensor type, which the error names.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: as for safetensors, the file must not be modified in place while it is mapped; every offset
        // is checked against its length when it is opened.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        lfs_pointer::refuse(&map, path)?;
        let header = Header::parse(&map).map_err(|reason| Error::format(path, reason))?;
        if let Some(parts) =
            header.metadata.get("split.count").and_then(Value::as_u64).filter(|parts| *parts > 1)
        {
            let reason = format!("this is one of {parts} parts: join them with llama-gguf-split --merge");
            return Err(Error::format(path, reason));
        }
        let text = |key: &str| header.metadata.get(key).and_then(Value::as_str);
        if let Some(kind) = text("general.type").filter(|kind| *kind != "model") {
            let reason = format!("expected a model, got general.type {kind}");
            return Err(Error::format(path, reason));
        }
        let Some(name) = text("general.architecture") else {
            return Err(Error::format(path, "general.architecture is missing"));
        };
        let architecture = Architecture::named(name).map_err(|reason| Error::format(path, reason))?;
        Ok(Self { path: path.to_path_buf(), map: Arc::new(map), header: Arc::new(header), architecture })
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of a metadata key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(key)
    }

    pub(super) fn architecture(&self) -> &'static Architecture {
        self.architecture
    }

    /// The entry of the tensor with this GGUF name.
    pub(super) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.get(name)
    }

    /// The GGUF names of the tensors.
    pub(super) fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// The bytes of a tensor.
    pub(super) fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.map[info.offset..info.offset + info.size]
    }

    /// Creates the tensor `info` in its stored type from `bytes`.
    pub(super) fn load(&self, info: &TensorInfo, bytes: Cow<[u8]>, device: &Device) -> Result<QTensor> {
        Ok(QTensor::new(QStorage::from_data(bytes, device, info.kind)?, info.shape.clone())?)
    }

    /// Reads a vector that is not a weight, such as the factors of rotary frequencies, as f32.
    pub(super) fn vector(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(info) = self.info(name) else { return Ok(None) };
        let tensor: Tensor =
            self.load(info, Cow::Borrowed(self.bytes(info)), &Device::Cpu)?.dequantize(&Device::Cpu)?;
        Ok(Some(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?))
    }

    /// An error about a value or tensor of this file.
    pub(super) fn error(&self, reason: impl Into<String>) -> Error {
        Error::format(&self.path, reason)
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (path, tensors) = (self.path.display(), self.header.tensors.len());
        write!(f, "Gguf({path}, {}, {tensors} tensors)", self.architecture.name)
    }
}
