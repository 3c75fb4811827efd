//! Writing a GGUF file, one tensor at a time.

use std::io::{self, BufWriter, Write};
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::Tensor;

use super::kind::encoded;
use super::value::{write_text, Value};
use crate::error::{Error, Result};
use crate::util::files;

/// The alignment of tensors, in bytes.
const ALIGNMENT: usize = 32;

/// A tensor that is computed when it is written.
pub(super) struct Entry<'a> {
    /// GGUF's name.
    pub name: String,
    /// Slowest axis first.
    pub shape: Vec<usize>,
    pub kind: GgmlDType,
    pub make: Box<dyn Fn() -> Result<Tensor> + 'a>,
}

impl Entry<'_> {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() / self.kind.block_size() * self.kind.type_size()
    }
}

/// Writes the file `path`, completely or not at all. Only one tensor is in memory at a time.
///
/// # Errors
/// If a tensor cannot be made or encoded, does not have its declared shape, or the file cannot be written.
pub(super) fn write(path: &Path, metadata: &[(String, Value)], entries: &[Entry]) -> Result<()> {
    files::write_with(path, |file| {
        let mut out = BufWriter::new(file);
        let mut written = Head::of(metadata, entries).map_err(Error::io(path))?;
        written.pad();
        out.write_all(&written.0).map_err(Error::io(path))?;
        for entry in entries {
            let tensor = (entry.make)()?;
            if tensor.dims() != entry.shape {
                let reason = format!("expected shape {:?}, got {:?}", entry.shape, tensor.dims());
                return Err(Error::tensor(&entry.name, reason));
            }
            let bytes =
                encoded(&tensor, entry.kind).map_err(|e| Error::tensor(&entry.name, e.to_string()))?;
            let padding = bytes.len().next_multiple_of(ALIGNMENT) - bytes.len();
            out.write_all(&bytes)
                .and_then(|()| out.write_all(&[0; ALIGNMENT][..padding]))
                .map_err(Error::io(path))?;
        }
        out.flush().map_err(Error::io(path))
    })
}

/// The header, up to the tensor data.
struct Head(Vec<u8>);

impl Head {
    fn of(metadata: &[(String, Value)], entries: &[Entry]) -> io::Result<Self> {
        let mut head = Self(b"GGUF".to_vec());
        let out = &mut head.0;
        out.write_all(&3u32.to_le_bytes())?;
        out.write_all(&(entries.len() as u64).to_le_bytes())?;
        out.write_all(&(metadata.len() as u64).to_le_bytes())?;
        for (key, value) in metadata {
            write_text(out, key)?;
            value.write(out)?;
        }
        let mut offset = 0u64;
        for entry in entries {
            write_text(out, &entry.name)?;
            out.write_all(&(entry.shape.len() as u32).to_le_bytes())?;
            for axis in entry.shape.iter().rev() {
                out.write_all(&(*axis as u64).to_le_bytes())?;
            }
            out.write_all(&number(entry.kind).to_le_bytes())?;
            out.write_all(&offset.to_le_bytes())?;
            offset += entry.bytes().next_multiple_of(ALIGNMENT) as u64;
        }
        Ok(head)
    }

    /// Pads with zeros to the beginning of the tensor data.
    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
    }
}

/// GGUF's number of a tensor type.
fn number(kind: GgmlDType) -> u32 {
    match kind {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q8_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::Q8K => 15,
        GgmlDType::BF16 => 30,
    }
}
