//! The values of a GGUF file's metadata.

use std::io::{self, Write};

/// One value. Integers of every width are one kind, and arrays hold what this crate asks of arrays.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned integer of 32 bits: how counts and ids are written.
    U32(u32),
    /// Any other integer.
    Int(i128),
    /// A number of single precision.
    F32(f32),
    /// A number of double precision.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts, such as the pieces of a vocabulary.
    Texts(Vec<String>),
    /// Integers of 32 bits, such as the kinds of the pieces.
    Ints(Vec<i32>),
    /// Numbers of single precision, such as the scores of the pieces.
    Floats(Vec<f32>),
    /// An array of another kind, of which only the length is kept.
    Other(u64),
}

impl Value {
    /// A whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::U32(value) => Some(u64::from(*value)),
            Self::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::U32(value) => Some(f64::from(*value)),
            Self::Int(value) => Some(*value as f64),
            Self::F32(value) => Some(f64::from(*value)),
            Self::F64(value) => Some(*value),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// A text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Writes the number of its type, and it.
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
            Self::Other(_) => Err(io::Error::other("an array whose values were not kept")),
        }
    }
}

/// Writes the length of a text, and it.
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
