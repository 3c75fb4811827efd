//! Writes complete Hugging Face model folders: with adapters merged in, or with weights trained directly.

mod companions;
mod gguf;
mod plan;
mod prefixes;
mod shards;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::Value;

use super::hub::ModelFiles;
use crate::adapter::{AdaptableModel, Params, Pass};
use crate::error::{Error, Result};
use crate::util::files;

use companions::copy;
pub(crate) use companions::copy_companions;
pub use gguf::{check_merged_gguf, save_gguf, save_merged_gguf};
use plan::{plan, tensor};
pub(crate) use prefixes::TensorPrefixes;
use shards::{write_shards, Entry, Failure};

/// Hugging Face's default limit on the size of a shard, in bytes.
pub const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// Writes the checkpoint `source` to the folder `dir`, with the active adapters merged in.
///
/// The mean of its active adapter is merged into each adapted layer's weight. Weights of `params` that were
/// trained directly ([`Role::Base` and `Role::Head`](crate::adapter::Role)) replace the checkpoint's. The
/// folder also gets `config` (the source's own if `None`) and the tokenizer's files.
///
/// An adapter is added to the weight as stored in the checkpoint, whatever dtype the model was loaded in. If
/// the base was quantised at load, the adapter is therefore merged into the weights before rounding, which is
/// logged. Tensors keep the checkpoint's dtype (a trained head is in single precision) and are written one
/// after the other, without a second copy of the model in memory. Names get the prefix of the model's body if
/// the source lacks it. A shard holds at most `max_shard_bytes` ([`MAX_SHARD_BYTES`]), or one tensor. The
/// folder appears only when it is complete.
///
/// # Errors
/// If no adapter is active and no weight was trained, `dir` exists and is not an empty folder, a tokenizer
/// file is not available, a layer cannot be merged or has no tensor of its shape in the source, a merged
/// weight would not be finite, or a file cannot be written.
pub fn save_merged(
    model: &dyn AdaptableModel,
    params: &Params,
    source: &ModelFiles,
    config: Option<&Value>,
    dir: &Path,
    max_shard_bytes: usize,
) -> Result<()> {
    check_free(dir)?;
    let partial = files::partial_folder(dir);
    // A killed process with the same pid may have left a partial folder.
    fs::remove_dir_all(&partial).ok();
    fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
    let remove = Remove(partial.clone());

    let (mapped, failure) = (source.map_weights()?, Failure::default());
    let entries = plan(model, params, &mapped, &failure, Pass::Mean)?;
    // Downloads from the hub, which may fail, come before gigabytes are written.
    copy_companions(source, &partial)?;
    let path = partial.join("config.json");
    match config {
        Some(config) => files::write_json(&path, config)?,
        None => copy(source.config_path(), &path)?,
    }
    write_shards(&entries, &partial, max_shard_bytes, &failure)?;
    if dir.is_dir() {
        fs::remove_dir(dir).map_err(Error::io(dir))?;
    }
    fs::rename(&partial, dir).map_err(Error::io(dir))?;
    std::mem::forget(remove);
    Ok(())
}

/// Checks before training what [`save_merged`] would reject afterwards, except a tokenizer file that is not
/// available and a full disk.
///
/// # Errors
/// As [`save_merged`].
pub fn check_merged(
    model: &dyn AdaptableModel,
    params: &Params,
    source: &ModelFiles,
    dir: &Path,
) -> Result<()> {
    check_free(dir)?;
    plan(model, params, &source.map_weights()?, &Failure::default(), Pass::Mean)?;
    check_layers(model)
}

/// Checks that the active adapter of each layer can be merged.
fn check_layers(model: &dyn AdaptableModel) -> Result<()> {
    model.visit_linears(&mut |layer| layer.merged_dequantized().map(drop))
}

/// Returns in memory what [`save_merged`] writes: every tensor of the checkpoint `source` by name, with the
/// active adapters of a pass (the mean, or one posterior draw) merged in and with directly trained weights
/// replaced.
///
/// Other implementations of the model, such as candle-transformers', can load the result by
/// `VarBuilder::from_tensors(merged_tensors(..)?, dtype, device)`.
///
/// # Example
/// A posterior draw of a LLaMA, run by candle-transformers:
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use candle_transformers::models::llama::{Cache, Llama};
/// use monteclora::inject::{self, Targets};
/// use monteclora::models::{hub::ModelFiles, decoder::*, save::merged_tensors};
/// use monteclora::{MonteCLoRAConfig, Noise, Params, Pass};
///
/// # if !std::path::Path::new("examples/assets").exists() { return Ok::<(), monteclora::Error>(()) } // not in the package
/// let (device, noise) = (Device::Cpu, Noise::new(42));
/// let files = ModelFiles::locate("examples/assets/stories260k", None)?;
/// let config = DecoderConfig::from_files(&files)?;
/// let mut model = DecoderForCausalLM::load(files.var_builder(DType::F32, &device)?, &config, noise)?;
/// let params = Params::new(noise, &device);
/// inject::monteclora(&mut model, &Targets::default(), &MonteCLoRAConfig::default(), &params)?; // and training
///
/// let tensors = merged_tensors(&model, &params, &files, &Pass::Posterior { draw: 3 })?;
/// let plain = config.to_candle_llama()?;
/// let theirs = Llama::load(VarBuilder::from_tensors(tensors, DType::F32, &device), &plain)?;
/// let mut cache = Cache::new(true, DType::F32, &plain, &device)?;
/// let logits = theirs.forward(&Tensor::new(&[[1u32, 40, 7]], &device)?, 0, &mut cache)?;
/// assert_eq!(logits.dims(), [1, config.vocab_size]);
/// # Ok::<(), monteclora::Error>(())
/// ```
///
/// # Errors
/// As [`save_merged`], except those of files; and for [`Pass::Train`].
pub fn merged_tensors(
    model: &dyn AdaptableModel,
    params: &Params,
    source: &ModelFiles,
    pass: &Pass,
) -> Result<HashMap<String, Tensor>> {
    let (mapped, failure) = (source.map_weights()?, Failure::default());
    let made = |entry: &Entry| match entry {
        Entry::Source(view) => tensor(view),
        Entry::Made { make, dtype, .. } => Ok(make()?.to_dtype(*dtype)?),
    };
    let entries = plan(model, params, &mapped, &failure, *pass)?;
    entries.iter().map(|(name, entry)| Ok((name.clone(), made(entry)?))).collect()
}

fn check_free(dir: &Path) -> Result<()> {
    if files::has_entries(dir) || dir.is_file() {
        Err(Error::format(dir, "it exists; give a new or an empty folder"))
    } else {
        Ok(())
    }
}

/// Removes an unfinished folder when dropped.
struct Remove(PathBuf);

impl Drop for Remove {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}
