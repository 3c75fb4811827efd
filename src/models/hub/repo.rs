//! One revision of a hub repository, and the client that serves it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hf_hub::HFResult;

use super::client::{connect, Client, RepoKind};
use super::config::HubConfig;
use super::names::{check_relative, is_commit, is_repo_id};
use crate::error::{Error, Result};

/// One revision of a repository.
#[derive(Clone)]
pub(super) struct Repo {
    pub(super) hub: HubConfig,
    pub(super) client: Arc<dyn Client>,
    pub(super) kind: RepoKind,
    pub(super) id: String,
    pub(super) revision: String,
}

impl Repo {
    pub(super) fn open(hub: &HubConfig, kind: RepoKind, id: &str, revision: Option<&str>) -> Result<Self> {
        let error = |reason: String| Error::Hub { repo: id.to_string(), reason: hub.redact(reason) };
        if !is_repo_id(id) {
            return Err(error(
                "there is no such local folder, and this is not a repository name (owner/name)".into(),
            ));
        }
        let revision = revision.unwrap_or("main");
        check_relative(revision).map_err(|reason| error(format!("revision {reason}")))?;
        if hub.token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            let reason = "the token holds blanks or other characters that cannot be sent: check HF_TOKEN";
            return Err(error(reason.into()));
        }
        let client =
            connect(hub, kind, id).map_err(|e| error(format!("the hub's client cannot start: {e}")))?;
        Ok(Self { hub: hub.clone(), client, kind, id: id.to_string(), revision: revision.to_string() })
    }

    /// The same repository, pinned to the commit of the cached file `path`.
    pub(super) fn pinned_to(mut self, path: &Path) -> Self {
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        if let Some(commit) = folder.filter(|name| is_commit(name)) {
            self.revision = commit.to_string();
        }
        self
    }

    /// The file's path in the cache. The error is `EntryNotFound` if the cache has recorded that there is no
    /// such file, and `LocalEntryNotFound` if it has no record of it.
    pub(super) fn cached(&self, name: &str) -> HFResult<PathBuf> {
        self.client.download(name, &self.revision, true, None)
    }

    /// An error about this repository.
    pub(super) fn error(&self, reason: String) -> Error {
        Error::Hub { repo: self.id.clone(), reason: self.hub.redact(reason) }
    }
}

impl std::fmt::Debug for Repo {
    // Leaves out the client, because this crate does not control what its `Debug` output reveals.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repo")
            .field("hub", &self.hub)
            .field("kind", &self.kind)
            .field("id", &self.id)
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}

/// Adds to a repository's error that there is no such folder either: `models/robreta`, a mistyped folder, has
/// the form `owner/name`.
pub(super) fn no_folder_either(error: Error) -> Error {
    match error {
        Error::Hub { repo, reason } if !reason.contains("no such local folder") => {
            Error::Hub { reason: format!("{reason} (and there is no such local folder)"), repo }
        }
        other => other,
    }
}
