//! A whole Hugging Face model folder of a model with its adapters merged in.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Tensor};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::View;
use serde_json::{json, Value};

use super::hub::ModelFiles;
use crate::error::{Error, Result};
use crate::files;
use crate::params::{Params, Role};
use crate::slot::Linears;

/// The largest shard that Hugging Face writes by default.
pub const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// What a folder may hold beside its weights.
const COMPANIONS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "generation_config.json",
    "chat_template.jinja",
];

/// Writes the folder `dir`: the checkpoint `source` with each adapted layer replaced by what its
/// base and its active adapter's mean amount to, the heads of `params` as they were trained,
/// `config` (the source's own where None), and the tokenizer's files.
///
/// Tensors keep their dtype and go from the mapped source to the disk one after the other: no
/// second copy of the model is held. Names get the prefix of the model's body where the source
/// lacks it. Shards hold at most `max_shard_bytes` ([`MAX_SHARD_BYTES`]) each, or one tensor. The
/// folder appears when all of it is written.
///
/// # Errors
/// If `dir` exists and is not an empty folder, a layer cannot be merged or has no tensor in the
/// source, a merged weight would not be finite, or a file cannot be written.
pub fn save_merged(
    model: &dyn Linears,
    params: &Params,
    source: &ModelFiles,
    config: Option<&Value>,
    dir: &Path,
    max_shard_bytes: usize,
) -> Result<()> {
    if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) || dir.is_file() {
        return Err(Error::format(dir, "it exists; give a new or an empty folder"));
    }
    let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let partial = dir.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
    let remove = Remove(partial.clone());

    let (mapped, failure) = (source.map_weights()?, Failure::default());
    let entries = plan(model, params, &mapped, &failure)?;
    write_shards(&entries, &partial, max_shard_bytes, &failure)?;
    let path = partial.join("config.json");
    match config {
        Some(config) => {
            let text =
                serde_json::to_string_pretty(config).map_err(|e| Error::format(&path, e.to_string()))?;
            files::write(&path, text.as_bytes())?;
        }
        None => copy(source.config_path(), &path)?,
    }
    for name in COMPANIONS {
        if let Some(file) = source.file(name)? {
            copy(&file, &partial.join(name))?;
        }
    }
    if dir.is_dir() {
        fs::remove_dir(dir).map_err(Error::io(dir))?;
    }
    fs::rename(&partial, dir).map_err(Error::io(dir))?;
    std::mem::forget(remove);
    Ok(())
}

/// Takes an unfinished folder away.
struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).map_err(Error::io(from))?;
    files::write(to, &bytes)
}

/// One tensor of the folder: as it is in the source, merged when it is written, or trained.
enum Entry<'a> {
    Source(TensorView<'a>),
    Merged { model: &'a dyn Linears, path: String, like: TensorView<'a>, failure: &'a Failure },
    Trained(Tensor),
}

/// The first error of a tensor that is made while it is written: a view cannot return one.
type Failure = Mutex<Option<Error>>;

impl View for &Entry<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Entry::Source(view) | Entry::Merged { like: view, .. } => view.dtype(),
            Entry::Trained(tensor) => View::dtype(tensor),
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Entry::Source(view) | Entry::Merged { like: view, .. } => view.shape(),
            Entry::Trained(tensor) => tensor.dims(),
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Entry::Source(view) => Cow::Borrowed(view.data()),
            Entry::Trained(tensor) => View::data(tensor),
            Entry::Merged { model, path, like, failure } => match merged_bytes(*model, path, like) {
                Ok(bytes) => Cow::Owned(bytes),
                Err(error) => {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    Cow::Owned(vec![0; self.data_len()])
                }
            },
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Entry::Source(view) | Entry::Merged { like: view, .. } => view.data().len(),
            Entry::Trained(tensor) => View::data_len(tensor),
        }
    }
}

/// The merged weight of the layer at `path`, in the source's dtype.
fn merged_bytes(model: &dyn Linears, path: &str, like: &TensorView) -> Result<Vec<u8>> {
    let mut bytes = None;
    model.visit_linears(&mut |slot| {
        if let Some(layer) = (slot.path() == path).then(|| slot.merged_layer()).transpose()?.flatten() {
            let weight = layer.weight().to_dtype(DType::try_from(like.dtype())?)?;
            bytes = Some(View::data(&weight).into_owned());
        }
        Ok(())
    })?;
    let weight = format!("{path}.weight");
    match bytes {
        Some(bytes) if bytes.len() == like.data().len() => Ok(bytes),
        Some(_) => Err(Error::tensor(weight, format!("the checkpoint has shape {:?}", like.shape()))),
        None => Err(Error::tensor(weight, "its adapter went away")),
    }
}

/// What is written under which name.
fn plan<'a>(
    model: &'a dyn Linears,
    params: &Params,
    source: &'a MmapedSafetensors,
    failure: &'a Failure,
) -> Result<BTreeMap<String, Entry<'a>>> {
    let (mut body, mut adapted) = (String::new(), BTreeSet::new());
    model.visit_linears(&mut |slot| {
        body = slot.path().split_once('.').map_or_else(String::new, |(first, _)| format!("{first}."));
        if slot.active().is_some() {
            adapted.insert(slot.path().to_string());
        }
        Ok(())
    })?;
    let views = source.tensors();
    let bare = !views.iter().any(|(name, _)| name.starts_with(&body));
    let heads: Vec<(String, Tensor)> = params
        .all()
        .into_iter()
        .filter(|(_, param)| param.role == Role::Head)
        .map(|(name, param)| (name, param.var.as_detached_tensor()))
        .collect();
    let mut entries = BTreeMap::new();
    for (name, view) in views {
        let name = if bare { format!("{body}{name}") } else { name };
        // A trained head replaces whatever head the checkpoint came with.
        if !heads.is_empty() && !name.starts_with(&body) {
            continue;
        }
        let path = name.strip_suffix(".weight").unwrap_or(&name).to_string();
        let entry = match adapted.remove(&path) {
            true => Entry::Merged { model, path, like: view, failure },
            false => Entry::Source(view),
        };
        entries.insert(name, entry);
    }
    if let Some(path) = adapted.first() {
        return Err(Error::tensor(format!("{path}.weight"), "the checkpoint has no such tensor"));
    }
    entries.extend(heads.into_iter().map(|(name, tensor)| (name, Entry::Trained(tensor))));
    Ok(entries)
}

/// `model.safetensors`, or shards with their index.
fn write_shards(
    entries: &BTreeMap<String, Entry>,
    dir: &Path,
    max_bytes: usize,
    failure: &Failure,
) -> Result<()> {
    let (mut shards, mut room, mut total) = (Vec::<Vec<(&String, &Entry)>>::new(), 0, 0);
    for (name, entry) in entries {
        let bytes = entry.data_len();
        total += bytes;
        match shards.last_mut() {
            Some(shard) if bytes <= room => {
                shard.push((name, entry));
                room -= bytes;
            }
            _ => {
                shards.push(vec![(name, entry)]);
                room = max_bytes.saturating_sub(bytes);
            }
        }
    }
    let (count, mut places) = (shards.len(), BTreeMap::new());
    for (i, shard) in shards.into_iter().enumerate() {
        let file = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        places.extend(shard.iter().map(|(name, _)| (name.to_string(), file.clone())));
        files::write_safetensors(&dir.join(&file), shard)?;
        if let Some(error) = failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
    }
    if count > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": places });
        let path = dir.join("model.safetensors.index.json");
        let text = serde_json::to_string_pretty(&index).map_err(|e| Error::format(&path, e.to_string()))?;
        files::write(&path, text.as_bytes())?;
    }
    Ok(())
}
