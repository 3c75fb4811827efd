//! Requests to the `hf-hub` crate, as one trait, because its handles for models and data sets differ in type.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use hf_hub::progress::Progress;
use hf_hub::repository::{FileMetadataInfo, RepoTreeEntry};
use hf_hub::{split_id, HFClient, HFRepositorySync, HFResult, RepoType};

use super::config::HubConfig;

/// The kind of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RepoKind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl RepoKind {
    /// The name in the cache's folders.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// Stands for no token. Without a token, `hf-hub` looks for one in the environment by itself, and would send
/// one that [`HubConfig`] neither holds nor redacts. This value cannot be part of a header, so that no token
/// is sent.
const NO_TOKEN: &str = "\n";

/// The limit on the requested entries of a repository's listing, which is the size of one page.
const MAX_NAMES: usize = 1000;

/// The requests to one repository. Each blocks until it is answered.
pub(super) trait Client: Send + Sync {
    /// Size, ETag and commit of a file, after all redirects.
    fn metadata(&self, name: &str, revision: &str) -> HFResult<FileMetadataInfo>;
    /// The bytes of a file, or a range of them. `hf-hub` checks the status of this answer.
    fn bytes(
        &self,
        name: &str,
        revision: &str,
        range: Option<Range<u64>>,
        progress: Progress,
    ) -> HFResult<Vec<u8>>;
    /// A file's path in the cache, after downloading the file if needed, unless `offline`.
    fn download(
        &self,
        name: &str,
        revision: &str,
        offline: bool,
        progress: Option<Progress>,
    ) -> HFResult<PathBuf>;
    /// The names of the files at the top level.
    fn names(&self, revision: &str) -> HFResult<Vec<String>>;
    /// Whether the repository exists, and whether its revision does.
    fn what_exists(&self, revision: &str) -> HFResult<(bool, bool)>;
}

/// The client of the repository `id`. Retries are left to the caller: `hf-hub` ignores `Retry-After`, and
/// does not retry a transfer that broke off in the middle.
pub(super) fn connect(hub: &HubConfig, kind: RepoKind, id: &str) -> HFResult<Arc<dyn Client>> {
    let client = HFClient::builder()
        .endpoint(&hub.endpoint)
        .cache_dir(&hub.cache)
        .retry_max_attempts(0)
        .token(hub.token.as_deref().unwrap_or(NO_TOKEN))
        .build_sync()?;
    let (owner, name) = split_id(id);
    Ok(match kind {
        RepoKind::Model => Arc::new(client.model(owner, name)),
        RepoKind::Dataset => Arc::new(client.dataset(owner, name)),
    })
}

impl<T: RepoType> Client for HFRepositorySync<T> {
    fn metadata(&self, name: &str, revision: &str) -> HFResult<FileMetadataInfo> {
        self.get_file_metadata().filepath(name).revision(revision).send()
    }

    fn bytes(
        &self,
        name: &str,
        revision: &str,
        range: Option<Range<u64>>,
        progress: Progress,
    ) -> HFResult<Vec<u8>> {
        let asked = self.download_file_to_bytes().filename(name).revision(revision);
        Ok(asked.maybe_range(range).progress(progress).send()?.into())
    }

    fn download(
        &self,
        name: &str,
        revision: &str,
        offline: bool,
        progress: Option<Progress>,
    ) -> HFResult<PathBuf> {
        let asked = self.download_file().filename(name).revision(revision);
        asked.local_files_only(offline).maybe_progress(progress).send()
    }

    fn names(&self, revision: &str) -> HFResult<Vec<String>> {
        let entries = self.list_tree().revision(revision).limit(MAX_NAMES).send()?;
        let name = |entry| match entry {
            RepoTreeEntry::File { path, .. } => Some(path),
            _ => None,
        };
        Ok(entries.into_iter().filter_map(name).collect())
    }

    fn what_exists(&self, revision: &str) -> HFResult<(bool, bool)> {
        let exists = HFRepositorySync::exists(self).send()?;
        Ok((exists, exists && self.revision_exists().revision(revision).send()?))
    }
}
