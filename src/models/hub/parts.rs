//! Downloads in parts, which resume where an earlier download was interrupted.
//!
//! `hf-hub` starts every file from the beginning, ignores the status of the response with the file, and
//! accepts any number of bytes as the whole file. Here, a file is therefore assembled from ranges that
//! `hf-hub` requests, under a temporary name beside its place in `hf-hub`'s cache. When it is complete, it is
//! renamed to that place, where `hf-hub` finds it and links to it.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use hf_hub::repository::FileMetadataInfo;

use super::config::DownloadProgress;
use super::failure::{Failure, HubResult};
use super::repo::Repo;
use crate::error::Error;

impl Repo {
    /// Whether the file that `about` describes can be fetched in parts: only if the hub itself stores it.
    /// `hf-hub` cannot describe files stored elsewhere, and assembles Xet files from its own pieces.
    pub(super) fn comes_in_parts(&self, about: &FileMetadataInfo) -> bool {
        let here =
            about.location.as_deref().is_some_and(|at| at.starts_with(&format!("{}/", self.hub.host())));
        here && about.xet_hash.is_none()
    }

    /// Downloads the file `name` to its place in the cache, unless it is there, and calls `link` to link its
    /// name to it, unless that link exists. Returns the path of the file.
    pub(super) fn download_in_parts(
        &self,
        name: &str,
        about: &FileMetadataInfo,
        link: impl FnOnce() -> HubResult<PathBuf>,
    ) -> HubResult<PathBuf> {
        let folder = format!("{}--{}", self.kind.plural(), self.id.replace('/', "--"));
        let blobs = self.hub.cache.join(&folder).join("blobs");
        let locks = self.hub.cache.join(".locks").join(&folder);
        for dir in [&blobs, &locks] {
            std::fs::create_dir_all(dir).map_err(io(dir))?;
        }
        // The same lock that other users of the cache take.
        let _lock = lock(&locks.join(format!("{}.lock", about.etag)))?;
        let (blob, part) = (blobs.join(&about.etag), blobs.join(format!("{}.part", about.etag)));
        let size = about.file_size;
        match std::fs::metadata(&blob) {
            Ok(found) if size == 0 || found.len() == size => {}
            _ => {
                let filled = self.fill(name, about, &part);
                if filled.as_ref().is_err_and(Failure::invalidates_part) {
                    std::fs::remove_file(&part).ok();
                }
                filled?;
                std::fs::rename(&part, &blob).map_err(io(&blob))?;
            }
        }
        // `hf-hub` recreates a link by removing the old one, through which another process may be reading.
        let known = self.cached(name).ok().filter(|path| {
            let at = self.hub.cache.join(&folder).join("snapshots").join(&about.commit_hash).join(name);
            *path == at && path.canonicalize().ok() == blob.canonicalize().ok()
        });
        known.map_or_else(link, Ok)
    }

    /// Downloads the missing rest of the file `part`.
    fn fill(&self, name: &str, about: &FileMetadataInfo, part: &Path) -> HubResult<()> {
        let mut file =
            OpenOptions::new().create(true).truncate(false).write(true).open(part).map_err(io(part))?;
        let size = about.file_size;
        let mut have = file.metadata().map_err(io(part))?.len();
        if have > size {
            have = 0;
        }
        loop {
            file.set_len(have).and_then(|()| file.seek(SeekFrom::Start(have))).map_err(io(part))?;
            // A size of 0 means that the hub did not report it: the file is then a single part.
            if have == size && size > 0 {
                break;
            }
            let bytes = self.part(name, about, have)?;
            if bytes.len() as u64 == size {
                // The server does not support ranges and sent the whole file.
                have = 0;
                file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(io(part))?;
            }
            file.write_all(&bytes).map_err(io(part))?;
            have += bytes.len() as u64;
            if size == 0 {
                break;
            }
        }
        file.sync_all().map_err(io(part))
    }

    /// Downloads the next part of a file of which `have` bytes are present.
    fn part(&self, name: &str, about: &FileMetadataInfo, have: u64) -> HubResult<Vec<u8>> {
        let size = about.file_size;
        let end = size.min(have.saturating_add(self.hub.part.max(1)));
        let range = (have > 0 || end < size).then_some(have..end);
        self.retry(|| {
            let (file, revision, range) = (name.to_string(), about.commit_hash.clone(), range.clone());
            let mut on_bytes = |bytes, _| self.report(name, have + bytes, Some(size));
            let (bytes, _) = self.attempt(&mut on_bytes, move |client, progress| {
                client.bytes(&file, &revision, range, progress)
            })?;
            let got = bytes.len() as u64;
            if size > 0 && got != end - have && got != size {
                return Err(Failure::Length { name: name.to_string(), expected: end - have, got });
            }
            Ok(bytes)
        })
    }

    /// Reports the progress of the download of `file` to the callback, if there is one.
    pub(super) fn report(&self, file: &str, bytes: u64, total: Option<u64>) {
        if let Some(progress) = &self.hub.progress {
            let (repo, file) = (self.id.clone(), file.to_string());
            progress(&DownloadProgress { repo, file, bytes, total: total.filter(|total| *total > 0) });
        }
    }
}

/// Waits until no other process holds the lock file `path`, and locks it.
fn lock(path: &Path) -> HubResult<File> {
    let file = File::create(path).map_err(io(path))?;
    if file.try_lock().is_err() {
        tracing::info!("waiting for another process that downloads the same file ({})", path.display());
        file.lock().map_err(io(path))?;
    }
    Ok(file)
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let error = Error::io(path.to_path_buf());
    move |source| Failure::Local(error(source))
}
