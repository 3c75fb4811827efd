//! Writes a checkpoint, with or without merged adapters, as one GGUF file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use serde_json::Value;

use super::plan::{merged, plan, tensor};
use super::shards::{Entry, Failure};
use super::{check_layers, check_merged};
use crate::adapter::{AdaptableModel, Params, Pass, Role};
use crate::error::{Error, Result};
use crate::models::chat_template::find;
use crate::models::gguf::{check_model, write_model, Gguf, GgufKind, Named, Texts};
use crate::models::hub::ModelFiles;
use crate::util::json;

/// Writes the merged checkpoint ([`save_merged`](super::save_merged)) and its tokenizer as the GGUF file
/// `path` for llama.cpp and Ollama, with matrices of `kind`.
///
/// If the base is itself in GGUF, adapters are merged into its dequantised weights, and all weights are
/// rounded a second time, which is logged.
///
/// # Errors
/// If `path` exists, no adapter is active and no weight was trained, a layer cannot be merged, GGUF cannot
/// represent the tokenizer or the architecture, the model has a head that llama.cpp lacks, or the file cannot
/// be written.
pub fn save_merged_gguf(
    model: &dyn AdaptableModel,
    params: &Params,
    source: &ModelFiles,
    path: &Path,
    kind: GgufKind,
) -> Result<()> {
    check_free(path)?;
    if let Some(base) = source.gguf() {
        let tensors = dequantized(model, params, base)?;
        return write_model(path, &source.config()?, &texts(source)?, kind, tensors);
    }
    let (mapped, failure) = (source.map_weights()?, Failure::default());
    let entries = plan(model, params, &mapped, &failure, Pass::Mean)?;
    write_model(path, &source.config()?, &texts(source)?, kind, named(entries))
}

/// Checks before training what [`save_merged_gguf`] would reject afterwards, except a full disk.
///
/// # Errors
/// As [`save_merged_gguf`].
pub fn check_merged_gguf(
    model: &dyn AdaptableModel,
    params: &Params,
    source: &ModelFiles,
    path: &Path,
) -> Result<()> {
    if let Some(base) = source.gguf() {
        check_free(path)?;
        check_layers(model)?;
        return check_model(&source.config()?, &texts(source)?, dequantized(model, params, base)?);
    }
    check_merged(model, params, source, path)?;
    let (mapped, failure) = (source.map_weights()?, Failure::default());
    let entries = plan(model, params, &mapped, &failure, Pass::Mean)?;
    check_model(&source.config()?, &texts(source)?, named(entries))
}

/// The tensors of the merged checkpoint, in the dtype that the checkpoint would have before GGUF rounds them.
fn named<'a>(entries: BTreeMap<String, Entry<'a>>) -> Vec<Named<'a>> {
    let named = |(name, entry)| match entry {
        Entry::Source(view) => as_it_is(name, view),
        Entry::Made { make, dtype, shape, .. } => {
            Named { name, shape, make: Box::new(move || Ok(make()?.to_dtype(dtype)?)) }
        }
    };
    entries.into_iter().map(named).collect()
}

/// The dequantised tensors of a base in GGUF, with the adapters merged in.
fn dequantized<'a>(model: &'a dyn AdaptableModel, params: &Params, base: &'a Gguf) -> Result<Vec<Named<'a>>> {
    let trained = |role| matches!(role, Role::Base | Role::Head | Role::Prompt);
    if let Some((name, _)) = params.all().into_iter().find(|(_, param)| trained(param.role)) {
        return Err(Error::tensor(
            name,
            "it was trained, and only adapters can be merged into a base in GGUF",
        ));
    }
    let mut adapted = BTreeSet::new();
    model.visit_linears(&mut |layer| {
        adapted.extend(layer.active().map(|_| layer.path().to_string()));
        Ok(())
    })?;
    if adapted.is_empty() {
        return Err(Error::config("adapter", "no layer has an active adapter: there is nothing to merge"));
    }
    let path = base.path().display();
    tracing::warn!(
        "{path}: the adapter is merged into the dequantised weights, which are then rounded again"
    );
    let numbers = |name: &str| base.numbers(name, DType::F32, &Device::Cpu);
    let named = |(name, shape): (String, Vec<usize>)| {
        let layer = name.strip_suffix(".weight").filter(|layer| adapted.contains(*layer)).map(str::to_string);
        let tensor = name.clone();
        let make: Box<dyn Fn() -> Result<Tensor>> = match layer {
            Some(layer) => Box::new(move || merged(model, &layer, &numbers(&tensor)?, &Pass::Mean)),
            None => Box::new(move || numbers(&tensor)),
        };
        Named { name, shape, make }
    };
    Ok(base.names().into_iter().map(named).collect())
}

/// Writes the checkpoint `source` as one GGUF file for llama.cpp and Ollama, in the format of
/// [`save_merged_gguf`], as the base for adapters in GGUF.
///
/// # Errors
/// Those of [`save_merged_gguf`] that concern the checkpoint and the file.
pub fn save_gguf(source: &ModelFiles, path: &Path, kind: GgufKind) -> Result<()> {
    check_free(path)?;
    let mapped = source.map_weights()?;
    let tensors = mapped.tensors().into_iter().map(|(name, view)| as_it_is(name, view)).collect();
    write_model(path, &source.config()?, &texts(source)?, kind, tensors)
}

/// An unchanged tensor of the checkpoint.
fn as_it_is(name: String, view: TensorView<'_>) -> Named<'_> {
    let shape = view.shape().to_vec();
    Named { name, shape, make: Box::new(move || tensor(&view)) }
}

fn check_free(path: &Path) -> Result<()> {
    match path.exists() {
        true => Err(Error::format(path, "it exists; give a new file")),
        false => Ok(()),
    }
}

/// The tokenizer, its settings and the chat template of `files`.
fn texts(files: &ModelFiles) -> Result<Texts> {
    let read = |name: &str| -> Result<Option<Value>> {
        let Some(path) = files.file(name)? else { return Ok(None) };
        json::parse(std::fs::read(&path).map_err(Error::io(&*path))?, &path).map(Some)
    };
    let template = find(files)?.map(|found| found.text);
    let tokenizer = read("tokenizer.json")?;
    if let (None, Some(gguf)) = (&tokenizer, files.gguf()) {
        return Ok(Texts { tokenizer: gguf.tokenizer()?, settings: None, template });
    }
    Ok(Texts { tokenizer, settings: read("tokenizer_config.json")?, template })
}
