//! Repositories of a model hub, through the `hf-hub` crate: its requests, its cache, its Xet
//! transfers. What is added: `HF_HUB_OFFLINE`, one commit per model, a limit on silence and heed
//! of `Retry-After` (`ask`), downloads that go on where they broke off and are never taken for
//! whole before (`fetch`), and errors that say what to do and never hold the token (`failure`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hf_hub::{HFError, HFResult};

use super::ask::Heard;
use super::client::{connect, Client};
use super::failure::{Answer, Failure};
use super::{check_relative, config::HubConfig};
use crate::error::{Error, Result};

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RepoKind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl RepoKind {
    /// Its name in the cache's folders.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// The file `path` of a hub repository (`owner/name`), from the cache or downloaded: a data
/// set's parquet file, for example. `revision` is a branch, a tag or a commit; `None` is `main`.
///
/// ```no_run
/// use monteclora::models::hub::{repo_file, RepoKind};
///
/// let rows = repo_file("nyu-mll/glue", RepoKind::Dataset, "mrpc/train-00000-of-00001.parquet", None)?;
/// # Ok::<(), monteclora::Error>(())
/// ```
///
/// # Errors
/// [`Error::Hub`] if there is no such repository, revision or file, no access, no network, or the
/// hub is offline (`HF_HUB_OFFLINE=1`) and the cache does not hold the file.
pub fn repo_file(repo_id: &str, kind: RepoKind, path: &str, revision: Option<&str>) -> Result<PathBuf> {
    repo_file_with(repo_id, kind, path, revision, &HubConfig::from_env())
}

/// Like [`repo_file`], with explicit settings of the hub.
///
/// # Errors
/// Those of [`repo_file`].
pub fn repo_file_with(
    repo_id: &str,
    kind: RepoKind,
    path: &str,
    revision: Option<&str>,
    hub: &HubConfig,
) -> Result<PathBuf> {
    let repo = Repo::open(hub, kind, repo_id, revision)?;
    check_relative(path).map_err(|reason| repo.error(reason))?;
    repo.file(path)?.ok_or_else(|| repo.missing(path))
}

/// One revision of one repository.
#[derive(Clone)]
pub(super) struct Repo {
    pub(super) hub: HubConfig,
    pub(super) client: Arc<dyn Client>,
    pub(super) kind: RepoKind,
    pub(super) id: String,
    revision: String,
}

impl Repo {
    pub(super) fn open(hub: &HubConfig, kind: RepoKind, id: &str, revision: Option<&str>) -> Result<Self> {
        let error = |reason: String| Error::Hub { repo: id.to_string(), reason: hub.redact(reason) };
        if !is_repo_id(id) {
            return Err(error(
                "there is no such local folder, and this is no repository name (owner/name)".into(),
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

    /// The same repository, held at the commit that the cached file `path` is of.
    pub(super) fn pinned_to(mut self, path: &Path) -> Self {
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        if let Some(commit) = folder.filter(|name| is_commit(name)) {
            self.revision = commit.to_string();
        }
        self
    }

    /// The local path of the file `name`, downloaded if need be; `None` if there is no such file,
    /// or, offline, if the cache has none.
    pub(super) fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        if self.hub.offline || is_commit(&self.revision) {
            // What a commit holds does not change, so the cache's word is the last.
            match self.cached(name) {
                Err(HFError::LocalEntryNotFound { .. }) if !self.hub.offline => {}
                found => return self.found(found.map_err(Failure::Hub)),
            }
        }
        match self.download(name) {
            Err(failure) if failure.is_outage() => match self.cached(name) {
                Err(HFError::LocalEntryNotFound { .. }) => Err(self.explain(failure)),
                found => {
                    let reason = self.explain(failure);
                    tracing::warn!("{name} is taken from the cache, where it may be out of date: {reason}");
                    self.found(found.map_err(Failure::Hub))
                }
            },
            found => self.found(found),
        }
    }

    fn found(&self, found: Answer<PathBuf>) -> Result<Option<PathBuf>> {
        match found {
            Ok(path) => Ok(Some(path)),
            Err(Failure::Hub(HFError::EntryNotFound { .. } | HFError::LocalEntryNotFound { .. })) => Ok(None),
            Err(failure) => Err(self.explain(failure)),
        }
    }

    /// The file's path in the cache; [`HFError::EntryNotFound`] if the cache remembers that there
    /// is no such file, [`HFError::LocalEntryNotFound`] if it knows nothing of it.
    pub(super) fn cached(&self, name: &str) -> HFResult<PathBuf> {
        self.client.download(name, &self.revision, true, None)
    }

    fn download(&self, name: &str) -> Answer<PathBuf> {
        let (file, revision) = (name.to_string(), self.revision.clone());
        match self.ask(move |client| client.metadata(&file, &revision)) {
            Ok(about) if self.comes_in_parts(&about) => {
                for (what, name) in [("ETag", &about.etag), ("commit", &about.commit_hash)] {
                    // Both become names in the cache.
                    check_relative(name).map_err(|reason| {
                        Failure::Here(self.error(format!("the hub's {what} is no name: {reason}")))
                    })?;
                }
                self.fetch(name, &about, || self.download_whole(name, &mut |_, _| {}))
            }
            Err(failure) if failure.is_outage() => Err(failure),
            // Metadata come from where redirects lead, so their absence says nothing: the
            // download asks the hub itself.
            _ => self.download_whole(name, &mut |bytes, total| self.report(name, bytes, total)),
        }
    }

    /// The file by `hf-hub` alone, which downloads it unless it has been put at its place.
    fn download_whole(&self, name: &str, heard: Heard) -> Answer<PathBuf> {
        self.again(|| {
            let (file, revision) = (name.to_string(), self.revision.clone());
            let operation =
                move |client: &dyn Client, watch| client.download(&file, &revision, false, Some(watch));
            let (path, announced) = self.once(heard, operation)?;
            self.whole(name, path, announced)
        })
    }

    /// The names of the repository's files; None offline. They serve to explain what is missing, so that
    /// a hub that does not tell them has none.
    pub(super) fn names(&self) -> Option<Vec<String>> {
        if self.hub.offline {
            return None;
        }
        let revision = self.revision.clone();
        Some(self.ask(move |client| client.names(&revision)).unwrap_or_default())
    }

    /// Checks that the file at `path` has the announced length. Where `hf-hub` fetches a file by
    /// itself, it does not look at the answer's status, and caches the text of an error as if it
    /// were the file.
    fn whole(&self, name: &str, path: PathBuf, announced: Option<u64>) -> Answer<PathBuf> {
        let metadata = std::fs::metadata(&path).map_err(|e| Failure::Here(Error::io(&path)(e)))?;
        let got = metadata.len();
        let Some(expected) = announced.filter(|expected| *expected != got) else {
            return Ok(path);
        };
        // Both the file and the link to it: a wrong file must not be found in the cache next time.
        for stale in [path.canonicalize().ok(), Some(path)].into_iter().flatten() {
            std::fs::remove_file(stale).ok();
        }
        Err(Failure::Length { name: name.to_string(), expected, got })
    }

    /// The error for a required file that is not there: finds out what exactly is missing.
    pub(super) fn missing(&self, name: &str) -> Error {
        if self.hub.offline {
            return self.error(format!(
                "{name} of revision {} is not in the cache ({}), and HF_HUB_OFFLINE forbids downloading it; \
                 unset it, or give a local folder",
                self.revision,
                self.hub.cache.display()
            ));
        }
        let revision = self.revision.clone();
        match self.ask(move |client| client.what_exists(&revision)) {
            Ok((false, _)) => self.error("the hub has no such repository (404)".into()),
            Ok((true, false)) => self.error(format!("there is no revision {} (404)", self.revision)),
            // The first question was answered with 404, whatever became of the second.
            _ => self.error(format!("there is no file {name} at revision {} (404)", self.revision)),
        }
    }
}

impl std::fmt::Debug for Repo {
    // Without the client: what its parts show of themselves is not this crate's to decide.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repo")
            .field("hub", &self.hub)
            .field("kind", &self.kind)
            .field("id", &self.id)
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}

/// Whether `revision` is a commit, which never changes.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether `id` is a repository's name: `owner/name`, or `name` alone for a few old ones.
fn is_repo_id(id: &str) -> bool {
    let part = |part: &str| {
        let allowed = part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        allowed
            && !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && !part.contains("--")
    };
    id.split('/').count() <= 2 && id.split('/').all(part) && id.len() <= 193
}
