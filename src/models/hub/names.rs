//! Checks of untrusted names of files, repositories and revisions before they become paths or addresses.

use std::path::Path;

/// Checks that `name` is a relative path below its folder. The error is the reason.
pub(super) fn check_relative(name: &str) -> std::result::Result<(), String> {
    let drive = name.as_bytes().get(1) == Some(&b':');
    if name.starts_with(['/', '\\']) || drive || Path::new(name).is_absolute() {
        return Err(format!("{name:?} is an absolute path"));
    }
    let parts = || name.split(['/', '\\']);
    if parts().any(|part| part == "..") {
        return Err(format!("{name:?} leads outside its folder"));
    }
    if parts().any(|part| part.is_empty() || part == ".") || name.contains('\0') {
        return Err(format!("{name:?} is not a file name"));
    }
    Ok(())
}

/// Whether `revision` is a commit, whose files never change.
#[cfg(feature = "hub")]
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether `id` is a repository's name: `owner/name`, or `name` alone for a few old ones.
#[cfg(feature = "hub")]
pub(super) fn is_repo_id(id: &str) -> bool {
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
