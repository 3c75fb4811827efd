//! Byte-level BPE from `vocab.json` and `merges.txt` with the settings beside them, the files of RoBERTa's
//! and GPT-2's tokenizers before `tokenizer.json` existed.
//!
//! The result is the content of a `tokenizer.json`, which is checked and read like any other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{json, Map, Value};

use crate::error::{Error, Result};
use crate::models::hub::ModelFiles;
use crate::util::json::{self, token_text};

/// How to make a `tokenizer.json` from files that this crate does not read; part of error messages.
pub(super) const CONVERT: &str = "convert it once, in Python, by \
     transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)";

/// The roles of special tokens in a tokenizer's configuration.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "sep_token", "cls_token", "unk_token", "pad_token", "mask_token"];

/// Builds the `tokenizer.json` equivalent to `vocab`, `merges` and the settings beside them.
///
/// # Errors
/// If a file cannot be read or is malformed, if the tokenizer class may split text differently from GPT-2, or
/// if a special token to add around a text is not in the vocabulary.
pub(super) fn tokenizer_json(files: &ModelFiles, vocab: &Path, merges: &Path) -> Result<Value> {
    let vocabulary: BTreeMap<String, u32> = read(vocab)?;
    let pairs = pairs(merges)?;
    let config: Map<String, Value> =
        json::parse(json::read_config(files.config_path())?, files.config_path())?;
    let roberta = config.get("model_type").and_then(Value::as_str) == Some("roberta");
    let mut settings: Map<String, Value> = optional(files, "special_tokens_map.json")?;
    settings.extend(optional::<Map<String, Value>>(files, "tokenizer_config.json")?);

    let class = settings.get("tokenizer_class").and_then(Value::as_str);
    let kind = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let gpt2 = class.map_or(!kind.starts_with("qwen"), |class| {
        let class = class.trim_end_matches("Fast");
        ["GPT2Tokenizer", "RobertaTokenizer", "PreTrainedTokenizer"].contains(&class)
    });
    if !gpt2 {
        let whose = class.map_or_else(|| format!("a {kind} model"), str::to_string);
        let reason = format!(
            "{whose} may split text differently from GPT-2, and these files do not define how: {CONVERT}"
        );
        return Err(Error::format(vocab, reason));
    }
    let default = |role: &str| {
        let name = match role {
            "bos_token" | "cls_token" if roberta => "<s>",
            "eos_token" | "sep_token" if roberta => "</s>",
            "unk_token" if roberta => "<unk>",
            "pad_token" if roberta => "<pad>",
            "mask_token" if roberta => "<mask>",
            "bos_token" | "eos_token" | "unk_token" if !roberta => "<|endoftext|>",
            _ => return None,
        };
        Some(name.to_string())
    };
    let named = |role: &str| settings.get(role).and_then(token_text).map(str::to_string);
    let special = |role: &str| named(role).or_else(|| default(role));
    let mut added: BTreeMap<u32, Value> = BTreeMap::new();
    for (role, name) in ROLES.iter().filter_map(|role| Some((*role, special(role)?))) {
        if let Some(id) = vocabulary.get(&name) {
            // The mask token may absorb the space before it: older Hugging Face versions saved this.
            let lstrip = settings.get(role).is_some_and(|fields| fields["lstrip"] == json!(true));
            added.insert(*id, token(*id, &name, lstrip, true));
        }
    }
    let more: BTreeMap<String, u32> = optional(files, "added_tokens.json")?;
    added.extend(more.into_iter().map(|(name, id)| (id, token(id, &name, false, false))));
    for (id, fields) in settings.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten()
    {
        if let (Ok(id), Some(name)) = (id.parse::<u32>(), token_text(fields).map(str::to_string)) {
            let is = |field: &str| fields[field] == json!(true);
            added.insert(id, token(id, &name, is("lstrip"), is("special")));
        }
    }

    let prefix = settings.get("add_prefix_space") == Some(&json!(true));
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true });
    let id = |role: &str| -> Result<(String, u32)> {
        let name = special(role).unwrap_or_default();
        match vocabulary.get(&name) {
            Some(id) => Ok((name, *id)),
            None => Err(Error::format(vocab, format!("{role} {name:?} is not in the vocabulary"))),
        }
    };
    let post_processor = if roberta {
        let (sep, cls) = (id("sep_token")?, id("cls_token")?);
        json!({ "type": "RobertaProcessing", "sep": sep, "cls": cls, "trim_offsets": true, "add_prefix_space": prefix })
    } else if settings.get("add_bos_token") == Some(&json!(true)) {
        let (bos, id) = id("bos_token")?;
        let before = json!({ "SpecialToken": { "id": bos, "type_id": 0 } });
        let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
        json!({ "type": "TemplateProcessing", "single": [before, text("A")], "pair": [before, text("A"), text("B")],
            "special_tokens": { bos.clone(): { "id": bos, "ids": [id], "tokens": [bos] } } })
    } else {
        Value::Null
    };
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added.into_values().collect::<Vec<_>>(),
        "pre_tokenizer": byte_level, "post_processor": post_processor, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": pairs },
    }))
}

/// Reads the merge pairs of `merges.txt`, in order.
fn pairs(path: &Path) -> Result<Vec<[String; 2]>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    crate::util::lfs_pointer::refuse(&bytes, path)?;
    let text = String::from_utf8(bytes).map_err(|e| Error::format(path, format!("not UTF-8: {e}")))?;
    let lines = text
        .lines()
        .zip(1..)
        .filter(|(line, number)| !(line.is_empty() || *number == 1 && line.starts_with("#version")));
    let pair = |(line, number): (&str, usize)| match line.split(' ').collect::<Vec<_>>()[..] {
        [first, second] if !first.is_empty() && !second.is_empty() => {
            Ok([first.to_string(), second.to_string()])
        }
        _ => Err(Error::format_at(path, number, "expected two pieces with a blank between them")),
    };
    lines.map(pair).collect()
}

/// An added token in the form of `tokenizer.json`.
fn token(id: u32, content: &str, lstrip: bool, special: bool) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": false,
        "normalized": !special, "special": special })
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    json::parse(std::fs::read(path).map_err(Error::io(path))?, path)
}

/// Reads a JSON file of the model; returns the default value if it is missing.
pub(super) fn optional<T: serde::de::DeserializeOwned + Default>(
    files: &ModelFiles,
    name: &str,
) -> Result<T> {
    let path: Option<PathBuf> = files.file(name)?;
    path.map_or_else(|| Ok(T::default()), |path| read(&path))
}
