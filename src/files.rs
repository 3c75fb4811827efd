//! Files that are whole or not there: written beside their place, then renamed into it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use safetensors::View;

use crate::error::{Error, Result};

/// Writes the file `path` whole, or leaves what was there.
///
/// # Errors
/// If it cannot be written; the error names it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    Pending::write(path.to_path_buf(), bytes)?.commit()
}

/// Writes tensors as the safetensors file `path`, whole or not at all, tensor after tensor.
///
/// # Errors
/// If it cannot be written; the error names it.
pub fn write_safetensors<N, V>(path: &Path, tensors: impl IntoIterator<Item = (N, V)>) -> Result<()>
where
    N: AsRef<str> + Ord + std::fmt::Display,
    V: View,
{
    let pending = Pending::beside(path.to_path_buf());
    safetensors::serialize_to_file(tensors, Some(metadata()), &pending.temporary)
        .map_err(|e| Error::format(path, e.to_string()))?;
    pending.sync()?.commit()
}

/// What PyTorch's readers ask of the header.
pub(crate) fn metadata() -> HashMap<String, String> {
    HashMap::from([("format".to_string(), "pt".to_string())])
}

/// A file written beside its place: it takes it on [`Self::commit`], or goes when dropped.
pub(crate) struct Pending {
    temporary: PathBuf,
    place: PathBuf,
}

impl Pending {
    /// A temporary name that nobody else has, in the folder of `place`.
    fn beside(place: PathBuf) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = format!("tmp-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self { temporary: place.with_extension(unique), place }
    }

    /// The bytes, on the disk.
    pub fn write(place: PathBuf, bytes: &[u8]) -> Result<Self> {
        let pending = Self::beside(place);
        let write = |path: &Path| File::create(path)?.write_all(bytes);
        write(&pending.temporary).map_err(Error::io(&pending.place))?;
        pending.sync()
    }

    fn sync(self) -> Result<Self> {
        let synced = File::open(&self.temporary).and_then(|file| file.sync_all());
        synced.map_err(Error::io(&self.place))?;
        Ok(self)
    }

    /// Puts the file in its place.
    pub fn commit(self) -> Result<()> {
        fs::rename(&self.temporary, &self.place).map_err(Error::io(&self.place))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // After a commit there is nothing left here to remove.
        fs::remove_file(&self.temporary).ok();
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
