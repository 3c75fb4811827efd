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
    let source = Source::read(files, vocab, merges)?;
    source.check_splits_like_gpt2()?;
    let (added, post_processor) = (source.added_tokens(files)?, source.post_processor()?);
    let prefix = source.adds_prefix_space();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true });
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": added,
        "pre_tokenizer": byte_level, "post_processor": post_processor, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "vocab": source.vocabulary,
            "merges": source.merges },
    }))
}

/// The content of the files of a tokenizer.
struct Source<'a> {
    /// The path of the vocabulary, for errors.
    path: &'a Path,
    vocabulary: BTreeMap<String, u32>,
    merges: Vec<[String; 2]>,
    /// The model's `model_type`; empty if it has none.
    model_type: String,
    /// `special_tokens_map.json`, with `tokenizer_config.json` over it.
    settings: Map<String, Value>,
}

impl<'a> Source<'a> {
    fn read(files: &ModelFiles, vocab: &'a Path, merges: &Path) -> Result<Self> {
        let (vocabulary, merges) = (read(vocab)?, pairs(merges)?);
        let config: Map<String, Value> =
            json::parse(json::read_config(files.config_path())?, files.config_path())?;
        let model_type = config.get("model_type").and_then(Value::as_str).unwrap_or_default().to_string();
        let mut settings: Map<String, Value> = optional(files, "special_tokens_map.json")?;
        settings.extend(optional::<Map<String, Value>>(files, "tokenizer_config.json")?);
        Ok(Self { path: vocab, vocabulary, merges, model_type, settings })
    }

    /// Checks that the tokenizer splits text into words as GPT-2's does, which these files do not say.
    fn check_splits_like_gpt2(&self) -> Result<()> {
        let class = self.settings.get("tokenizer_class").and_then(Value::as_str);
        let gpt2 = class.map_or(!self.model_type.starts_with("qwen"), |class| {
            let class = class.trim_end_matches("Fast");
            ["GPT2Tokenizer", "RobertaTokenizer", "PreTrainedTokenizer"].contains(&class)
        });
        if gpt2 {
            return Ok(());
        }
        let whose = class.map_or_else(|| format!("a {} model", self.model_type), str::to_string);
        let reason = format!(
            "{whose} may split text differently from GPT-2, and these files do not define how: {CONVERT}"
        );
        Err(Error::format(self.path, reason))
    }

    fn is_roberta(&self) -> bool {
        self.model_type == "roberta"
    }

    fn adds_prefix_space(&self) -> bool {
        self.settings.get("add_prefix_space") == Some(&json!(true))
    }

    /// The special token of a role: that of the settings, or the default of the tokenizer class.
    fn special(&self, role: &str) -> Option<&str> {
        let named = self.settings.get(role).and_then(token_text);
        named.or_else(|| default_special(role, self.is_roberta()))
    }

    /// The special token of a role, with its id.
    ///
    /// # Errors
    /// If it is not in the vocabulary.
    fn special_id(&self, role: &str) -> Result<(&str, u32)> {
        let name = self.special(role).unwrap_or_default();
        match self.vocabulary.get(name) {
            Some(id) => Ok((name, *id)),
            None => Err(Error::format(self.path, format!("{role} {name:?} is not in the vocabulary"))),
        }
    }

    /// The added tokens by id: those of the roles, then those that the files list, which replace them.
    fn added_tokens(&self, files: &ModelFiles) -> Result<Vec<Value>> {
        let mut added: BTreeMap<u32, Value> = BTreeMap::new();
        for (role, name) in ROLES.iter().filter_map(|role| Some((*role, self.special(role)?))) {
            if let Some(id) = self.vocabulary.get(name) {
                // The mask token may absorb the space before it: older Hugging Face versions saved this.
                let lstrip = self.settings.get(role).is_some_and(|fields| fields["lstrip"] == json!(true));
                added.insert(*id, token(*id, name, lstrip, true));
            }
        }
        let more: BTreeMap<String, u32> = optional(files, "added_tokens.json")?;
        added.extend(more.into_iter().map(|(name, id)| (id, token(id, &name, false, false))));
        let listed = self.settings.get("added_tokens_decoder").and_then(Value::as_object);
        for (id, fields) in listed.into_iter().flatten() {
            if let (Ok(id), Some(name)) = (id.parse::<u32>(), token_text(fields)) {
                let is = |field: &str| fields[field] == json!(true);
                added.insert(id, token(id, name, is("lstrip"), is("special")));
            }
        }
        Ok(added.into_values().collect())
    }

    /// The rule that puts special tokens around a text; null if there is none.
    fn post_processor(&self) -> Result<Value> {
        if self.is_roberta() {
            let (sep, cls) = (self.special_id("sep_token")?, self.special_id("cls_token")?);
            let prefix = self.adds_prefix_space();
            return Ok(json!({ "type": "RobertaProcessing", "sep": sep, "cls": cls, "trim_offsets": true,
                "add_prefix_space": prefix }));
        }
        if self.settings.get("add_bos_token") != Some(&json!(true)) {
            return Ok(Value::Null);
        }
        let (bos, id) = self.special_id("bos_token")?;
        let before = json!({ "SpecialToken": { "id": bos, "type_id": 0 } });
        let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
        Ok(json!({ "type": "TemplateProcessing", "single": [before, text("A")],
            "pair": [before, text("A"), text("B")],
            "special_tokens": { bos: { "id": bos, "ids": [id], "tokens": [bos] } } }))
    }
}

/// The special token of a role in a tokenizer whose settings name none.
fn default_special(role: &str, roberta: bool) -> Option<&'static str> {
    Some(match role {
        "bos_token" | "cls_token" if roberta => "<s>",
        "eos_token" | "sep_token" if roberta => "</s>",
        "unk_token" if roberta => "<unk>",
        "pad_token" if roberta => "<pad>",
        "mask_token" if roberta => "<mask>",
        "bos_token" | "eos_token" | "unk_token" if !roberta => "<|endoftext|>",
        _ => return None,
    })
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
