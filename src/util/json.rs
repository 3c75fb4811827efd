//! Reads JSON files; errors name the file and the line.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::lfs_pointer;
use crate::error::{Error, Result};

/// The largest size of a configuration. As a tree, JSON can take some hundred times its size in memory.
const MAX_CONFIG: u64 = 4 << 20;

/// Parses the JSON `text` of the file `path`; the file is not opened.
///
/// # Errors
/// If it is not JSON, or not such a value; the error names the file and the line, and recognises a Git
/// LFS pointer.
pub(crate) fn parse<T: DeserializeOwned>(text: impl AsRef<[u8]>, path: &Path) -> Result<T> {
    let text = text.as_ref();
    serde_json::from_slice(text).or_else(|e| {
        lfs_pointer::refuse(text, path)?;
        Err(Error::format_at(path, e.line(), format!("malformed: {e}")))
    })
}

/// [`parse`] for a configuration, where explicit nulls count as absent fields, in the object itself and in
/// the objects of its fields `inner`.
///
/// # Errors
/// As [`parse`].
pub(crate) fn parse_config<T: DeserializeOwned>(
    text: impl AsRef<[u8]>,
    path: &Path,
    inner: &[&str],
) -> Result<T> {
    let text = text.as_ref();
    // serde's messages for null; the second where it expects the name of a variant.
    let of_null = ["malformed: invalid type: null", "malformed: expected value"];
    let error = match parse(text, path) {
        Err(error) if of_null.iter().any(|words| error.to_string().contains(words)) => error,
        other => return other,
    };
    let Ok(mut config) = serde_json::from_slice::<Value>(text) else { return Err(error) };
    drop_nulls(&mut config, inner);
    serde_json::from_value(config).map_err(|error| Error::format(path, format!("malformed: {error}")))
}

/// The text of a token in a tokenizer's settings: a string, or an object with it.
#[cfg_attr(not(feature = "models"), allow(dead_code))]
pub(crate) fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or(token["content"].as_str())
}

/// Removes fields that are null from an object, and from the objects in its fields `inner`.
pub(crate) fn drop_nulls(config: &mut Value, inner: &[&str]) {
    let Some(fields) = config.as_object_mut() else { return };
    fields.retain(|_, value| !value.is_null());
    for name in inner {
        if let Some(object) = fields.get_mut(*name) {
            drop_nulls(object, &[]);
        }
    }
}

/// Reads the text of the configuration at `path`, for [`parse`].
///
/// # Errors
/// If it cannot be read, is not UTF-8, or is far longer than any configuration; the error names the file.
pub(crate) fn read_config(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let read = |file: File| file.take(MAX_CONFIG + 1).read_to_end(&mut bytes);
    File::open(path).and_then(read).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_CONFIG {
        let reason = format!("longer than {MAX_CONFIG} bytes, too long for a configuration");
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
    fn a_null_is_as_good_as_an_absent_field() {
        #[derive(serde::Deserialize, Debug, PartialEq)]
        struct Inner {
            #[serde(default)]
            width: usize,
        }
        #[derive(serde::Deserialize, Debug, PartialEq, Default)]
        enum Kind {
            #[default]
            Plain,
        }
        #[derive(serde::Deserialize, Debug, PartialEq)]
        struct Config {
            size: usize,
            #[serde(default)]
            rate: usize,
            #[serde(default)]
            kind: Kind,
            inner: Option<Inner>,
        }
        let read = |text: &str| {
            parse_config::<Config>(text, Path::new("x.json"), &["inner"]).map_err(|error| error.to_string())
        };
        let plain = read(r#"{"size": 2, "inner": {}}"#).unwrap();
        assert_eq!(read(r#"{"size": 2, "rate": null, "inner": {"width": null}}"#).unwrap(), plain);
        assert_eq!(read(r#"{"size": 2, "kind": null, "inner": {}}"#).unwrap(), plain);
        let missing = read("{\n\"size\": null}").unwrap_err();
        assert!(missing.starts_with("x.json: malformed: missing field `size`"), "{missing}");
        // Errors unrelated to null keep their line.
        for text in ["{\n\"size\": \"a\", \"rate\": null}", "{\n\"size\": }"] {
            assert!(read(text).unwrap_err().starts_with("x.json, line 2: malformed: "), "{text}");
        }
        let both = read("{\"rate\": null,\n\"size\": \"a\"}").unwrap_err();
        assert!(both.contains("invalid type: string"), "{both}");
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
            .ends_with("config.json: longer than 4194304 bytes, too long for a configuration"));
    }
}
