//! Tokenizers of files, and questions to them, where the `tokenizers` crate may panic: on a file that is
//! no JSON, on a post-processor that names a special token it does not define.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;

use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};
use crate::util::json;

/// The longest piece of a vocabulary. The crate's Unigram model keeps a node for each byte, one inside
/// the other, and copies and lets go of them by recursion: some thousand bytes overflow a thread's stack,
/// which ends the process. Real vocabularies have some hundred bytes at most.
const MOST_OF_A_PIECE: usize = 1024;

/// Reads a file as a tokenizer, such as a model's `tokenizer.json`.
///
/// # Errors
/// If the file cannot be read, or is no tokenizer's; the error names it.
pub fn read(path: &Path) -> Result<Tokenizer> {
    parse(&std::fs::read(path).map_err(Error::io(path))?, path)
}

/// The tokenizer of the bytes of the file `path`.
pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    // First, because the crate's own readers say neither where it is malformed nor always that it is.
    let outline: Outline = json::parse(bytes, path)?;
    let longest = outline.model.vocab.0;
    if longest > MOST_OF_A_PIECE {
        let reason =
            format!("its vocabulary has a piece of {longest} bytes, expected at most {MOST_OF_A_PIECE}");
        return Err(Error::format(path, reason));
    }
    caught(|| Tokenizer::from_bytes(bytes)).map_err(|reason| Error::format(path, reason))
}

/// What of a file is looked at before the crate reads it.
#[derive(Deserialize)]
struct Outline {
    #[serde(default)]
    model: Model,
}

#[derive(Default, Deserialize)]
struct Model {
    #[serde(default)]
    vocab: Longest,
}

/// The bytes of the longest string in a value.
#[derive(Default)]
struct Longest(usize);

impl<'de> Deserialize<'de> for Longest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Longest;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a value")
            }
            fn visit_bool<E>(self, _: bool) -> std::result::Result<Longest, E> {
                Ok(Longest(0))
            }
            fn visit_i64<E>(self, _: i64) -> std::result::Result<Longest, E> {
                Ok(Longest(0))
            }
            fn visit_u64<E>(self, _: u64) -> std::result::Result<Longest, E> {
                Ok(Longest(0))
            }
            fn visit_f64<E>(self, _: f64) -> std::result::Result<Longest, E> {
                Ok(Longest(0))
            }
            fn visit_unit<E>(self) -> std::result::Result<Longest, E> {
                Ok(Longest(0))
            }
            fn visit_str<E>(self, text: &str) -> std::result::Result<Longest, E> {
                Ok(Longest(text.len()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Longest, A::Error> {
                let mut longest = 0;
                while let Some(Longest(item)) = seq.next_element()? {
                    longest = longest.max(item);
                }
                Ok(Longest(longest))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Longest, A::Error> {
                let mut longest = 0;
                while let Some((Longest(key), Longest(value))) = map.next_entry()? {
                    longest = longest.max(key).max(value);
                }
                Ok(Longest(longest))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// What a tokenizer answers.
///
/// # Errors
/// If it refuses, or panics.
pub(crate) fn ask<R>(question: impl FnOnce() -> tokenizers::Result<R>) -> Result<R> {
    caught(question).map_err(|reason| Error::config("tokenizer", reason))
}

fn caught<R>(question: impl FnOnce() -> tokenizers::Result<R>) -> std::result::Result<R, String> {
    match catch_unwind(AssertUnwindSafe(question)) {
        Ok(answer) => answer.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizer is damaged: its crate panicked".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_file_that_makes_the_crate_panic_is_an_error_that_names_it() {
        let refusal =
            |text: &str| parse(text.as_bytes(), Path::new("tokenizer.json")).unwrap_err().to_string();
        // tokenizers 0.23.2 panics in its decoder's reader on the first, on a number that is none.
        for text in [r#"{"decoder": {"type": 1x}}"#, "", "[]", "{}"] {
            let message = refusal(text);
            assert!(message.contains("tokenizer.json"), "{text}: {message}");
        }
    }

    #[test]
    fn a_piece_whose_release_would_overflow_the_stack_is_refused() {
        let refusal = |vocab: serde_json::Value| {
            let text = json!({"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
                "post_processor": null, "decoder": null, "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}});
            parse(text.to_string().as_bytes(), Path::new("tokenizer.json")).map(|whole| drop(whole.clone()))
        };
        let long = "a".repeat(1 << 20);
        let message = refusal(json!([["<unk>", 0.0], [long, -1.0]])).unwrap_err().to_string();
        assert!(
            message.contains("tokenizer.json") && message.contains("a piece of 1048576 bytes"),
            "{message}"
        );
        assert!(refusal(json!([["<unk>", 0.0], ["a".repeat(MOST_OF_A_PIECE), -1.0]])).is_ok());
        assert!(refusal(json!({ long: 1 })).is_err());
    }
}
