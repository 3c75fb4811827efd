//! What stands before the tensors of a GGUF file: its metadata, and where each tensor lies.
//!
//! Nothing here is believed: a count is held against the bytes that are left before room is made for it, and a tensor
//! against the end of the file and the size of its kind. Candle's own reader makes a value of 32 bytes of each
//! number of an array, and divides by the file's alignment.

use std::collections::BTreeMap;

use candle_core::quantized::GgmlDType;

use super::value::Value;

/// The most axes that a tensor has.
const MOST_AXES: u32 = 4;
/// How tensors are aligned where the file does not say.
const ALIGNMENT: u64 = 32;

/// The head of a file.
#[derive(Debug, Clone, Default)]
pub(super) struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Where a tensor lies, and as what.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo {
    pub kind: GgmlDType,
    /// Slowest axis first, as in candle.
    pub shape: Vec<usize>,
    /// From the beginning of the file, in bytes.
    pub offset: usize,
    /// In bytes.
    pub size: usize,
}

/// Why a file is refused.
type Reason = String;

impl Header {
    /// Reads the head of a file of these bytes.
    pub fn parse(file: &[u8]) -> Result<Self, Reason> {
        let mut at = Cursor { file, at: 0 };
        if at.take(4)? != b"GGUF" {
            return Err("expected a GGUF file, which begins with these four letters".into());
        }
        match at.u32()? {
            2 | 3 => {}
            1 => return Err("version 1 of GGUF is not supported: convert the model anew".into()),
            swapped if swapped.swap_bytes() <= 3 => return Err("GGUF of big-endian machines is not supported".into()),
            other => return Err(format!("expected version 2 or 3 of GGUF, got {other}")),
        }
        // The shortest tensor's entry has an empty name and no axes, the shortest value is a byte.
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

    /// Counts the tensors' offsets from the beginning of the file, where they lie within it.
    fn place(&mut self, end: u64, length: u64) -> Result<(), Reason> {
        let alignment = match self.metadata.get("general.alignment") {
            None => ALIGNMENT,
            Some(value) => match value.as_u64() {
                Some(value) if value.is_multiple_of(8) && value.is_power_of_two() && value <= 1 << 20 => value,
                _ => return Err(format!("general.alignment: expected a power of two of at least 8, got {value:?}")),
            },
        };
        let start = end.next_multiple_of(alignment);
        for (name, info) in &mut self.tensors {
            if !(info.offset as u64).is_multiple_of(alignment) {
                return Err(format!("tensor {name}: its offset {} is no multiple of {alignment}", info.offset));
            }
            let place = start.checked_add(info.offset as u64);
            match place.and_then(|from| Some((from, from.checked_add(info.size as u64)?))) {
                Some((from, to)) if to <= length => info.offset = from as usize,
                _ => {
                    let reason = format!(
                        "tensor {name}: {} bytes from {start} + {} on, where the file ends at {length}: it is truncated",
                        info.size, info.offset
                    );
                    return Err(reason);
                }
            }
        }
        Ok(())
    }
}

/// Where reading is in the bytes of a file.
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
            None => Err(format!("it ends within its head: {count} bytes are wanted and {} left", rest.len())),
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

    /// A number of things that take at least `least` bytes each of those left.
    fn count(&mut self, least: usize, what: &str) -> Result<usize, Reason> {
        let (count, left) = (self.u64()?, self.file.len() - self.at);
        match usize::try_from(count) {
            Ok(fits) if fits <= left / least => Ok(fits),
            _ => Err(format!("it says {count} {what}, for which the {left} bytes left have no room")),
        }
    }

    fn text(&mut self) -> Result<String, Reason> {
        let length = self.count(1, "bytes of a text")?;
        let bytes = self.take(length)?;
        // Pieces of a vocabulary need not be whole characters.
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
                [other] => return Err(format!("expected 0 or 1 for a truth value, got {other}")),
            },
            8 => Value::Text(self.text()?),
            9 => self.array()?,
            10 => Value::Int(i128::from(self.u64()?)),
            11 => Value::Int(i128::from(self.bytes().map(i64::from_le_bytes)?)),
            12 => Value::F64(self.bytes().map(f64::from_le_bytes)?),
            other => return Err(format!("there is no type of values {other}")),
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
            other => return Err(format!("there is no type of values {other}")),
        };
        let count = self.count(width, "values of an array")?;
        Ok(match kind {
            8 => Value::Texts((0..count).map(|_| self.text()).collect::<Result<_, _>>()?),
            5 => Value::Ints((0..count).map(|_| self.bytes().map(i32::from_le_bytes)).collect::<Result<_, _>>()?),
            6 => Value::Floats((0..count).map(|_| self.bytes().map(f32::from_le_bytes)).collect::<Result<_, _>>()?),
            _ => {
                self.take(count * width)?;
                Value::Other(count as u64)
            }
        })
    }

    /// A tensor's entry; its offset is counted from where the tensors begin.
    fn tensor(&mut self) -> Result<TensorInfo, Reason> {
        let axes = self.u32()?;
        if axes > MOST_AXES {
            return Err(format!("expected at most {MOST_AXES} axes, got {axes}"));
        }
        let mut shape = (0..axes).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let kind = supported(self.u32()?)?;
        let offset = self.u64()?;
        let (block, width) = (kind.block_size() as u64, shape.last().copied().unwrap_or(1));
        if !width.is_multiple_of(block) {
            return Err(format!("{kind:?} comes in blocks of {block}, which do not divide a width of {width}"));
        }
        let blocks = shape.iter().try_fold(1u64, |all, axis| all.checked_mul(*axis)).map(|all| all / block);
        let size = blocks.and_then(|blocks| blocks.checked_mul(kind.type_size() as u64));
        let size = size.filter(|size| *size <= self.file.len() as u64);
        match (size.map(usize::try_from), usize::try_from(offset)) {
            (Some(Ok(size)), Ok(offset)) => {
                let shape = shape.into_iter().map(|axis| axis as usize).collect();
                Ok(TensorInfo { kind, shape, offset, size })
            }
            _ => Err(format!("a shape of {shape:?} in {kind:?} at {offset} is more than the file holds")),
        }
    }
}

/// The kind of tensors of this number in GGUF.
fn supported(number: u32) -> Result<GgmlDType, Reason> {
    let name = match number {
        0 => return Ok(GgmlDType::F32),
        1 => return Ok(GgmlDType::F16),
        2 => return Ok(GgmlDType::Q4_0),
        3 => return Ok(GgmlDType::Q4_1),
        6 => return Ok(GgmlDType::Q5_0),
        7 => return Ok(GgmlDType::Q5_1),
        8 => return Ok(GgmlDType::Q8_0),
        9 => return Ok(GgmlDType::Q8_1),
        10 => return Ok(GgmlDType::Q2K),
        11 => return Ok(GgmlDType::Q3K),
        12 => return Ok(GgmlDType::Q4K),
        13 => return Ok(GgmlDType::Q5K),
        14 => return Ok(GgmlDType::Q6K),
        15 => return Ok(GgmlDType::Q8K),
        30 => return Ok(GgmlDType::BF16),
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
        other => return Err(format!("tensors of type {other} are not known here")),
    };
    Err(format!("tensors of type {name} are not supported: take a file of Q8_0, Q4_0, Q4_K or their like"))
}
