//! Atomic file writes: to a temporary file in the same folder, which is then renamed.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use safetensors::View;
use serde::Serialize;

use crate::error::{Error, Result};

/// Writes the whole file `path`, or leaves its previous content.
///
/// # Errors
/// If the file cannot be written; the error names it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    Pending::write(path.to_path_buf(), bytes)?.commit()
}

/// [`write()`] with content that `fill` writes piece by piece.
///
/// # Errors
/// Errors of `fill`, or if the file cannot be written; the error names it.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let pending = Pending::beside(path.to_path_buf());
    fill(&mut File::create(&pending.temporary).map_err(Error::io(path))?)?;
    pending.sync()?.commit()
}

/// The lock of a folder, released on drop.
#[derive(Debug)]
pub struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone may not unlock: a process that another thread is starting holds a copy of the file
        // until it runs its own program.
        self.0.unlock().ok();
    }
}

/// Locks the folder `dir` against other processes, and creates it if it is missing. Returns `None` if the
/// file system has no locks.
///
/// # Errors
/// If another process holds the lock, or the folder cannot be written.
pub fn lock(dir: &Path) -> Result<Option<Lock>> {
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let path = dir.join(".lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(Error::io(&*path))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(Lock(file))),
        Err(TryLockError::WouldBlock) => {
            Err(Error::format(dir, "another process writes into it: wait for it, or give another folder"))
        }
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// Removes what killed processes left in the folder `dir`: temporary files of this module, and folders that
/// were being written or removed. No other process may write into the folder; a missing folder is fine.
///
/// # Errors
/// If the folder cannot be read, or an entry cannot be removed; the error names it.
pub fn remove_stale(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(dir)(error)),
    };
    for entry in entries {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        if is_temporary(&name) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io(&*path))?;
        }
    }
    Ok(())
}

/// Whether the folder `dir` exists and is not empty.
pub fn has_entries(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

/// Whether a name has the form `*.tmp-PID-COUNT` or `.*.PID.partial`.
fn is_temporary(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let file = name.rsplit_once(".tmp-").and_then(|(_, unique)| unique.split_once('-'));
    let folder = name.strip_prefix('.').and_then(|name| name.strip_suffix(".partial"));
    file.is_some_and(|(process, count)| number(process) && number(count))
        || folder.and_then(|name| name.rsplit_once('.')).is_some_and(|(_, process)| number(process))
}

/// Returns the path of the folder `dir` while it is written or removed; no reader looks there.
pub(crate) fn partial_folder(dir: &Path) -> PathBuf {
    let name = dir.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    dir.with_file_name(format!(".{name}.{}.partial", std::process::id()))
}

/// Removes the file `path` if it exists.
///
/// # Errors
/// If the file cannot be removed; the error names it.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

/// Writes a value as the indented JSON file `path`, atomically.
///
/// # Errors
/// If the file cannot be written, or the value has no JSON form; the error names the file.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::format(path, e.to_string()))?;
    write(path, text.as_bytes())
}

/// Writes tensors as the safetensors file `path`, atomically, one tensor after the other.
///
/// # Errors
/// If the file cannot be written; the error names it.
pub fn write_safetensors<N, V>(path: &Path, tensors: impl IntoIterator<Item = (N, V)>) -> Result<()>
where
    N: AsRef<str> + Ord + std::fmt::Display,
    V: View,
{
    let pending = Pending::in_folder(path.to_path_buf())?;
    safetensors::serialize_to_file(tensors, Some(metadata()), &pending.temporary)
        .map_err(|e| Error::format(path, e.to_string()))?;
    pending.sync()?.commit()
}

/// The header that PyTorch's readers expect.
pub(crate) fn metadata() -> HashMap<String, String> {
    HashMap::from([("format".to_string(), "pt".to_string())])
}

/// A temporary file that [`Self::commit`] renames to its place, and that is removed on drop otherwise.
pub(crate) struct Pending {
    temporary: PathBuf,
    place: PathBuf,
    /// The folder created for the temporary file, if any.
    folder: Option<PathBuf>,
}

/// Returns a number that is unique in this process.
fn unique() -> u32 {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed)
}

impl Pending {
    /// Chooses a unique temporary name in the folder of `place`.
    fn beside(place: PathBuf) -> Self {
        let extension = format!("tmp-{}-{}", std::process::id(), unique());
        Self { temporary: place.with_extension(extension), place, folder: None }
    }

    /// Chooses a temporary name in a new folder next to `place`. The safetensors crate itself first writes
    /// under another name; after a kill, that file could not be told from a user's, but our folder can.
    fn in_folder(place: PathBuf) -> Result<Self> {
        let name = place.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let folder = partial_folder(&place.with_file_name(format!("{name}-{}", unique())));
        // A killed process with the same pid may have left a partial folder: remove it.
        fs::remove_dir_all(&folder).ok();
        fs::create_dir(&folder).map_err(Error::io(&*place))?;
        Ok(Self { temporary: folder.join("tensors"), place, folder: Some(folder) })
    }

    /// Writes the bytes and flushes them to disk.
    pub fn write(place: PathBuf, bytes: &[u8]) -> Result<Self> {
        let pending = Self::beside(place);
        let write = |path: &Path| File::create(path)?.write_all(bytes);
        write(&pending.temporary).map_err(Error::io(&pending.place))?;
        pending.sync()
    }

    fn sync(self) -> Result<Self> {
        // Opened to write: Windows flushes no other.
        let opened = File::options().write(true).open(&self.temporary);
        let synced = opened.and_then(|file| file.sync_all());
        synced.map_err(Error::io(&self.place))?;
        Ok(self)
    }

    /// Renames the file to its place.
    pub fn commit(self) -> Result<()> {
        fs::rename(&self.temporary, &self.place).map_err(Error::io(&self.place))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // After a commit there is nothing to remove.
        fs::remove_file(&self.temporary).ok();
        if let Some(folder) = &self.folder {
            fs::remove_dir_all(folder).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        drop(Pending::write(path.clone(), b"three").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_is_locked_for_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new");
        let held = lock(&dir).unwrap();
        assert!(held.is_some());
        let error = lock(&dir).unwrap_err().to_string();
        assert!(error.contains("new: another process writes into it"), "{error}");
        drop(held);
        let held = lock(&dir).unwrap().unwrap();
        // Like the copy in a process that was started while the folder was locked.
        let _copy = held.0.try_clone().unwrap();
        drop(held);
        assert!(lock(&dir).unwrap().is_some());
    }

    #[test]
    fn what_killed_processes_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        remove_stale(&dir.path().join("nowhere")).unwrap();
        let pending = Pending::write(dir.path().join("a.txt"), b"half").unwrap();
        fs::create_dir_all(partial_folder(&dir.path().join("model")).join("deep")).unwrap();
        let others = ["a.txt", "b.tmp-1", "c.tmp-x-1", ".model.partial", "model.1.partial", ".m.x1.partial"];
        for name in others {
            fs::write(dir.path().join(name), "").unwrap();
        }
        std::mem::forget(pending);
        let tensors = Pending::in_folder(dir.path().join("model.safetensors")).unwrap();
        fs::write(tensors.temporary.with_file_name(".tmpAbCdEf"), "").unwrap();
        std::mem::forget(tensors);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), others.len() + 3);
        remove_stale(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), others.len());
        assert!(others.iter().all(|name| dir.path().join(name).exists()));
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error_that_names_the_file() {
        let path = Path::new("no/such/folder/a.txt");
        for error in [
            write(path, b"").unwrap_err(),
            write_safetensors::<String, &candle_core::Tensor>(path, []).unwrap_err(),
        ] {
            assert!(error.to_string().contains("a.txt"), "{error}");
        }
    }
}
