//! Metadata values of a GGUF file.

use std::io::{self, Write};

/// A metadata value. Integers other than u32 share one variant; arrays are kept only for the types in use.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A u32, the type of counts and ids.
    U32(u32),
    /// Any other integer.
    Int(i128),
    /// A single-precision number.
    F32(f32),
    /// A double-precision number.
    F64(f64),
    /// A boolean.
    Bool(bool),
    /// A string.
    Text(String),
    /// Strings, such as the tokens of a vocabulary.
    Texts(Vec<String>),
    /// i32 values, such as the types of tokens.
    Ints(Vec<i32>),
    /// f32 values, such as the scores of tokens.
    Floats(Vec<f32>),
    /// An array of another type; only its length is kept.
    Other(u64),
}

impl Value {
    /// The value as a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::U32(value) => Some(u64::from(*value)),
            Self::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// The value as a number; integers are converted.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::U32(value) => Some(f64::from(*value)),
            Self::Int(value) => Some(*value as f64),
            Self::F32(value) => Some(f64::from(*value)),
            Self::F64(value) => Some(*value),
            _ => None,
        }
    }

    /// The value as a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// The value as a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Writes the number of the type, then the value.
    pub(super) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let kind = |out: &mut _, kind: u32| Write::write_all(out, &kind.to_le_bytes());
        let array = |out: &mut _, of: u32, len: usize| {
            kind(out, 9)?;
            kind(out, of)?;
            Write::write_all(out, &(len as u64).to_le_bytes())
        };
        match self {
            Self::U32(value) => {
                kind(out, 4)?;
                out.write_all(&value.to_le_bytes())
            }
            Self::Int(value) => {
                kind(out, 11)?;
                out.write_all(&i64::try_from(*value).map_err(io::Error::other)?.to_le_bytes())
            }
            Self::F32(value) => {
                kind(out, 6)?;
                out.write_all(&value.to_le_bytes())
            }
            Self::F64(value) => {
                kind(out, 12)?;
                out.write_all(&value.to_le_bytes())
            }
            Self::Bool(value) => {
                kind(out, 7)?;
                out.write_all(&[u8::from(*value)])
            }
            Self::Text(text) => {
                kind(out, 8)?;
                write_text(out, text)
            }
            Self::Texts(texts) => {
                array(out, 8, texts.len())?;
                texts.iter().try_for_each(|text| write_text(out, text))
            }
            Self::Ints(values) => {
                array(out, 5, values.len())?;
                values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
            }
            Self::Floats(values) => {
                array(out, 6, values.len())?;
                values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
            }
            Self::Other(_) => {
                Err(io::Error::other("the values of this array were not read and cannot be written"))
            }
        }
    }
}

/// Writes the length of a string in bytes, then the string.
pub(super) fn write_text(out: &mut impl Write, text: &str) -> io::Result<()> {
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text.as_bytes())
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_string())
    }
}
