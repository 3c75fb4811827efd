//! What the cells of a study depend on beside their keys, by value: a method's name and a model's name may mean
//! something else in a later version or on another machine, and cells of both would stand in one table.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

use serde_json::{json, Map, Value};

use super::recipe::Recipe;
use crate::error::{Error, Result};
use crate::models::hub::ModelFiles;

const CONSTANTS: &str = "constants";
const WEIGHTS: &str = "weights";

/// Whether a setting of a study and that of a run in its folder go together although they are not the same: a
/// study of a version that did not write these down goes on without, and one may get methods that it did not have.
pub(super) fn agree(name: &str, found: Option<&Value>, now: Option<&Value>) -> bool {
    match (name, found, now) {
        (CONSTANTS | WEIGHTS, None, _) => true,
        (CONSTANTS, Some(Value::Object(found)), Some(Value::Object(now))) => {
            now.iter().all(|(method, own)| found.get(method).is_none_or(|found| found == own))
        }
        _ => false,
    }
}

/// The settings that were found with the constants of the methods that a run adds; None if it adds none.
pub(super) fn joined(found: &Value, now: &Value) -> Option<Value> {
    let (old, own) = (found.get(CONSTANTS)?.as_object()?, now.get(CONSTANTS)?.as_object()?);
    if own.keys().all(|method| old.contains_key(method)) {
        return None;
    }
    let all: Map<String, Value> = own.iter().chain(old).map(|(k, v)| (k.clone(), v.clone())).collect();
    let mut joined = found.clone();
    joined[CONSTANTS] = Value::Object(all);
    Some(joined)
}

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
    Ok(json!({ CONSTANTS: methods, WEIGHTS: format!("{:08x}", hasher.finalize()) }))
}
