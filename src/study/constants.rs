//! What the cells of a study depend on beside their keys, by value: a method's name and a model's name may mean
//! something else in a later version or on another machine, and cells of both would stand in one table.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

use serde_json::{json, Value};

use super::recipe::Recipe;
use crate::error::{Error, Result};
use crate::models::hub::ModelFiles;

/// The settings that [`constants`] makes. A study of a version that did not write them goes on without.
pub(super) const NAMES: [&str; 2] = ["constants", "weights"];

/// Settings of a study: a CRC-32 of all constants of each recipe, and of the model's weights.
///
/// # Errors
/// If a file of weights cannot be read.
pub fn constants(recipes: &[Recipe], files: &ModelFiles) -> Result<Value> {
    let mut methods = BTreeMap::new();
    for recipe in recipes {
        let text = serde_json::to_vec(recipe).map_err(|e| Error::config("method", e.to_string()))?;
        methods.insert(&recipe.text, format!("{:08x}", crc32fast::hash(&text)));
    }
    let (mut hasher, mut buffer) = (crc32fast::Hasher::new(), vec![0; 1 << 20]);
    for path in files.weights() {
        let mut file = File::open(path).map_err(Error::io(path))?;
        loop {
            match file.read(&mut buffer).map_err(Error::io(path))? {
                0 => break,
                count => hasher.update(&buffer[..count]),
            }
        }
    }
    let [names, weights] = NAMES;
    Ok(json!({ names: methods, weights: format!("{:08x}", hasher.finalize()) }))
}
