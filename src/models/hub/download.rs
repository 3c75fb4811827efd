//! Files of a repository: from the cache, or downloaded whole or in parts.

use std::path::PathBuf;

use hf_hub::HFError;

use super::client::{Client, RepoKind};
use super::config::HubConfig;
use super::failure::{Failure, HubResult};
use super::names::{check_relative, is_commit};
use super::repo::Repo;
use super::retry::OnBytes;
use crate::error::{Error, Result};

/// Returns the local path of the file `path` of a hub repository (`owner/name`), such as a data set's parquet
/// file. The file is downloaded if the cache does not hold it. `revision` is a branch, a tag or a commit;
/// `None` is `main`.
///
/// ```no_run
/// use monteclora::models::hub::{repo_file, RepoKind};
///
/// let rows = repo_file("nyu-mll/glue", RepoKind::Dataset, "mrpc/train-00000-of-00001.parquet", None)?;
/// # Ok::<(), monteclora::Error>(())
/// ```
///
/// # Errors
/// [`Error::Hub`] if there is no such repository, revision or file, no access, no network, or if the cache
/// does not hold the file in offline mode (`HF_HUB_OFFLINE=1`).
pub fn repo_file(repo_id: &str, kind: RepoKind, path: &str, revision: Option<&str>) -> Result<PathBuf> {
    repo_file_with(repo_id, kind, path, revision, &HubConfig::from_env())
}

/// Like [`repo_file`], with explicit hub settings.
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

impl Repo {
    /// The local path of the file `name`, which is downloaded if needed; `None` if there is no such file or,
    /// offline, if it is not in the cache.
    pub(super) fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        if self.hub.offline || is_commit(&self.revision) {
            // The files of a commit never change, so the cache's answer is final.
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
                    tracing::warn!("using {name} from the cache, which may be out of date: {reason}");
                    self.found(found.map_err(Failure::Hub))
                }
            },
            found => self.found(found),
        }
    }

    fn found(&self, found: HubResult<PathBuf>) -> Result<Option<PathBuf>> {
        match found {
            Ok(path) => Ok(Some(path)),
            Err(Failure::Hub(HFError::EntryNotFound { .. } | HFError::LocalEntryNotFound { .. })) => Ok(None),
            Err(failure) => Err(self.explain(failure)),
        }
    }

    fn download(&self, name: &str) -> HubResult<PathBuf> {
        let (file, revision) = (name.to_string(), self.revision.clone());
        match self.request(move |client| client.metadata(&file, &revision)) {
            Ok(about) if self.comes_in_parts(&about) => {
                for (what, name) in [("ETag", &about.etag), ("commit", &about.commit_hash)] {
                    // Both become file names in the cache.
                    check_relative(name).map_err(|reason| {
                        Failure::Local(
                            self.error(format!("the hub's {what} is not a valid file name: {reason}")),
                        )
                    })?;
                }
                self.download_in_parts(name, &about, || self.download_whole(name, &mut |_, _| {}))
            }
            Err(failure) if failure.is_outage() => Err(failure),
            // The metadata are those at the end of all redirects, so their absence proves nothing: the
            // download asks the hub itself.
            _ => self.download_whole(name, &mut |bytes, total| self.report(name, bytes, total)),
        }
    }

    /// Returns the path of the file from `hf-hub`, which downloads it unless it is already in the cache.
    fn download_whole(&self, name: &str, on_bytes: OnBytes) -> HubResult<PathBuf> {
        self.retry(|| {
            let (file, revision) = (name.to_string(), self.revision.clone());
            let operation =
                move |client: &dyn Client, progress| client.download(&file, &revision, false, Some(progress));
            let (path, announced) = self.attempt(on_bytes, operation)?;
            self.whole(name, path, announced)
        })
    }

    /// The names of the repository's files; `None` offline. They are only used to explain what is missing, so
    /// a failed request counts as an empty list.
    pub(super) fn names(&self) -> Option<Vec<String>> {
        if self.hub.offline {
            return None;
        }
        let revision = self.revision.clone();
        Some(self.request(move |client| client.names(&revision)).unwrap_or_default())
    }

    /// Checks that the file at `path` has the announced length. When `hf-hub` downloads a file by itself, it
    /// ignores the status of the response, and caches the text of an error as if it were the file.
    fn whole(&self, name: &str, path: PathBuf, announced: Option<u64>) -> HubResult<PathBuf> {
        let metadata = std::fs::metadata(&path).map_err(|e| Failure::Local(Error::io(&path)(e)))?;
        let got = metadata.len();
        let Some(expected) = announced.filter(|expected| *expected != got) else {
            return Ok(path);
        };
        // Removes the file and the link to it, so that the wrong file is not found in the cache next time.
        for stale in [path.canonicalize().ok(), Some(path)].into_iter().flatten() {
            std::fs::remove_file(stale).ok();
        }
        Err(Failure::Length { name: name.to_string(), expected, got })
    }

    /// The error for a missing required file. Finds out what exactly is missing.
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
        match self.request(move |client| client.what_exists(&revision)) {
            Ok((false, _)) => self.error("the hub has no such repository (404)".into()),
            Ok((true, false)) => self.error(format!("there is no revision {} (404)", self.revision)),
            // The first request was answered with 404, whatever this one says.
            _ => self.error(format!("there is no file {name} at revision {} (404)", self.revision)),
        }
    }
}
