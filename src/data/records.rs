//! Reads the records of text files: JSON lines, or one JSON array.

use std::io::Read;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, SeqAccess, Visitor};

use super::lines::no_text;
use crate::error::{Error, Result};

/// The bytes of a text, without the byte order mark of UTF-8.
///
/// # Errors
/// If they cannot be read, or are known not to be a text.
pub(super) fn bytes(mut source: impl Read, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.read_to_end(&mut bytes).map_err(Error::io(path))?;
    if let Some(reason) = no_text(&bytes) {
        return Err(Error::format(path, reason));
    }
    let mark = b"\xef\xbb\xbf";
    if bytes.starts_with(mark) {
        bytes.drain(..mark.len());
    }
    Ok(bytes)
}

/// Calls `visit` with each record of a JSON array, one at a time, so that only one is in memory.
///
/// # Errors
/// If the bytes are not a JSON array of such records, with the line; or the first reason of `visit`, with the
/// number of the record, counted from 1.
pub(super) fn each_of_array<R: DeserializeOwned>(
    bytes: &[u8],
    path: &Path,
    visit: impl FnMut(R) -> std::result::Result<(), String>,
) -> Result<()> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let records = Records(visit, PhantomData);
    let read = records.deserialize(&mut json).and_then(|read| json.end().map(|()| read));
    let read =
        read.map_err(|e| Error::format_at(path, e.line(), format!("not a JSON array of objects: {e}")))?;
    read.map_err(|reason| Error::format(path, reason))
}

/// The records of an array. The inner result is the error of the first invalid record, if any.
struct Records<R, F>(F, PhantomData<R>);

impl<'de, R, F> DeserializeSeed<'de> for Records<R, F>
where
    R: DeserializeOwned,
    F: FnMut(R) -> std::result::Result<(), String>,
{
    type Value = std::result::Result<(), String>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, R, F> Visitor<'de> for Records<R, F>
where
    R: DeserializeOwned,
    F: FnMut(R) -> std::result::Result<(), String>,
{
    type Value = std::result::Result<(), String>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut records: A) -> std::result::Result<Self::Value, A::Error> {
        let mut number = 0;
        while let Some(record) = records.next_element::<R>()? {
            number += 1;
            if let Err(reason) = (self.0)(record) {
                // Read to the end, so that invalid JSON further down is reported instead.
                while records.next_element::<IgnoredAny>()?.is_some() {}
                return Ok(Err(format!("record {number}: {reason}")));
            }
        }
        Ok(Ok(()))
    }
}
