//! Where a model's files lie: a local folder, or a repository of a model hub (feature `hub`).
//!
//! [`ModelFiles::locate`] finds `config.json`, `tokenizer.json` and the safetensors weights of
//! either with one code path; pickled weights (`pytorch_model.bin`, `model.pt` ...) are refused, since
//! reading them runs code of their author.

#[cfg(feature = "hub")]
mod ask;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod config;
#[cfg(feature = "hub")]
mod failure;
#[cfg(feature = "hub")]
mod fetch;
mod index;
mod pickles;
#[cfg(feature = "hub")]
mod remote;
mod weights;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device};
use candle_nn::VarBuilder;

use crate::error::{Error, Result};

#[cfg(feature = "hub")]
pub use config::{DownloadProgress, HubConfig};
#[cfg(feature = "hub")]
pub use remote::{repo_file, repo_file_with, RepoKind};
pub use weights::with_prefix;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The files of one model: its configuration, its tokenizer and its weights, all on this disk.
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
}

impl ModelFiles {
    /// Finds the files of the folder `id_or_dir`, or else of the hub repository of that name
    /// (`owner/name`), downloading what its cache does not hold. `revision` is a branch, a tag or
    /// a commit of the repository; folders have none.
    ///
    /// The repository is read at one commit: files of two versions never mix.
    ///
    /// # Errors
    /// - [`Error::Hub`]: no such folder or repository, no access (says what to do about it), no
    ///   network, or offline (`HF_HUB_OFFLINE=1`) and not in the cache;
    /// - [`Error::Format`]: a required file is missing, the weights are pickled, or the index of
    ///   sharded weights names a file outside the folder, one that is missing, or a tensor that
    ///   its shard does not hold;
    /// - [`Error::Config`]: a revision was asked of a folder.
    pub fn locate(id_or_dir: &str, revision: Option<&str>) -> Result<Self> {
        #[cfg(feature = "hub")]
        {
            Self::locate_either(id_or_dir, revision, &HubConfig::from_env())
        }
        #[cfg(not(feature = "hub"))]
        {
            let reason = "there is no such local folder, and this build reads no hub (cargo feature `hub`)";
            let error = || Error::Hub { repo: id_or_dir.to_string(), reason: reason.to_string() };
            Self::in_folder(id_or_dir, revision)?.ok_or_else(error)
        }
    }

    /// Like [`Self::locate`], with explicit settings of the hub: to show the progress of downloads,
    /// for example ([`HubConfig::on_progress`]).
    ///
    /// # Errors
    /// Those of [`Self::locate`].
    #[cfg(feature = "hub")]
    pub fn locate_either(id_or_dir: &str, revision: Option<&str>, hub: &HubConfig) -> Result<Self> {
        match Self::in_folder(id_or_dir, revision)? {
            Some(files) => Ok(files),
            None => Self::locate_with(id_or_dir, revision, hub).map_err(no_folder_either),
        }
    }

    /// The files of the folder `dir`, if there is one.
    fn in_folder(dir: &str, revision: Option<&str>) -> Result<Option<Self>> {
        let path = Path::new(dir);
        if path.is_file() {
            return Err(Error::format(path, "expected a model's folder or repository, found a file"));
        }
        if !path.is_dir() {
            return Ok(None);
        }
        if let Some(revision) = revision {
            let reason = format!("{revision:?} was given, but {dir} is a local folder and has none");
            return Err(Error::config("revision", reason));
        }
        Self::collect(Source::Folder(path.to_path_buf())).map(Some)
    }

    /// Like [`Self::locate_either`] for a repository alone.
    ///
    /// # Errors
    /// Those of [`Self::locate`].
    #[cfg(feature = "hub")]
    pub fn locate_with(repo_id: &str, revision: Option<&str>, hub: &HubConfig) -> Result<Self> {
        Self::collect(Source::Repo(remote::Repo::open(hub, RepoKind::Model, repo_id, revision)?))
    }

    /// The one path behind folders and repositories.
    fn collect(source: Source) -> Result<Self> {
        let (source, config) = source.pinned(CONFIG)?;
        let tokenizer = source.file(TOKENIZER)?;
        let weights = if let Some(single) = source.file(WEIGHTS)? {
            vec![single]
        } else if let Some(path) = source.file(INDEX)? {
            let index = index::Index::read(&path)?;
            let shards = index.shards();
            let fetch = |shard: &&str| source.file(shard)?.ok_or_else(|| index.missing_shard(shard));
            let files = shards.iter().map(fetch).collect::<Result<Vec<_>>>()?;
            index.check(shards.iter().copied().zip(files.iter().map(PathBuf::as_path)))?;
            files
        } else {
            if let Some(pickle) = pickles::only_weights(&source.names(&config)?) {
                let reason = format!(
                    "it has only pickled weights ({pickle}), and reading a pickle can run any code; \
                     expected {WEIGHTS} or {INDEX} (convert the weights to safetensors, or use a \
                     repository or revision that has them)"
                );
                return Err(source.unfit(reason));
            }
            return Err(source.missing(WEIGHTS));
        };
        Ok(Self { source, config, tokenizer, weights })
    }

    /// The path of `config.json`.
    pub fn config_path(&self) -> &Path {
        &self.config
    }

    /// The path of `tokenizer.json`, where the model has one.
    pub fn tokenizer_path(&self) -> Option<&Path> {
        self.tokenizer.as_deref()
    }

    /// The weights: `model.safetensors`, or the shards of its index in the order of their names,
    /// each once.
    pub fn weights(&self) -> &[PathBuf] {
        &self.weights
    }

    /// Another file of the same folder or of the same commit of the repository, such as
    /// `generation_config.json`; `None` where there is none.
    ///
    /// # Errors
    /// If `name` leads outside the folder, or the hub fails.
    pub fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        check_relative(name).map_err(|reason| Error::config("file name", reason))?;
        self.source.file(name)
    }

    /// A `VarBuilder` over the memory-mapped weights, which casts to `dtype` and copies to
    /// `device` as tensors are asked for. It refuses what cannot be a weight: integers, NaN and
    /// infinity, another shape; the error names file and tensor.
    ///
    /// # Errors
    /// If a file is not a whole safetensors file, or two shards hold the same tensor; the error
    /// names the file.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
        self.check_weights()?;
        weights::map_builder(&self.weights, dtype, device)
    }

    /// The tensors of the weights as they lie in their files, memory-mapped.
    pub(super) fn map_weights(&self) -> Result<MmapedSafetensors> {
        self.check_weights()?;
        weights::map(&self.weights)
    }

    /// Checks that every file is whole, and that no two hold the same tensor.
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

/// The error of a repository whose name may have been meant for a folder: `models/robreta` reads
/// as `owner/name`.
#[cfg(feature = "hub")]
fn no_folder_either(error: Error) -> Error {
    match error {
        Error::Hub { repo, reason } if !reason.contains("no such local folder") => {
            Error::Hub { reason: format!("{reason} (and there is no such local folder)"), repo }
        }
        other => other,
    }
}

/// What the files come from.
#[derive(Debug, Clone)]
enum Source {
    Folder(PathBuf),
    #[cfg(feature = "hub")]
    Repo(remote::Repo),
}

impl Source {
    /// The required file `name`, and this source held at the version that file is of.
    fn pinned(self, name: &str) -> Result<(Self, PathBuf)> {
        let path = self.file(name)?.ok_or_else(|| self.missing(name))?;
        let source = match self {
            Self::Folder(dir) => Self::Folder(dir),
            #[cfg(feature = "hub")]
            Self::Repo(repo) => Self::Repo(repo.pinned_to(&path)),
        };
        Ok((source, path))
    }

    /// The path of the file `name`, if there is one.
    fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        match self {
            Self::Folder(dir) => Ok(Some(dir.join(name)).filter(|path| path.is_file())),
            #[cfg(feature = "hub")]
            Self::Repo(repo) => repo.file(name),
        }
    }

    /// The names of the files beside `config`, without downloading any.
    fn names(&self, config: &Path) -> Result<Vec<String>> {
        let dir = config.parent().unwrap_or(Path::new("."));
        match self {
            Self::Folder(_) => names_in(dir),
            // Offline, what a repository has is what its cache holds.
            #[cfg(feature = "hub")]
            Self::Repo(repo) => repo.names().map_or_else(|| names_in(dir), Ok),
        }
    }

    /// The error for a required file that is not there.
    fn missing(&self, name: &str) -> Error {
        match self {
            Self::Folder(dir) => Error::format(dir, format!("the folder has no {name}")),
            #[cfg(feature = "hub")]
            Self::Repo(repo) => repo.missing(name),
        }
    }

    /// The error for a source whose files cannot serve.
    fn unfit(&self, reason: String) -> Error {
        match self {
            Self::Folder(dir) => Error::format(dir, reason),
            #[cfg(feature = "hub")]
            Self::Repo(repo) => repo.error(reason),
        }
    }
}

/// The names of the files in a folder.
fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).map_err(Error::io(dir))?;
    let files = entries.flatten().filter(|entry| entry.path().is_file());
    Ok(files.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

/// Checks that `name` is a relative path below its folder, or says why not.
fn check_relative(name: &str) -> std::result::Result<(), String> {
    let drive = name.as_bytes().get(1) == Some(&b':');
    if name.starts_with(['/', '\\']) || drive || Path::new(name).is_absolute() {
        return Err(format!("{name:?} is an absolute path"));
    }
    let parts = || name.split(['/', '\\']);
    if parts().any(|part| part == "..") {
        return Err(format!("{name:?} leads outside its folder"));
    }
    if parts().any(|part| part.is_empty() || part == ".") || name.contains('\0') {
        return Err(format!("{name:?} is not a file name"));
    }
    Ok(())
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
