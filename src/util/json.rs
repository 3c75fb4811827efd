//! JSON files: what is wrong in one is told with its name and line.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use super::pointer;
use crate::error::{Error, Result};

/// The most bytes of a configuration. Read as a tree, JSON can take some hundred times its size.
const MAX_CONFIG: u64 = 4 << 20;

/// The value of the JSON `text` of the file `path`, which is not opened.
///
/// # Errors
/// If it is no JSON, or no such value; the error names the file and the line, and says so of a Git LFS pointer.
pub(crate) fn parse<T: DeserializeOwned>(text: impl AsRef<[u8]>, path: &Path) -> Result<T> {
    let text = text.as_ref();
    serde_json::from_slice(text).or_else(|e| {
        pointer::refuse(text, path)?;
        Err(Error::format_at(path, e.line(), format!("malformed: {e}")))
    })
}

/// The text of the configuration at `path`, for [`parse`].
///
/// # Errors
/// If it cannot be read, is not UTF-8, or is far longer than configurations are; the error names it.
pub(crate) fn read_config(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let read = |file: File| file.take(MAX_CONFIG + 1).read_to_end(&mut bytes);
    File::open(path).and_then(read).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_CONFIG {
        let reason = format!("longer than {MAX_CONFIG} bytes, which no configuration is");
        return Err(Error::format(path, reason));
    }
    String::from_utf8(bytes).map_err(|e| Error::format(path, format!("not UTF-8: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_is_wrong_is_told_with_file_and_line() {
        let path = Path::new("x.json");
        assert_eq!(parse::<Vec<u8>>("[1,\n 2]", path).unwrap(), [1, 2]);
        for (text, reason) in [("[1,\n -2]", "invalid value"), ("[1,\n", "EOF")] {
            let message = parse::<Vec<u8>>(text, path).unwrap_err().to_string();
            assert!(message.starts_with(&format!("x.json, line 2: malformed: {reason}")), "{message}");
        }
    }

    #[test]
    fn a_configuration_is_short_and_utf_8() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let read = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            read_config(&path).map_err(|error| error.to_string())
        };
        assert_eq!(read(b"{}").unwrap(), "{}");
        assert!(read(b"\xff").unwrap_err().contains("config.json: not UTF-8"));
        let mut long = vec![b' '; MAX_CONFIG as usize];
        assert!(read(&long).is_ok());
        long.push(b' ');
        assert!(read(&long)
            .unwrap_err()
            .ends_with("config.json: longer than 4194304 bytes, which no configuration is"));
    }
}
