//! Detects Git LFS pointers: short text files that stand in for large files in a repository cloned without
//! Git LFS.
//!
//! The specification: <https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>.

use std::path::Path;

use crate::error::{Error, Result};

/// The beginning of every pointer.
const BEGINNING: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Refuses a Git LFS pointer. `bytes` is the content of the file `path`, or its beginning.
///
/// # Errors
/// If it is a pointer; the error says what to run.
pub(crate) fn refuse(bytes: &[u8], path: &Path) -> Result<()> {
    if !bytes.starts_with(BEGINNING) {
        return Ok(());
    }
    let size = std::str::from_utf8(&bytes[..bytes.len().min(1024)]).ok().and_then(|text| {
        let size = text.lines().find_map(|line| line.strip_prefix("size "))?;
        size.trim().parse::<u64>().ok()
    });
    let size = size.map(|size| format!(" of {size} bytes")).unwrap_or_default();
    let reason = format!(
        "it is a Git LFS pointer, not the file{size} that it stands for: run `git lfs install` and `git lfs pull` \
         in its repository, or download the file itself"
    );
    Err(Error::format(path, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_is_refused_with_what_to_run_and_nothing_else_is() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4400000\n";
        let error = refuse(pointer, Path::new("model.safetensors")).unwrap_err().to_string();
        assert!(error.starts_with("model.safetensors: it is a Git LFS pointer"), "{error}");
        assert!(error.contains("of 4400000 bytes") && error.contains("git lfs pull"), "{error}");
        // The bytes that were read may end anywhere.
        assert!(refuse(&pointer[..45], Path::new("x"))
            .unwrap_err()
            .to_string()
            .contains("not the file that"));
        for other in [&pointer[..20], b"{\"version\": 1}", b""] {
            assert!(refuse(other, Path::new("x")).is_ok());
        }
    }
}
