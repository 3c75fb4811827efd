//! Repositories of a model hub, through the `hf-hub` crate: its cache, its Xet transfers, its
//! retries. What is added here: `HF_HUB_OFFLINE`, one commit per model, a limit on silence, a
//! check of each download's length, and errors that say what to do and never hold the token.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::time::Instant;

use hf_hub::progress::{DownloadEvent, Progress, ProgressEvent, ProgressHandler};
use hf_hub::{split_id, HFClient, HFClientSync, HFError, HFRepositorySync, HFResult, RepoType};

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
#[derive(Debug, Clone)]
pub(super) struct Repo {
    hub: HubConfig,
    client: HFClientSync,
    kind: RepoKind,
    id: String,
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
        let client =
            HFClient::builder().endpoint(&hub.endpoint).cache_dir(&hub.cache).retry_max_attempts(hub.retries);
        let client = match &hub.token {
            Some(token) => client.token(token),
            None => client,
        };
        let client = client.build_sync().map_err(|e| error(format!("the hub's client cannot start: {e}")))?;
        Ok(Self { hub: hub.clone(), client, kind, id: id.to_string(), revision: revision.to_string() })
    }

    /// The same repository, held at the commit that the cached file `path` is of.
    pub(super) fn pinned_to(mut self, path: &Path) -> Self {
        let is_commit = |name: &&str| name.len() == 40 && name.bytes().all(|b| b.is_ascii_hexdigit());
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        if let Some(commit) = folder.filter(is_commit) {
            self.revision = commit.to_string();
        }
        self
    }

    /// The local path of the file `name`, downloaded if need be; `None` if there is no such file,
    /// or, offline, if the cache has none.
    pub(super) fn file(&self, name: &str) -> Result<Option<PathBuf>> {
        let (result, announced) = self.download(name, self.hub.offline)?;
        match result {
            Ok(path) => self.whole(name, path, announced).map(Some),
            Err(HFError::EntryNotFound { .. } | HFError::LocalEntryNotFound { .. }) => Ok(None),
            // Without a network, `hf-hub` finds what the cache holds, but not what the cache
            // remembers not to exist.
            Err(error) => match self.download(name, true)?.0 {
                Err(HFError::EntryNotFound { .. }) => Ok(None),
                _ => Err(self.explain(error)),
            },
        }
    }

    fn download(&self, name: &str, offline: bool) -> Result<(HFResult<PathBuf>, Option<u64>)> {
        let (file, revision) = (name.to_string(), self.revision.clone());
        match self.kind {
            RepoKind::Model => {
                self.call(Self::model, move |repo, watch| download(repo, file, revision, offline, watch))
            }
            RepoKind::Dataset => {
                self.call(Self::dataset, move |repo, watch| download(repo, file, revision, offline, watch))
            }
        }
    }

    /// Whether the repository has the file `name`; offline, the cache is asked.
    pub(super) fn has(&self, name: &str) -> Result<bool> {
        if self.hub.offline {
            return Ok(self.file(name)?.is_some());
        }
        let (file, revision) = (name.to_string(), self.revision.clone());
        let (result, _) = match self.kind {
            RepoKind::Model => self.call(Self::model, move |repo, _| exists(repo, &file, &revision)),
            RepoKind::Dataset => self.call(Self::dataset, move |repo, _| exists(repo, &file, &revision)),
        }?;
        result.map_err(|error| self.explain(error))
    }

    fn model(&self) -> HFRepositorySync<hf_hub::RepoTypeModel> {
        let (owner, name) = split_id(&self.id);
        self.client.model(owner, name)
    }

    fn dataset(&self) -> HFRepositorySync<hf_hub::RepoTypeDataset> {
        let (owner, name) = split_id(&self.id);
        self.client.dataset(owner, name)
    }

    /// Runs `operation` on a thread of its own, and gives up when nothing has moved for as long as
    /// [`HubConfig::patience`]: `hf-hub` itself waits for a silent server for ever. Returns also
    /// the number of bytes that the server announced.
    fn call<T: RepoType, R: Send + 'static>(
        &self,
        repo: impl FnOnce(&Self) -> HFRepositorySync<T>,
        operation: impl FnOnce(&HFRepositorySync<T>, Progress) -> HFResult<R> + Send + 'static,
    ) -> Result<(HFResult<R>, Option<u64>)> {
        let (repo, (sender, receiver)) = (repo(self), channel());
        let watch = Progress::new(Watch(sender.clone()));
        std::thread::spawn(move || sender.send(News::Done(operation(&repo, watch))));
        let (mut announced, mut seen) = (None, 0);
        let mut patience = Instant::now();
        loop {
            let left = self.hub.patience.saturating_sub(patience.elapsed());
            match receiver.recv_timeout(left) {
                Ok(News::Done(result)) => return Ok((result, announced)),
                Ok(News::Announced(bytes)) => {
                    announced = Some(bytes).filter(|bytes| *bytes > 0);
                    patience = Instant::now();
                }
                Ok(News::Received(bytes)) if bytes != seen => {
                    seen = bytes;
                    patience = Instant::now();
                }
                Ok(News::Received(_)) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let silence = self.hub.patience.as_secs_f32();
                    return Err(self.unreachable(&format!("no answer for {silence} seconds")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.error("the hub's client panicked".into()))
                }
            }
        }
    }

    /// Checks that the file at `path` has the announced length. `hf-hub` does not look at the
    /// status of its second request, and caches the text of an error as if it were the file.
    fn whole(&self, name: &str, path: PathBuf, announced: Option<u64>) -> Result<PathBuf> {
        let length = std::fs::metadata(&path).map_err(Error::io(&path))?.len();
        let Some(expected) = announced.filter(|expected| *expected != length) else {
            return Ok(path);
        };
        // Both the file and the link to it: a wrong file must not be found in the cache next time.
        for stale in [path.canonicalize().ok(), Some(path)].into_iter().flatten() {
            std::fs::remove_file(stale).ok();
        }
        Err(self.error(format!(
            "the download of {name} failed: expected {expected} bytes, got {length}; try again"
        )))
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
        let found = match self.kind {
            RepoKind::Model => self.call(Self::model, move |repo, _| what_exists(repo, &revision)),
            RepoKind::Dataset => self.call(Self::dataset, move |repo, _| what_exists(repo, &revision)),
        };
        match found {
            Ok((Ok((false, _)), _)) => self.error("the hub has no such repository (404)".into()),
            Ok((Ok((true, false)), _)) => self.error(format!("there is no revision {} (404)", self.revision)),
            // The first question was answered with 404, whatever became of the second.
            _ => self.error(format!("there is no file {name} at revision {} (404)", self.revision)),
        }
    }

    /// An error about this repository.
    pub(super) fn error(&self, reason: String) -> Error {
        Error::Hub { repo: self.id.clone(), reason: self.hub.redact(reason) }
    }

    fn unreachable(&self, cause: &str) -> Error {
        self.error(format!(
            "the hub at {} cannot be reached: {cause}; without a network, give a local folder with the files, \
             or set HF_HUB_OFFLINE=1 to use what the cache ({}) holds",
            self.hub.host(),
            self.hub.cache.display()
        ))
    }

    fn explain(&self, error: HFError) -> Error {
        let token = if self.hub.token.is_some() { "the given token" } else { "no token" };
        let reason = match error {
            HFError::AuthRequired { .. } => format!(
                "access denied (401) with {token}: check the repository's name, set HF_TOKEN to a token that \
                 may read it, and accept its licence on the hub if it is gated"
            ),
            HFError::Forbidden { .. } => format!(
                "access denied (403) with {token}: accept the repository's licence on the hub, and set HF_TOKEN \
                 to a token that may read it"
            ),
            HFError::RepoNotFound { .. } => "the hub has no such repository (404)".into(),
            HFError::RevisionNotFound { revision, .. } => format!("there is no revision {revision} (404)"),
            HFError::RateLimited { retry_after, .. } => match retry_after {
                Some(wait) => format!("too many requests (429): try again in {} seconds", wait.as_secs()),
                None => "too many requests (429): try again later, or set HF_TOKEN".into(),
            },
            HFError::Http { context } => format!("the hub answered {}", context.status),
            // Addresses of downloads can be signed, so no error shows them.
            HFError::Request { source, .. } => return self.unreachable(&causes(&source.without_url())),
            HFError::MalformedResponse { what, .. } => format!("{} does not answer as a hub: {what}", self.hub.host()),
            HFError::Io(source) => return Error::io(&self.hub.cache)(source),
            other => causes(&other),
        };
        self.error(reason)
    }
}

fn download<T: RepoType>(
    repo: &HFRepositorySync<T>,
    name: String,
    revision: String,
    offline: bool,
    watch: Progress,
) -> HFResult<PathBuf> {
    repo.download_file().filename(name).revision(revision).local_files_only(offline).progress(watch).send()
}

fn exists<T: RepoType>(repo: &HFRepositorySync<T>, name: &str, revision: &str) -> HFResult<bool> {
    repo.file_exists().filename(name).revision(revision).send()
}

/// Whether the repository exists, and whether its revision does.
fn what_exists<T: RepoType>(repo: &HFRepositorySync<T>, revision: &str) -> HFResult<(bool, bool)> {
    let exists = repo.exists().send()?;
    Ok((exists, exists && repo.revision_exists().revision(revision).send()?))
}

/// What a running operation reports.
enum News<R> {
    Announced(u64),
    Received(u64),
    Done(HFResult<R>),
}

/// Passes an operation's progress on.
struct Watch<R>(Sender<News<R>>);

impl<R: Send> ProgressHandler for Watch<R> {
    fn on_progress(&self, event: &ProgressEvent) {
        let news = match event {
            ProgressEvent::Download(DownloadEvent::Start { total_bytes, .. }) => {
                News::Announced(*total_bytes)
            }
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                News::Received(files.iter().map(|file| file.bytes_completed).sum())
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, .. }) => {
                News::Received(*bytes_completed)
            }
            _ => return,
        };
        // The receiver is gone when it has lost patience.
        self.0.send(news).ok();
    }
}

/// An error and what caused it, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let mut parts: Vec<String> = chain.map(ToString::to_string).collect();
    parts.dedup_by(|inner, outer| outer.contains(inner.as_str()));
    parts.join(": ")
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
