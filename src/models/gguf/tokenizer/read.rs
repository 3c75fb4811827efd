//! Conversion of a GGUF file's metadata to a `tokenizer.json`.

use serde_json::{json, Map, Value as Json};

use super::parts::{merges, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED};
use super::pre::PreTokenizer;
use crate::error::Result;
use crate::models::gguf::file::Gguf;
use crate::models::gguf::value::Value;
use crate::models::post_processor::template;

/// The longest accepted token in bytes; real ones have about a hundred. Every split of a token is tried.
const MAX_PIECE_BYTES: usize = 256;

/// The prefix of the keys.
const PREFIX: &str = "tokenizer.ggml.";

impl Gguf {
    /// Returns the tokenizer as Hugging Face's `tokenizer.json`: byte-level BPE (`gpt2`) or SentencePiece
    /// (`llama`). `None` if the file has no tokenizer.
    ///
    /// # Errors
    /// If the tokenizer is of another kind, has an unknown pre-tokenizer, or its parts are inconsistent.
    pub fn tokenizer(&self) -> Result<Option<Json>> {
        match self.said("model").and_then(Value::as_str) {
            None | Some("none" | "no_vocab") => Ok(None),
            Some("gpt2") => self.byte_level().map(Some),
            Some("llama") => self.sentence_piece().map(Some),
            Some(other) => Err(self.unread(format!("{PREFIX}model: expected gpt2 or llama, got {other}"))),
        }
    }

    fn said(&self, key: &str) -> Option<&Value> {
        self.value(&format!("{PREFIX}{key}"))
    }

    fn unread(&self, reason: String) -> crate::error::Error {
        self.error(format!("{reason}; put the model's tokenizer.json beside the file"))
    }

    /// Whether special tokens strip the spaces after them: llama.cpp decides this by the model's name.
    fn is_phi3(&self) -> bool {
        let name = self.value("general.name").and_then(Value::as_str).unwrap_or_default().to_lowercase();
        name.contains("phi-3") || name.contains("phi3")
    }

    fn truth(&self, key: &str, default: bool) -> bool {
        self.said(key).and_then(Value::as_bool).unwrap_or(default)
    }

    fn texts(&self, key: &str) -> Result<&[String]> {
        match self.said(key) {
            Some(Value::Texts(texts)) => Ok(texts),
            _ => Err(self.error(format!("{PREFIX}{key}: expected an array of strings"))),
        }
    }

    fn pieces(&self) -> Result<(&[String], &[i32])> {
        let pieces = self.texts("tokens")?;
        if let Some(piece) = pieces.iter().find(|piece| piece.len() > MAX_PIECE_BYTES) {
            let reason = format!("a piece of {} bytes, expected at most {MAX_PIECE_BYTES}", piece.len());
            return Err(self.error(format!("{PREFIX}tokens: {reason}")));
        }
        let kinds: &[i32] = match self.said("token_type") {
            Some(Value::Ints(kinds)) => kinds,
            _ => &[],
        };
        if !kinds.is_empty() && kinds.len() != pieces.len() {
            let reason =
                format!("expected one type per token, got {} for {} tokens", kinds.len(), pieces.len());
            return Err(self.error(format!("{PREFIX}token_type: {reason}")));
        }
        Ok((pieces, kinds))
    }

    fn byte_level(&self) -> Result<Json> {
        let name = self.said("pre").and_then(Value::as_str).unwrap_or("default");
        let Some(pre) = PreTokenizer::named(name) else {
            let reason = format!("{PREFIX}pre: expected one of {}, got {name}", PreTokenizer::known());
            return Err(self.unread(reason));
        };
        let (pieces, kinds) = self.pieces()?;
        let pairs = self.texts("merges")?.iter().map(|merge| match merge.split_once(' ') {
            Some(pair) => Ok([pair.0, pair.1]),
            None => Err(self.error(format!("{PREFIX}merges: expected two pieces, got {merge:?}"))),
        });
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary(pieces, kinds), "merges": pairs.collect::<Result<Vec<_>>>()?,
        });
        let normalizer = if pre.composed { json!({"type": "NFC"}) } else { Json::Null };
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added(pieces, kinds, false),
            "normalizer": normalizer, "pre_tokenizer": pre.json(), "decoder": decoder, "model": model,
            "post_processor": self.template(pieces, pre.begins)?,
        }))
    }

    fn sentence_piece(&self) -> Result<Json> {
        let (pieces, kinds) = self.pieces()?;
        let scores: &[f32] = match self.said("scores") {
            Some(Value::Floats(scores)) if scores.len() == pieces.len() => scores,
            _ => return Err(self.error(format!("{PREFIX}scores: expected a number for each token"))),
        };
        let unknown = pieces.iter().zip(kinds).find(|(_, kind)| **kind == UNKNOWN).map(|(piece, _)| piece);
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary(pieces, kinds), "merges": merges(pieces, kinds, scores),
        });
        // Whether a space is put before the first word.
        let leading = self.truth("add_space_prefix", true);
        let (prepend, strip) = (
            json!({"type": "Prepend", "prepend": SPACE}),
            json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
        );
        let replace =
            |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let normalizers: Vec<Json> =
            leading.then_some(prepend).into_iter().chain([replace(" ", SPACE)]).collect();
        let decoders = [replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        let decoders: Vec<Json> = decoders.into_iter().chain(leading.then_some(strip)).collect();
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added(pieces, kinds, self.is_phi3()),
            "normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": null,
            "decoder": {"type": "Sequence", "decoders": decoders}, "model": model,
            "post_processor": self.template(pieces, true)?,
        }))
    }

    /// The post-processor that adds the BOS and EOS tokens to a text.
    fn template(&self, pieces: &[String], begins: bool) -> Result<Json> {
        let token = |name: &str, wanted: bool| -> Result<Option<(usize, &String)>> {
            if !wanted {
                return Ok(None);
            }
            let id = self.said(&format!("{name}_token_id")).and_then(Value::as_u64);
            let found = id.and_then(|id| usize::try_from(id).ok()).and_then(|id| Some((id, pieces.get(id)?)));
            let reason =
                || self.error(format!("{PREFIX}{name}_token_id: expected the id of a token, got {id:?}"));
            found.map(Some).ok_or_else(reason)
        };
        let first = token("bos", self.truth("add_bos_token", begins))?;
        let last = token("eos", self.truth("add_eos_token", false))?;
        if first.is_none() && last.is_none() {
            return Ok(Json::Null);
        }
        let named = |end: Option<(usize, &String)>| end.map(|(id, piece)| (piece.clone(), id));
        Ok(template(named(first), named(last)))
    }
}

/// The vocabulary: every token except unused ones, with its id.
fn vocabulary(pieces: &[String], kinds: &[i32]) -> Map<String, Json> {
    let kind = |id: usize| kinds.get(id).copied().unwrap_or(NORMAL);
    let there = pieces.iter().enumerate().filter(|(id, _)| kind(*id) != UNUSED);
    there.map(|(id, piece)| (piece.clone(), json!(id))).collect()
}

/// The added tokens, which are matched in a text before anything else. With `phi3`, they strip the spaces
/// after them, except `<unk>`, `<s>` and `<|endoftext|>`.
fn added(pieces: &[String], kinds: &[i32], phi3: bool) -> Vec<Json> {
    let is_added = |kind: &i32| matches!(*kind, UNKNOWN | CONTROL | USER_DEFINED);
    let there =
        pieces.iter().enumerate().zip(kinds).filter(|((_, piece), kind)| is_added(kind) && !piece.is_empty());
    let token = |((id, piece), kind): ((usize, &String), &i32)| {
        let around_texts = ["<unk>", "<s>", "<|endoftext|>"].contains(&piece.as_str());
        let rstrip = phi3 && !around_texts;
        json!({
            "id": id, "content": piece, "single_word": false, "lstrip": false, "rstrip": rstrip, "normalized": false,
            "special": *kind != USER_DEFINED,
        })
    };
    there.map(token).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_of_phi_3_take_the_blanks_behind_them() {
        let pieces = ["<unk>", "<s>", "a", "<|user|>", "<|endoftext|>"].map(String::from);
        let kinds = [UNKNOWN, CONTROL, NORMAL, CONTROL, CONTROL];
        let stripped = |phi3: bool| -> Vec<String> {
            let tokens = added(&pieces, &kinds, phi3).into_iter().filter(|token| token["rstrip"] == true);
            tokens.filter_map(|token| Some(token["content"].as_str()?.to_string())).collect()
        };
        assert_eq!((stripped(true), stripped(false)), (vec!["<|user|>".to_string()], Vec::new()));
    }
}
