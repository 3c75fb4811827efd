//! The files beside a model's configuration and weights: its tokenizer and its generation settings.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::models::hub::ModelFiles;
use crate::util::files;

/// The files that a folder may hold beside its configuration and weights.
const COMPANIONS: [&str; 15] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Copies the tokenizer's files and the generation settings that `files` has into the folder `dir`.
///
/// Logs a warning if there is no tokenizer among them: a local folder may have been created without one, and
/// offline the hub's cache may lack it.
///
/// # Errors
/// If the hub fails, one of the two files of a byte-pair tokenizer is missing, or a file cannot be read or
/// written; the error names the file.
pub(crate) fn copy_companions(files: &ModelFiles, dir: &Path) -> Result<()> {
    let mut copied = Vec::new();
    for name in COMPANIONS {
        if let Some(file) = files.file(name)? {
            copy(&file, &dir.join(name))?;
            copied.push(name);
        }
    }
    let has = |name| copied.contains(&name);
    let whole = ["tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "spm.model", "vocab.txt"];
    if whole.into_iter().any(has) {
        return Ok(());
    }
    if has("vocab.json") != has("merges.txt") {
        let lacking = if has("vocab.json") { "merges.txt" } else { "vocab.json" };
        let reason = format!("the checkpoint has no {lacking}, without which its tokenizer is incomplete");
        return Err(Error::format(files.config_path().with_file_name(lacking), reason));
    }
    if !has("vocab.json") {
        tracing::warn!("{}: there is no tokenizer.json beside it", files.config_path().display());
    }
    Ok(())
}

/// Copies one file, whole or not at all.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).map_err(Error::io(from))?;
    files::write(to, &bytes)
}
