//! The folder of an adapter: a local one, or that of a hub repository in its cache.

use std::path::{Path, PathBuf};

#[cfg(feature = "hub")]
use super::config::HubConfig;
#[cfg(feature = "hub")]
use super::repo::{no_folder_either, Repo};
#[cfg(not(feature = "hub"))]
use super::source::no_hub;
use super::source::no_revision;
#[cfg(feature = "hub")]
use super::source::Source;
#[cfg(feature = "hub")]
use super::RepoKind;
use crate::error::Result;
#[cfg(feature = "hub")]
use crate::peft::{CONFIG_FILE, OWN_FILE, WEIGHTS_FILE};

/// Finds the folder of an adapter for [`AdapterFile::read`](crate::peft::AdapterFile::read) and
/// `Classifier::open`: the folder `id_or_dir`, or else that of the hub repository of this name (`owner/name`), whose
/// files are downloaded where the cache does not hold them. `revision` is a branch, a tag or a commit of the
/// repository.
///
/// # Errors
/// - [`Error::Hub`](crate::Error::Hub): no such folder or repository, no access, no network, or offline and not in the cache;
/// - [`Error::Config`](crate::Error::Config): a revision was asked of a folder.
pub fn locate_adapter(id_or_dir: &str, revision: Option<&str>) -> Result<PathBuf> {
    #[cfg(feature = "hub")]
    {
        locate_adapter_with(id_or_dir, revision, &HubConfig::from_env())
    }
    #[cfg(not(feature = "hub"))]
    {
        in_folder(id_or_dir, revision)?.ok_or_else(|| no_hub(id_or_dir))
    }
}

/// Like [`locate_adapter`], with explicit settings of the hub.
///
/// # Errors
/// Those of [`locate_adapter`].
#[cfg(feature = "hub")]
pub fn locate_adapter_with(id_or_dir: &str, revision: Option<&str>, hub: &HubConfig) -> Result<PathBuf> {
    if let Some(dir) = in_folder(id_or_dir, revision)? {
        return Ok(dir);
    }
    of_repo(id_or_dir, revision, hub).map_err(no_folder_either)
}

#[cfg(feature = "hub")]
fn of_repo(repo_id: &str, revision: Option<&str>, hub: &HubConfig) -> Result<PathBuf> {
    let repo = Repo::open(hub, RepoKind::Model, repo_id, revision)?;
    let (source, config) = Source::Repo(repo).pinned(CONFIG_FILE)?;
    if source.file(WEIGHTS_FILE)?.is_none() {
        let names = source.names(&config)?;
        return Err(match names.iter().find(|name| name.starts_with("adapter_model.")) {
            Some(other) => source.unfit(format!(
                "it has no {WEIGHTS_FILE} but {other}, which is not read (a pickle can run any code): convert it once, \
                 in Python, by PeftModel.from_pretrained(..).save_pretrained(DIR)"
            )),
            None => source.missing(WEIGHTS_FILE),
        });
    }
    source.file(OWN_FILE)?; // PEFT writes none
    Ok(config.parent().unwrap_or(Path::new(".")).to_path_buf())
}

/// The folder `dir`, if there is one.
fn in_folder(dir: &str, revision: Option<&str>) -> Result<Option<PathBuf>> {
    if !Path::new(dir).is_dir() {
        return Ok(None);
    }
    no_revision(revision, dir, "folder")?;
    Ok(Some(PathBuf::from(dir)))
}
