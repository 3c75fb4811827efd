//! Checksums of what a study's cells depend on besides their keys. The name of a method or a model may mean
//! something else in a later version or on another machine; the checksums keep such cells out of one table.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

use candle_core::DType;
use serde_json::{json, Map, Value};

use super::recipe::Recipe;
use crate::data::encode::Encoded;
use crate::error::{Error, Result};
use crate::models::hub::ModelFiles;
use crate::peft::AdapterFile;
use crate::train::{fingerprint, RunFolder};

const CONSTANTS: &str = "constants";
const WEIGHTS: &str = "weights";
const ADAPTERS: &str = "adapters";
/// The checksums of the tasks' rows, by task.
const DATA: &str = "data";
/// The settings with an entry per method, adapter or task, to which later runs may add entries.
const GROWING: [&str; 3] = [CONSTANTS, ADAPTERS, DATA];

/// Whether a run may continue a study although this setting differs: an older version did not store the
/// setting, or the run adds entries of new methods or tasks.
pub(super) fn agree(name: &str, found: Option<&Value>, now: Option<&Value>) -> bool {
    match (found, now) {
        (None, _) => name == WEIGHTS || GROWING.contains(&name),
        (Some(_), None) => name == ADAPTERS, // of recipes that this run leaves out
        (Some(Value::Object(found)), Some(Value::Object(now))) if GROWING.contains(&name) => {
            now.iter().all(|(of, own)| found.get(of).is_none_or(|found| found == own))
        }
        _ => false,
    }
}

/// The found settings with the entries of the methods and tasks that a run adds; `None` if it adds none.
pub(super) fn joined(found: &Value, now: &Value) -> Option<Value> {
    let mut joined = found.clone();
    for name in GROWING {
        if let (Some(old), Some(own)) = (found.get(name), now.get(name)) {
            let (old, own) = (old.as_object()?, own.as_object()?);
            let all: Map<String, Value> =
                own.iter().chain(old).map(|(k, v)| (k.clone(), v.clone())).collect();
            joined[name] = Value::Object(all);
        }
        if let (ADAPTERS, None, Some(own)) = (name, found.get(name), now.get(name)) {
            joined[name] = own.clone();
        }
    }
    (joined != *found).then_some(joined)
}

/// The settings of a study that describe its recipes: a CRC-32 of all constants of each recipe, of the
/// model's weights and, for recipes that start from an existing adapter, of the adapter's tensors, by its
/// folder.
///
/// # Errors
/// If a file of weights or an adapter cannot be read.
pub fn checksums_of_recipes(recipes: &[Recipe], files: &ModelFiles) -> Result<Value> {
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
    let mut settings = json!({ CONSTANTS: methods, WEIGHTS: format!("{:08x}", hasher.finalize()) });
    let mut adapters = BTreeMap::new();
    for dir in recipes.iter().filter_map(|recipe| recipe.adapter.as_ref()) {
        adapters
            .insert(dir.display().to_string(), checksum(&AdapterFile::read(RunFolder::find_adapter(dir))?)?);
    }
    if !adapters.is_empty() {
        settings[ADAPTERS] = json!(adapters);
    }
    Ok(settings)
}

fn checksum(adapter: &AdapterFile) -> Result<String> {
    let pairs = adapter.layers.values().flat_map(|layer| [&layer.a, &layer.b]);
    let mut numbers = Vec::new();
    for tensor in pairs.chain(adapter.saved_modules.values()) {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        numbers.extend(values.into_iter().map(f32::to_bits));
    }
    Ok(fingerprint(numbers))
}

/// The settings of a study of encoders that describe its data: a CRC-32 of each task's tokens and labels.
/// `tasks` gives the training rows and the measured rows of each.
pub fn checksums_of_data<'a>(tasks: impl Iterator<Item = (String, [&'a [Encoded]; 2])>) -> Value {
    let checksum = |rows: [&[Encoded]; 2]| fingerprint(rows.into_iter().flatten().flat_map(Encoded::numbers));
    let tasks: BTreeMap<String, String> = tasks.map(|(task, rows)| (task, checksum(rows))).collect();
    json!({ DATA: tasks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_study_may_get_recipes_and_the_adapters_they_start_from_and_no_others_for_those_it_has() {
        let of = |adapters: Value| json!({"constants": {"lora": 1}, "adapters": adapters});
        let (none, one) = (json!({"constants": {"lora": 1}}), of(json!({"a": 1})));
        let (other, both) = (of(json!({"a": 2})), of(json!({"a": 1, "b": 3})));
        let agrees = |found: &Value, now: &Value| {
            let names = [CONSTANTS, ADAPTERS];
            names
                .iter()
                .all(|name| found.get(name) == now.get(name) || agree(name, found.get(name), now.get(name)))
        };
        for (found, now, fits) in
            [(&none, &one, true), (&one, &both, true), (&one, &none, true), (&one, &other, false)]
        {
            assert_eq!(agrees(found, now), fits, "{found} {now}");
        }
        assert_eq!((joined(&none, &one), joined(&one, &both)), (Some(one.clone()), Some(both.clone())));
        assert_eq!((joined(&both, &one), joined(&one, &none)), (None, None));
        assert_eq!(joined(&one, &of(json!({"b": 3}))), Some(both));
    }
}
