//! The source of a model's files: a folder or a repository, behind one interface.

use std::path::{Path, PathBuf};

#[cfg(feature = "hub")]
use super::repo::Repo;
use crate::error::{Error, Result};

/// The file names of a model's configuration and of an adapter's.
pub(super) const CONFIG: &str = "config.json";
const ADAPTER: &str = crate::peft::CONFIG_FILE;

const IS_ADAPTER: &str =
    "it is an adapter, not a model: load the model that its adapter_config.json names, and give \
                          this as the adapter";

/// The source of the files.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Folder(PathBuf),
    #[cfg(feature = "hub")]
    Repo(Repo),
}

impl Source {
    /// The required file `name`, and this source pinned to that file's version.
    pub(super) fn pinned(self, name: &str) -> Result<(Self, PathBuf)> {
        let path = self.file(name)?.ok_or_else(|| self.missing(name))?;
        let source = match self {
            Self::Folder(dir) => Self::Folder(dir),
            #[cfg(feature = "hub")]
            Self::Repo(repo) => Self::Repo(repo.pinned_to(&path)),
        };
        Ok((source, path))
    }

    /// The path of the file `name`, if there is one.
    pub(super) fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        match self {
            Self::Folder(dir) => Ok(Some(dir.join(name)).filter(|path| path.is_file())),
            #[cfg(feature = "hub")]
            Self::Repo(repo) => repo.file(name),
        }
    }

    /// The names of the files beside `config`, without downloading any.
    pub(super) fn names(&self, config: &Path) -> Result<Vec<String>> {
        let dir = config.parent().unwrap_or(Path::new("."));
        match self {
            Self::Folder(_) => names_in(dir),
            // Offline, the names are those in the cache.
            #[cfg(feature = "hub")]
            Self::Repo(repo) => repo.names().map_or_else(|| names_in(dir), Ok),
        }
    }

    /// The error for a missing required file.
    pub(super) fn missing(&self, name: &str) -> Error {
        match self {
            // Happens if a hub's cache was copied without the targets of its links.
            Self::Folder(dir) if dir.join(name).is_symlink() => {
                Error::format(dir.join(name), "a link to a file that does not exist: copy the file itself")
            }
            Self::Folder(dir) if name == CONFIG && dir.join(ADAPTER).is_file() => {
                Error::format(dir, IS_ADAPTER)
            }
            Self::Folder(dir) => Error::format(dir, format!("the folder has no {name}")),
            #[cfg(feature = "hub")]
            Self::Repo(repo)
                if name == CONFIG && repo.names().is_some_and(|names| names.contains(&ADAPTER.into())) =>
            {
                repo.error(IS_ADAPTER.into())
            }
            #[cfg(feature = "hub")]
            Self::Repo(repo) => repo.missing(name),
        }
    }

    /// The error for a source whose files cannot be used.
    pub(super) fn unfit(&self, reason: String) -> Error {
        match self {
            Self::Folder(dir) => Error::format(dir, reason),
            #[cfg(feature = "hub")]
            Self::Repo(repo) => repo.error(reason),
        }
    }
}

/// Refuses a revision of `dir`, which is on this disk; `what` is its kind.
pub(super) fn no_revision(revision: Option<&str>, dir: &str, what: &str) -> Result<()> {
    match revision {
        Some(revision) => {
            let reason = format!("{revision:?} was given, but {dir} is a local {what} and has none");
            Err(Error::config("revision", reason))
        }
        None => Ok(()),
    }
}

/// The error for a name that is no local folder, in a build that has no hub.
#[cfg(not(feature = "hub"))]
pub(super) fn no_hub(name: &str) -> Error {
    let reason = "there is no such local folder, and this build cannot use the hub (cargo feature `hub`)";
    Error::Hub { repo: name.to_string(), reason: reason.to_string() }
}

/// The names of the files in a folder.
fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).map_err(Error::io(dir))?;
    let files = entries.flatten().filter(|entry| entry.path().is_file());
    Ok(files.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}
