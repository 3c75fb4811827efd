//! The files of one model, located in a folder or a repository with one code path.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde_json::Value;

use super::bitsandbytes::FourBits;
#[cfg(feature = "hub")]
use super::client::RepoKind;
#[cfg(feature = "hub")]
use super::config::HubConfig;
use super::index::Index;
use super::names::check_relative;
#[cfg(feature = "hub")]
use super::names::is_repo_id;
#[cfg(feature = "hub")]
use super::repo::{no_folder_either, Repo};
#[cfg(not(feature = "hub"))]
use super::source::no_hub;
use super::source::{no_revision, Source, CONFIG};
use super::weights::MappedWeights;
use super::{pickles, weights};
use crate::error::{Error, Result};
use crate::models::gguf::Gguf;
use crate::models::quantize::Quantization;
use crate::models::weights::{QuantizedSource, Weights};
use crate::util::json;

pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The files of one model: its configuration, its tokenizer and its weights, all on the local disk.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use monteclora::models::hub::ModelFiles;
///
/// let files = ModelFiles::locate("FacebookAI/roberta-base", None)?; // or a folder: "models/roberta"
/// let config = std::fs::read_to_string(files.config_path()).map_err(monteclora::Error::io(files.config_path()))?;
/// let vb = files.var_builder(DType::F32, &Device::Cpu)?;
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ModelFiles {
    source: Source,
    config: PathBuf,
    tokenizer: Option<PathBuf>,
    weights: Vec<PathBuf>,
    /// The GGUF file, if the model is one. It holds everything except a tokenizer that may be beside it.
    gguf: Option<Gguf>,
    quantization: Option<Quantization>,
    /// The requested branch, tag or commit.
    revision: Option<String>,
}

impl ModelFiles {
    /// Finds the files of the folder `id_or_dir` or, if there is none, of the hub repository of that name
    /// (`owner/name`), downloading what the cache does not hold. `revision` is a branch, a tag or a commit of
    /// the repository; folders have none. A GGUF file is a model as well: a local one, or one in a repository
    /// (`owner/name/file.gguf`).
    ///
    /// A repository is read at one commit, so that files of two versions never mix.
    ///
    /// # Errors
    /// - [`Error::Hub`]: there is no such folder or repository, no access (the error says what to do), no
    ///   network, or a file is not in the cache in offline mode (`HF_HUB_OFFLINE=1`);
    /// - [`Error::Format`]: a required file is missing, the weights are pickled, or the index of
    ///   sharded weights names a file outside the folder, one that is missing, or a tensor that
    ///   its shard does not hold;
    /// - [`Error::Config`]: a revision was given for a local folder or file.
    pub fn locate(id_or_dir: &str, revision: Option<&str>) -> Result<Self> {
        #[cfg(feature = "hub")]
        {
            Self::locate_with(id_or_dir, revision, &HubConfig::from_env())
        }
        #[cfg(not(feature = "hub"))]
        {
            Self::in_folder(id_or_dir, revision)?.ok_or_else(|| no_hub(id_or_dir))
        }
    }

    /// Like [`Self::locate`], with explicit hub settings, for example to show the progress of downloads
    /// ([`HubConfig::on_progress`]).
    ///
    /// # Errors
    /// Those of [`Self::locate`].
    #[cfg(feature = "hub")]
    pub fn locate_with(id_or_dir: &str, revision: Option<&str>, hub: &HubConfig) -> Result<Self> {
        match Self::in_folder(id_or_dir, revision)? {
            Some(files) => Ok(files),
            None => Self::locate_repo(id_or_dir, revision, hub).map_err(no_folder_either),
        }
    }

    /// The files of the folder or GGUF file `dir`, if it exists.
    fn in_folder(dir: &str, revision: Option<&str>) -> Result<Option<Self>> {
        let path = Path::new(dir);
        let is_file = path.is_file();
        if is_file && !is_gguf(dir) {
            let reason = "expected a model's folder, a repository or a .gguf file, found another file";
            return Err(Error::format(path, reason));
        }
        if !is_file && !path.is_dir() {
            return Ok(None);
        }
        no_revision(revision, dir, if is_file { "file" } else { "folder" })?;
        if is_file {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let source = Source::Folder(folder.unwrap_or(Path::new(".")).to_path_buf());
            return Self::of_gguf(source, path.to_path_buf()).map(Some);
        }
        Self::collect(Source::Folder(path.to_path_buf())).map(Some)
    }

    /// The GGUF file at `path` in `source`, and the tokenizer beside it if there is one.
    fn of_gguf(source: Source, path: PathBuf) -> Result<Self> {
        let gguf = Gguf::open(&path)?;
        let tokenizer = source.file(TOKENIZER)?;
        Ok(Self {
            source,
            config: path.clone(),
            tokenizer,
            weights: vec![path],
            gguf: Some(gguf),
            quantization: None,
            revision: None,
        })
    }

    /// Like [`Self::locate_with`], for repositories only.
    ///
    /// # Errors
    /// Those of [`Self::locate`].
    #[cfg(feature = "hub")]
    pub fn locate_repo(repo_id: &str, revision: Option<&str>, hub: &HubConfig) -> Result<Self> {
        let repo = |id: &str| Repo::open(hub, RepoKind::Model, id, revision).map(Source::Repo);
        let found = match file_in_repository(repo_id) {
            Some((id, file)) => {
                check_relative(file).map_err(|reason| Error::config("file name", reason))?;
                let (source, path) = repo(id)?.pinned(file)?;
                Self::of_gguf(source, path)?
            }
            None => Self::collect(repo(repo_id)?)?,
        };
        Ok(Self { revision: revision.map(str::to_string), ..found })
    }

    /// Finds the files in a folder or a repository.
    fn collect(source: Source) -> Result<Self> {
        let (source, config) = source.pinned(CONFIG)?;
        let tokenizer = source.file(TOKENIZER)?;
        let weights = if let Some(single) = source.file(WEIGHTS)? {
            vec![single]
        } else if let Some(path) = source.file(INDEX)? {
            let index = Index::read(&path)?;
            let shards = index.shards();
            let fetch = |shard: &&str| source.file(shard)?.ok_or_else(|| index.missing_shard(shard));
            let files = shards.iter().map(fetch).collect::<Result<Vec<_>>>()?;
            index.check(shards.iter().copied().zip(files.iter().map(PathBuf::as_path)))?;
            files
        } else {
            if let Some(pickle) = pickles::only_weights(&source.names(&config)?) {
                let reason = format!(
                    "it has only pickled weights ({pickle}), and reading a pickle can run any code; \
                     expected {WEIGHTS} or {INDEX} (convert the weights to safetensors once, in Python, by \
                     transformers.AutoModel.from_pretrained(ID).save_pretrained(DIR), or use a repository or \
                     revision that has them)"
                );
                return Err(source.unfit(reason));
            }
            return Err(source.missing(WEIGHTS));
        };
        Ok(Self { source, config, tokenizer, weights, gguf: None, quantization: None, revision: None })
    }

    /// The requested branch, tag or commit, which an adapter of this model records beside the model's name.
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// The path of `config.json`, or of the GGUF file in its place.
    pub fn config_path(&self) -> &Path {
        &self.config
    }

    /// The configuration: `config.json`, or its equivalent from the metadata of a GGUF file.
    ///
    /// # Errors
    /// If the file cannot be read or is malformed; the error names it.
    pub fn config(&self) -> Result<Value> {
        match &self.gguf {
            Some(gguf) => gguf.config(),
            None => json::parse(json::read_config(&self.config)?, &self.config),
        }
    }

    /// The path of `tokenizer.json`, if the model has this file.
    pub fn tokenizer_path(&self) -> Option<&Path> {
        self.tokenizer.as_deref()
    }

    /// The GGUF file, if the model is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// The files of the weights: `model.safetensors`, the shards of its index in the order of their names, or
    /// the one GGUF file.
    pub fn weights(&self) -> &[PathBuf] {
        &self.weights
    }

    /// The path of another file of the same folder, or of the same commit of the repository, such as
    /// `generation_config.json`; `None` if there is none.
    ///
    /// # Errors
    /// If `name` leads outside the folder, or the hub fails.
    pub fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        check_relative(name).map_err(|reason| Error::config("file name", reason))?;
        self.source.file(name)
    }

    /// A `VarBuilder` over the memory-mapped weights, which casts each tensor to `dtype` and copies it to
    /// `device` when it is requested. It rejects integers, NaN, infinity and wrong shapes with an error that
    /// names the file and the tensor. Quantised tensors of a GGUF file are dequantised.
    ///
    /// # Errors
    /// If a file is not a whole safetensors file, or two shards hold the same tensor; the error
    /// names the file.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
        if let Some(gguf) = &self.gguf {
            return Ok(gguf.var_builder(dtype, device));
        }
        self.check_weights()?;
        weights::map_builder(&self.weights, dtype, device)
    }

    /// The same files, with the quantisation that [`Self::open_weights`] applies to matrices (`None`: none).
    pub fn quantized(self, quantization: Option<Quantization>) -> Self {
        Self { quantization, ..self }
    }

    /// Rejects formats of quantised weights that are not supported, before any weight is read.
    fn check_quantization(&self) -> Result<()> {
        let config = self.config()?;
        let quantization = &config["quantization_config"];
        let method = quantization["quant_method"].as_str();
        let in_eight = quantization["load_in_8bit"].as_bool() == Some(true);
        if quantization.is_null() || (matches!(method, None | Some("bitsandbytes")) && !in_eight) {
            return Ok(());
        }
        let found = match method {
            Some(method) if !in_eight => method,
            _ => "bitsandbytes in 8 bits",
        };
        let reason = format!(
            "{}: weights quantised by {found} are not supported: use the unquantised model, bitsandbytes' \
             nf4 or GGUF",
            self.config.display()
        );
        Err(Error::config("quantization_config", reason))
    }

    /// Opens the weights for loading a model. In contrast to [`Self::var_builder`], quantised matrices (of a
    /// GGUF file, or bitsandbytes' NF4) stay quantised, and matrices are quantised as they are fetched if
    /// [`Self::quantized`] requested it.
    ///
    /// # Errors
    /// As [`Self::var_builder`]; if matrices are quantised in another format, or if quantisation was
    /// requested and they are quantised already.
    pub fn open_weights(&self, dtype: DType, device: &Device) -> Result<Weights<'static>> {
        self.check_quantization()?;
        let builder = self.var_builder(dtype, device)?;
        let four_bits = || FourBits::find(MappedWeights::of(&self.weights)?);
        let already = match &self.gguf {
            Some(gguf) => gguf.quantized().map(|source| ("GGUF", source)),
            None => {
                four_bits()?.map(|bits| ("bitsandbytes' nf4", Arc::new(bits) as Arc<dyn QuantizedSource>))
            }
        };
        match (already, self.quantization) {
            (None, None) => Ok(builder.into()),
            (None, Some(quantization)) => {
                let source = quantization.source(&self.var_builder(DType::F32, &Device::Cpu)?);
                Ok(Weights::new(builder, source))
            }
            (Some((_, source)), None) => Ok(Weights::new(builder, source)),
            (Some((kind, _)), Some(_)) => {
                let reason = format!("the weights are already quantised ({kind}): omit this option");
                Err(Error::config("quantize", reason))
            }
        }
    }

    /// The tensors of the weights as stored in their safetensors files, memory-mapped.
    pub(in crate::models) fn map_weights(&self) -> Result<MmapedSafetensors> {
        if self.gguf.is_some() {
            let reason =
                "expected a model in safetensors to write it as safetensors, got GGUF: merge into GGUF \
                          (`save_merged_gguf`, `--merged-gguf`), or give the model's safetensors";
            return Err(Error::format(&self.config, reason));
        }
        self.check_weights()?;
        weights::map(&self.weights)
    }

    /// Checks that every file is complete, and that no two hold the same tensor.
    fn check_weights(&self) -> Result<()> {
        let mut seen = BTreeSet::new();
        for path in &self.weights {
            for name in weights::tensor_names(path)? {
                if !seen.insert(name.clone()) {
                    return Err(Error::format(path, format!("tensor {name} is in another shard as well")));
                }
            }
        }
        Ok(())
    }
}

/// Whether a file name ends in `.gguf`.
fn is_gguf(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// Splits `id` into `owner/name` and the GGUF file in it, if it names one.
#[cfg(feature = "hub")]
fn file_in_repository(id: &str) -> Option<(&str, &str)> {
    let (at, _) = id.match_indices('/').nth(1).filter(|_| is_gguf(id))?;
    Some((&id[..at], &id[at + 1..])).filter(|(id, _)| is_repo_id(id))
}
