//! What two parts of one run must agree on.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::adapter::AdaptableModel;
use crate::data::batch::Batcher;
use crate::error::{Error, Result};

/// Settings by name, as text: what two parts of one run must agree on.
pub type Settings = BTreeMap<String, String>;

/// What `value` is called and says, as JSON: what a checkpoint keeps must not depend on names of Rust.
///
/// # Errors
/// If `value` has no form in JSON.
pub(super) fn setting(name: &str, value: &impl Serialize) -> Result<(String, String)> {
    let text = serde_json::to_string(value)
        .map_err(|error| Error::config(name, format!("it cannot be written: {error}")))?;
    Ok((name.to_string(), text))
}

/// A checksum of data, to be one of the [`Settings`]: `numbers` are all that the rows hold.
pub fn fingerprint(numbers: impl IntoIterator<Item = u32>) -> String {
    let mut hasher = crc32fast::Hasher::new();
    numbers.into_iter().for_each(|number| hasher.update(&number.to_le_bytes()));
    format!("CRC-32 {:08x}", hasher.finalize())
}

/// The settings of data, batches, method and the frozen base.
pub(super) fn of_run(
    batcher: &Batcher,
    method: &Settings,
    model: &dyn AdaptableModel,
    numbers: impl IntoIterator<Item = u32>,
) -> Settings {
    let rows = ("rows", fingerprint(numbers));
    let dtype = base_kind(model).map(|kind| ("dtype", kind));
    let own = batcher.settings().into_iter().chain([rows]).chain(dtype);
    let own = own.map(|(name, value)| (name.to_string(), value));
    own.chain(method.clone()).collect()
}

/// How the first linear layer's base lies in memory, where there is one.
fn base_kind(model: &dyn AdaptableModel) -> Option<String> {
    let mut kind = None;
    let looked = model.visit_linears(&mut |layer| {
        kind = kind.take().or_else(|| Some(layer.base().kind()));
        Ok(())
    });
    looked.ok().and(kind)
}
