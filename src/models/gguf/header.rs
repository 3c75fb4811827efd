//! The header of a GGUF file: its metadata, and where each tensor lies.
//!
//! The file is not trusted: counts are checked against the remaining bytes before memory is allocated, and
//! tensors against the end of the file and the block size of their type. Candle's own reader turns each
//! number of an array into a value of 32 bytes, and divides by the file's alignment even if it is 0.

use std::collections::BTreeMap;

use candle_core::quantized::GgmlDType;

use super::value::Value;

/// The maximum number of axes of a tensor.
const MAX_AXES: u32 = 4;
/// The default alignment of tensors, in bytes.
const ALIGNMENT: u64 = 32;

/// The header of a file.
#[derive(Debug, Clone, Default)]
pub(super) struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// The type, shape and location of a tensor.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo {
    pub kind: GgmlDType,
    /// Slowest axis first, as in candle.
    pub shape: Vec<usize>,
    /// In bytes from the beginning of the file.
    pub offset: usize,
    /// In bytes.
    pub size: usize,
}

/// Why a file is refused.
type Reason = String;

impl Header {
    /// Parses the header of a file with these bytes.
    pub fn parse(file: &[u8]) -> Result<Self, Reason> {
        let mut at = Cursor { file, at: 0 };
        if at.take(4)? != b"GGUF" {
            return Err("expected a GGUF file, which begins with the letters GGUF".into());
        }
        match at.u32()? {
            2 | 3 => {}
            1 => return Err("version 1 of GGUF is not supported: convert the model again".into()),
            swapped if swapped.swap_bytes() <= 3 => {
                return Err("GGUF of big-endian machines is not supported".into())
            }
            other => return Err(format!("expected version 2 or 3 of GGUF, got {other}")),
        }
        // The shortest tensor entry has an empty name and no axes; the shortest value is one byte.
        let (tensors, values) = (at.count(8 + 4 + 4 + 8, "tensors")?, at.count(8 + 4 + 1, "values")?);
        let mut header = Self::default();
        for _ in 0..values {
            let key = at.text()?;
            let kind = at.u32()?;
            let value = at.value(kind).map_err(|reason| format!("value {key}: {reason}"))?;
            if header.metadata.insert(key.clone(), value).is_some() {
                return Err(format!("value {key} comes twice"));
            }
        }
        for _ in 0..tensors {
            let name = at.text()?;
            let info = at.tensor().map_err(|reason| format!("tensor {name}: {reason}"))?;
            if header.tensors.insert(name.clone(), info).is_some() {
                return Err(format!("tensor {name} comes twice"));
            }
        }
        header.place(at.at as u64, file.len() as u64)?;
        Ok(header)
    }

    /// Makes the tensors' offsets relative to the beginning of the file, and checks that they lie within it.
    fn place(&mut self, end: u64, length: u64) -> Result<(), Reason> {
        let alignment = match self.metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => match value.as_u64() {
                Some(value) if value.is_multiple_of(8) && value.is_power_of_two() && value <= 1 << 20 => {
                    value
                }
                _ => {
                    return Err(format!(
                        "general.alignment: expected a power of two of at least 8, got {value:?}"
                    ))
                }
            },
        };
        let start = end.next_multiple_of(alignment);
        for (name, info) in &mut self.tensors {
            if !(info.offset as u64).is_multiple_of(alignment) {
                return Err(format!(
                    "tensor {name}: its offset {} is no multiple of {alignment}",
                    info.offset
                ));
            }
            let place = start.checked_add(info.offset as u64);
            match place.and_then(|from| Some((from, from.checked_add(info.size as u64)?))) {
                Some((from, to)) if to <= length => info.offset = from as usize,
                _ => {
                    let reason = format!(
                        "tensor {name}: {} bytes at {start} + {}, but the file ends at {length}: it is \
                         truncated",
                        info.size, info.offset
                    );
                    return Err(reason);
                }
            }
        }
        Ok(())
    }
}

/// A read position in the bytes of a file.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Reason> {
        let rest = &self.file[self.at..];
        match rest.get(..count) {
            Some(bytes) => {
                self.at += count;
                Ok(bytes)
            }
            None => Err(format!(
                "the file ends within its header: expected {count} more bytes, got {}",
                rest.len()
            )),
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Reason> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, Reason> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Reason> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// Reads a count of items of at least `least` bytes each, and checks that enough bytes are left for them.
    fn count(&mut self, least: usize, what: &str) -> Result<usize, Reason> {
        let (count, left) = (self.u64()?, self.file.len() - self.at);
        match usize::try_from(count) {
            Ok(fits) if fits <= left / least => Ok(fits),
            _ => Err(format!("the file declares {count} {what}, which do not fit in its last {left} bytes")),
        }
    }

    fn text(&mut self) -> Result<String, Reason> {
        let length = self.count(1, "bytes of a string")?;
        let bytes = self.take(length)?;
        // Tokens of a vocabulary need not be whole characters.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn value(&mut self, kind: u32) -> Result<Value, Reason> {
        Ok(match kind {
            0 => Value::Int(i128::from(self.bytes().map(u8::from_le_bytes)?)),
            1 => Value::Int(i128::from(self.bytes().map(i8::from_le_bytes)?)),
            2 => Value::Int(i128::from(self.bytes().map(u16::from_le_bytes)?)),
            3 => Value::Int(i128::from(self.bytes().map(i16::from_le_bytes)?)),
            4 => Value::U32(self.u32()?),
            5 => Value::Int(i128::from(self.bytes().map(i32::from_le_bytes)?)),
            6 => Value::F32(self.bytes().map(f32::from_le_bytes)?),
            7 => match self.bytes::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("expected 0 or 1 for a boolean, got {other}")),
            },
            8 => Value::Text(self.text()?),
            9 => self.array()?,
            10 => Value::Int(i128::from(self.u64()?)),
            11 => Value::Int(i128::from(self.bytes().map(i64::from_le_bytes)?)),
            12 => Value::F64(self.bytes().map(f64::from_le_bytes)?),
            other => return Err(format!("unknown value type {other}")),
        })
    }

    fn array(&mut self) -> Result<Value, Reason> {
        let kind = self.u32()?;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => return Err("an array of arrays is not supported".into()),
            other => return Err(format!("unknown value type {other}")),
        };
        let count = self.count(width, "values of an array")?;
        Ok(match kind {
            8 => Value::Texts((0..count).map(|_| self.text()).collect::<Result<_, _>>()?),
            5 => Value::Ints(
                (0..count).map(|_| self.bytes().map(i32::from_le_bytes)).collect::<Result<_, _>>()?,
            ),
            6 => Value::Floats(
                (0..count).map(|_| self.bytes().map(f32::from_le_bytes)).collect::<Result<_, _>>()?,
            ),
            _ => {
                self.take(count * width)?;
                Value::Other(count as u64)
            }
        })
    }

    /// Reads a tensor's entry, whose offset is relative to the beginning of the tensor data.
    fn tensor(&mut self) -> Result<TensorInfo, Reason> {
        let axes = self.u32()?;
        if axes > MAX_AXES {
            return Err(format!("expected at most {MAX_AXES} axes, got {axes}"));
        }
        let mut shape = (0..axes).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let kind = supported(self.u32()?)?;
        let offset = self.u64()?;
        let (block, width) = (kind.block_size() as u64, shape.last().copied().unwrap_or(1));
        if !width.is_multiple_of(block) {
            return Err(format!(
                "{kind:?} comes in blocks of {block}, which do not divide a width of {width}"
            ));
        }
        let blocks = shape.iter().try_fold(1u64, |all, axis| all.checked_mul(*axis)).map(|all| all / block);
        let size = blocks.and_then(|blocks| blocks.checked_mul(kind.type_size() as u64));
        let size = size.filter(|size| *size <= self.file.len() as u64);
        match (size.map(usize::try_from), usize::try_from(offset)) {
            (Some(Ok(size)), Ok(offset)) => {
                let shape = shape.into_iter().map(|axis| axis as usize).collect();
                Ok(TensorInfo { kind, shape, offset, size })
            }
            _ => Err(format!("a shape of {shape:?} in {kind:?} at {offset} does not fit in the file")),
        }
    }
}

/// The tensor type with this number in GGUF; the error names an unsupported one.
fn supported(number: u32) -> Result<GgmlDType, Reason> {
    let name = match number {
        0 => return Ok(GgmlDType::F32),
        1 => return Ok(GgmlDType::F16),
        2 => return Ok(GgmlDType::Q4_0),
        3 => return Ok(GgmlDType::Q4_1),
        6 => return Ok(GgmlDType::Q5_0),
        7 => return Ok(GgmlDType::Q5_1),
        8 => return Ok(GgmlDType::Q8_0),
        10 => return Ok(GgmlDType::Q2K),
        11 => return Ok(GgmlDType::Q3K),
        12 => return Ok(GgmlDType::Q4K),
        13 => return Ok(GgmlDType::Q5K),
        14 => return Ok(GgmlDType::Q6K),
        30 => return Ok(GgmlDType::BF16),
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24..=28 => "integers or double precision",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        other => return Err(format!("unknown tensor type {other}")),
    };
    Err(format!("tensors of type {name} are not supported: use a file of Q8_0, Q4_0, Q4_K or similar"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::gguf::value::write_text;

    /// The contents of a test file: metadata values, one tensor, and the size of the data in bytes.
    struct Sketch {
        values: Vec<(&'static str, Value)>,
        /// Name, axes (the fastest first), kind and offset.
        tensor: (&'static str, Vec<u64>, u32, u64),
        data: usize,
    }

    fn sound() -> Sketch {
        let values = vec![
            ("general.architecture", "llama".into()),
            ("tokenizer.ggml.scores", Value::Floats(vec![1.0; 5])),
        ];
        Sketch { values, tensor: ("a.weight", vec![32, 3], 8, 0), data: 102 }
    }

    impl Sketch {
        fn bytes(&self) -> Vec<u8> {
            let mut out = b"GGUF\x03\0\0\0".to_vec();
            out.extend(1u64.to_le_bytes());
            out.extend((self.values.len() as u64).to_le_bytes());
            for (key, value) in &self.values {
                write_text(&mut out, key).unwrap();
                value.write(&mut out).unwrap();
            }
            let (name, axes, kind, offset) = &self.tensor;
            write_text(&mut out, name).unwrap();
            out.extend((axes.len() as u32).to_le_bytes());
            out.extend(axes.iter().flat_map(|axis| axis.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            out.resize(out.len().next_multiple_of(32) + self.data, 7);
            out
        }

        fn refused(&self) -> String {
            Header::parse(&self.bytes()).expect_err("a bad file")
        }
    }

    #[test]
    fn a_sound_head_is_read() {
        let bytes = sound().bytes();
        let header = Header::parse(&bytes).unwrap();
        let info = &header.tensors["a.weight"];
        assert_eq!((info.kind, info.shape.as_slice(), info.size), (GgmlDType::Q8_0, &[3, 32][..], 102));
        assert_eq!(info.offset + info.size, bytes.len());
        assert_eq!(header.metadata["tokenizer.ggml.scores"], Value::Floats(vec![1.0; 5]));
        // Truncated at any length, it is refused.
        for length in 0..bytes.len() {
            assert!(Header::parse(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let tensor = |axes: Vec<u64>, kind: u32, offset: u64| Sketch {
            tensor: ("a.weight", axes, kind, offset),
            ..sound()
        };
        let alignment = |value: u32| {
            let mut sketch = sound();
            sketch.values.push(("general.alignment", value.into()));
            sketch
        };
        for (sketch, reason) in [
            (tensor(vec![32, 3], 22, 0), "a.weight: tensors of type IQ2_S are not supported"),
            (tensor(vec![32, 3], 39, 0), "MXFP4"),
            (tensor(vec![32, 3], 4, 0), "unknown tensor type 4"),
            (tensor(vec![33, 3], 8, 0), "blocks of 32, which do not divide a width of 33"),
            (tensor(vec![32, 4], 8, 0), "136 bytes at"),
            (tensor(vec![32, 3], 8, 8), "its offset 8 is no multiple of 32"),
            (tensor(vec![32, 3], 8, 64), "it is truncated"),
            (tensor(vec![32, 3], 8, u64::MAX - 31), "it is truncated"),
            (tensor(vec![32, u64::MAX / 2], 8, 0), "does not fit in the file"),
            (tensor(vec![1 << 32, 1 << 32, 1 << 32], 0, 0), "does not fit in the file"),
            (tensor(vec![1; 5], 0, 0), "expected at most 4 axes, got 5"),
            (alignment(0), "general.alignment: expected a power of two of at least 8"),
            (alignment(24), "general.alignment"),
            (alignment(4), "general.alignment"),
        ] {
            let found = sketch.refused();
            assert!(found.contains(reason), "{found}");
        }
        let mut twice = sound();
        twice.values.push(("general.architecture", "llama".into()));
        assert!(twice.refused().contains("general.architecture comes twice"));
    }

    #[test]
    fn no_count_is_believed() {
        let bytes = sound().bytes();
        let spoilt = |at: usize, with: &[u8]| {
            let mut bytes = bytes.clone();
            bytes[at..at + with.len()].copy_from_slice(with);
            Header::parse(&bytes).expect_err("a bad count")
        };
        let most = u64::MAX.to_le_bytes();
        assert!(spoilt(8, &most).contains("18446744073709551615 tensors"));
        assert!(spoilt(16, &most).contains("values, which do not fit"));
        assert!(spoilt(24, &most).contains("bytes of a string"));
        let array = bytes.windows(4).position(|four| four == 9u32.to_le_bytes()).unwrap();
        assert!(spoilt(array + 8, &(1u64 << 40).to_le_bytes()).contains("values of an array"));
        assert!(spoilt(array + 4, &9u32.to_le_bytes()).contains("an array of arrays is not supported"));
        assert!(spoilt(4, &1u32.to_le_bytes()).contains("version 1"));
        assert!(spoilt(4, &3u32.to_be_bytes()).contains("big-endian"));
        assert!(spoilt(0, b"GGML").contains("expected a GGUF file"));
    }
}
