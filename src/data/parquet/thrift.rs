//! A reader of Thrift's compact protocol that stores nothing: it returns numbers and skips everything else.
//!
//! <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>

use std::io::Read;

/// A result whose error says what is wrong with the bytes.
pub(super) type Result<T> = std::result::Result<T, String>;

/// Maximum nesting depth of structures.
pub(super) const DEPTH: usize = 32;

/// The type codes that the reader of parquet's metadata needs.
pub(super) const I32: u8 = 5;
pub(super) const LIST: u8 = 9;
pub(super) const STRUCT: u8 = 12;

/// A reader of values from a byte source.
pub(super) struct Thrift<R> {
    source: R,
    /// The number of bytes read so far.
    pub(super) read: u64,
}

impl<R: Read> Thrift<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, read: 0 }
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.source.read_exact(&mut byte).map_err(|e| e.to_string())?;
        self.read += 1;
        Ok(byte[0])
    }

    fn unsigned(&mut self) -> Result<u64> {
        let mut value = 0;
        for shift in (0..70).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number is not terminated".to_string())
    }

    pub(super) fn number(&mut self) -> Result<i64> {
        let value = self.unsigned()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Reads the header of a list: the type and the number of its elements.
    pub(super) fn list(&mut self) -> Result<(u8, u64)> {
        let byte = self.byte()?;
        let count = if byte >> 4 == 15 { self.unsigned()? } else { u64::from(byte >> 4) };
        Ok((byte & 0x0f, count))
    }

    /// Reads a structure: calls `visit` with the id and type of each field, and skips the field if `visit`
    /// returns false.
    pub(super) fn structure(
        &mut self,
        depth: usize,
        mut visit: impl FnMut(&mut Self, (i64, u8)) -> Result<bool>,
    ) -> Result<()> {
        let depth = depth.checked_sub(1).ok_or("structures are nested too deeply")?;
        let mut id = 0i64;
        loop {
            let byte = self.byte()?;
            let kind = byte & 0x0f;
            if kind == 0 {
                return Ok(());
            }
            id = if byte >> 4 == 0 { self.number()? } else { id.wrapping_add(i64::from(byte >> 4)) };
            if !visit(self, (id, kind))? {
                self.skip(kind, true, depth)?;
            }
        }
    }

    /// Reads a structure of which only the i32 field `id` matters.
    pub(super) fn one_number(&mut self, id: i64, number: &mut i64) -> Result<()> {
        self.structure(DEPTH, |thrift, field| {
            let wanted = field == (id, I32);
            if wanted {
                *number = thrift.number()?;
            }
            Ok(wanted)
        })
    }

    /// Skips a value. A boolean is part of its field's type, but a byte in a list.
    fn skip(&mut self, kind: u8, in_field: bool, depth: usize) -> Result<()> {
        match kind {
            1 | 2 if in_field => Ok(()),
            1..=3 => self.bytes(1),
            4..=6 => self.unsigned().map(drop),
            7 => self.bytes(8),
            8 => {
                let length = self.unsigned()?;
                self.bytes(length)
            }
            LIST | 10 => {
                let (kind, count) = self.list()?;
                let depth = depth.checked_sub(1).ok_or("lists are nested too deeply")?;
                (0..count).try_for_each(|_| self.skip(kind, false, depth))
            }
            11 => {
                let count = self.unsigned()?;
                let kinds = if count == 0 { 0 } else { self.byte()? };
                let depth = depth.checked_sub(1).ok_or("maps are nested too deeply")?;
                (0..count).try_for_each(|_| {
                    self.skip(kinds >> 4, false, depth)?;
                    self.skip(kinds & 0x0f, false, depth)
                })
            }
            STRUCT => self.structure(depth, |_, _| Ok(false)),
            _ => Err(format!("a value has the unknown type {kind}")),
        }
    }

    fn bytes(&mut self, count: u64) -> Result<()> {
        let passed = std::io::copy(&mut self.source.by_ref().take(count), &mut std::io::sink());
        let passed = passed.map_err(|e| e.to_string())?;
        self.read += passed;
        if passed < count {
            return Err("it is truncated".to_string());
        }
        Ok(())
    }
}
