//! Finds a model's chat template, the Jinja program that turns a conversation into text, and the special
//! tokens that it names. Only texts: `data::chat` runs the program.

#[cfg(feature = "train")]
use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::models::hub::ModelFiles;
use crate::util::{json, lfs_pointer};

/// A chat template and where it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TemplateText {
    pub text: String,
    pub path: PathBuf,
    /// The field of the file that has the template, if the file is not the template itself.
    pub field: Option<&'static str>,
}

/// The field of JSON files that holds templates.
const FIELD: &str = "chat_template";

/// The key of a GGUF file's template.
const GGUF_KEY: &str = "tokenizer.chat_template";

/// The names by which templates know special tokens.
#[cfg(feature = "train")]
const SPECIAL_TOKENS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

/// The chat template of a model, searched as transformers does: `chat_template.jinja`, then
/// `tokenizer_config.json` (of several named templates, the one named `default`), then `chat_template.json`;
/// last the metadata of a GGUF file. `None` if the model has none.
///
/// # Errors
/// If a file cannot be read or is malformed, or the hub fails; the error names the file.
pub(crate) fn find(files: &ModelFiles) -> Result<Option<TemplateText>> {
    if let Some(path) = files.file("chat_template.jinja")? {
        let text = json::read_config(&path)?;
        lfs_pointer::refuse(text.as_bytes(), &path)?;
        return Ok(Some(TemplateText { text, path, field: None }));
    }
    for name in ["tokenizer_config.json", "chat_template.json"] {
        let Some((path, settings)) = read(files, name)? else { continue };
        let text = match &settings[FIELD] {
            Value::Null => continue,
            Value::String(text) => Some(text.clone()),
            Value::Array(named) => default_of(named),
            _ => {
                let reason = format!("{FIELD}: expected a string or a list of named templates");
                return Err(Error::format(path, reason));
            }
        };
        match text {
            Some(text) => return Ok(Some(TemplateText { text, path, field: Some(FIELD) })),
            None => tracing::warn!("{}: none of its templates is named default", path.display()),
        }
    }
    let Some(gguf) = files.gguf() else { return Ok(None) };
    let text = gguf.value(GGUF_KEY).and_then(|text| text.as_str());
    Ok(text.map(|text| TemplateText {
        text: text.to_string(),
        path: gguf.path().to_path_buf(),
        field: Some(GGUF_KEY),
    }))
}

/// The texts of the special tokens that templates name, by their names: from `tokenizer_config.json`, then
/// `special_tokens_map.json`, then the metadata of a GGUF file.
///
/// # Errors
/// If a file cannot be read or is malformed, or the hub fails; the error names the file.
#[cfg(feature = "train")]
pub(crate) fn special_tokens(files: &ModelFiles) -> Result<BTreeMap<String, String>> {
    let mut tokens = BTreeMap::new();
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let Some((_, settings)) = read(files, name)? else { continue };
        for role in SPECIAL_TOKENS {
            if let Some(text) = json::token_text(&settings[role]).filter(|_| !tokens.contains_key(role)) {
                tokens.insert(role.to_string(), text.to_string());
            }
        }
    }
    let Some(gguf) = files.gguf() else { return Ok(tokens) };
    let Some(crate::models::gguf::Value::Texts(pieces)) = gguf.value("tokenizer.ggml.tokens") else {
        return Ok(tokens);
    };
    for (role, key) in SPECIAL_TOKENS.into_iter().zip(["bos", "eos", "padding", "unknown"]) {
        let id = gguf.value(&format!("tokenizer.ggml.{key}_token_id")).and_then(|id| id.as_u64());
        let piece = id.and_then(|id| usize::try_from(id).ok()).and_then(|id| pieces.get(id));
        if let Some(piece) = piece.filter(|_| !tokens.contains_key(role)) {
            tokens.insert(role.to_string(), piece.clone());
        }
    }
    Ok(tokens)
}

/// The JSON file of this name, and its path.
fn read(files: &ModelFiles, name: &str) -> Result<Option<(PathBuf, Value)>> {
    let Some(path) = files.file(name)? else { return Ok(None) };
    let value = json::parse(std::fs::read(&path).map_err(Error::io(&*path))?, &path)?;
    Ok(Some((path, value)))
}

/// The template that is meant where none is named.
fn default_of(named: &[Value]) -> Option<String> {
    let default = named.iter().find(|one| one["name"] == "default");
    default.and_then(|one| one["template"].as_str()).map(str::to_string)
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    /// A folder with the files that a model needs, and these.
    fn model(more: &[(&str, &str)]) -> (tempfile::TempDir, ModelFiles) {
        let dir = tempfile::tempdir().unwrap();
        let empty = b"\x08\0\0\0\0\0\0\0{}      ";
        fs::write(dir.path().join("config.json"), json!({"model_type": "llama"}).to_string()).unwrap();
        fs::write(dir.path().join("model.safetensors"), empty).unwrap();
        for (name, text) in more {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let files = ModelFiles::locate(dir.path().to_str().unwrap(), None).unwrap();
        (dir, files)
    }

    fn found(more: &[(&str, &str)]) -> Option<String> {
        let (_dir, files) = model(more);
        find(&files).unwrap().map(|found| found.text)
    }

    #[test]
    fn a_chat_template_is_found_in_each_file_that_may_hold_it_and_the_first_of_them_counts() {
        let named =
            r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#;
        let only_rag = r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#;
        let (jinja, json) =
            (("chat_template.jinja", "j"), ("chat_template.json", r#"{"chat_template": "c"}"#));
        let settings = |text| ("tokenizer_config.json", text);
        for (files, expected) in [
            (vec![], None),
            (vec![json], Some("c")),
            (vec![json, settings(r#"{"chat_template": null}"#)], Some("c")),
            (vec![json, settings(r#"{"chat_template": "s"}"#)], Some("s")),
            (vec![settings(named)], Some("d")),
            (vec![settings(only_rag)], None),
            (vec![jinja, json, settings(named)], Some("j")),
        ] {
            assert_eq!(found(&files).as_deref(), expected, "{files:?}");
        }
        let (_dir, files) = model(&[settings(r#"{"chat_template": 3}"#)]);
        let error = find(&files).unwrap_err().to_string();
        assert!(error.ends_with(
            "tokenizer_config.json: chat_template: expected a string or a list of named templates"
        ));
    }

    #[test]
    fn special_tokens_are_texts_or_objects_in_either_file() {
        let settings = r#"{"bos_token": "<b>", "eos_token": {"content": "<e>"}, "pad_token": null}"#;
        let map = r#"{"bos_token": "<other>", "pad_token": {"content": "<p>"}}"#;
        let (_dir, files) = model(&[("tokenizer_config.json", settings), ("special_tokens_map.json", map)]);
        let tokens = special_tokens(&files).unwrap();
        let pairs: Vec<(&str, &str)> =
            tokens.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        assert_eq!(pairs, [("bos_token", "<b>"), ("eos_token", "<e>"), ("pad_token", "<p>")]);
    }
}
