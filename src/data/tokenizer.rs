//! Reads tokenizers from files and calls them, turning panics of the `tokenizers` crate into errors. The
//! crate panics, for example, on a file that is not JSON, or on a post-processor that names a special token
//! it does not define.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;

use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::{PostProcessorWrapper, Tokenizer};

use super::byte_bpe;
use crate::error::{Error, Result};
use crate::models::hub::ModelFiles;
use crate::models::post_processor::template;
use crate::util::json::{self, token_text};

/// Maximum length in bytes of an entry of the vocabulary. The crate's Unigram model has a node for each byte,
/// nested in that of the byte before, and clones and drops them recursively: some thousand bytes overflow a
/// thread's stack, which ends the process. Entries of real vocabularies have some hundred bytes at most.
const MAX_PIECE_BYTES: usize = 1024;

/// Reads a tokenizer file, such as a model's `tokenizer.json`.
///
/// # Errors
/// If the file cannot be read or is not a tokenizer; the error names it.
pub fn read(path: &Path) -> Result<Tokenizer> {
    parse(&std::fs::read(path).map_err(Error::io(path))?, path)
}

/// Reads the tokenizer of a model: its `tokenizer.json`, else the tokenizer in its GGUF file, else the
/// byte-level BPE of `vocab.json` and `merges.txt`, which for a RoBERTa puts its special tokens around a
/// text. Tokens that `tokenizer_config.json` requests around a text are added where transformers adds them.
///
/// # Errors
/// If there is no tokenizer, if only other libraries can read it (the error says how to convert it), or if
/// its files are malformed.
pub fn of_model(files: &ModelFiles) -> Result<Tokenizer> {
    if let Some(path) = files.tokenizer_path() {
        return with_ends(read(path)?, files, path);
    }
    if let Some(gguf) = files.gguf() {
        return match gguf.tokenizer()? {
            Some(json) => parse(json.to_string().as_bytes(), gguf.path()),
            None => Err(Error::format(
                gguf.path(),
                "it holds no tokenizer, and there is no tokenizer.json beside it",
            )),
        };
    }
    let folder = files.config_path().parent().unwrap_or(Path::new("."));
    match (files.file("vocab.json")?, files.file("merges.txt")?) {
        (Some(vocab), Some(merges)) => {
            let json = byte_bpe::tokenizer_json(files, &vocab, &merges)?;
            return parse(json.to_string().as_bytes(), &vocab);
        }
        (None, None) => (),
        (vocab, _) => {
            let (there, lacking) =
                if vocab.is_some() { ("vocab.json", "merges.txt") } else { ("merges.txt", "vocab.json") };
            let reason = format!("there is no tokenizer.json, and {there} without {lacking} is not enough");
            return Err(Error::format(folder, reason));
        }
    }
    for other in ["tokenizer.model", "sentencepiece.bpe.model", "spm.model", "vocab.txt"] {
        if files.file(other)?.is_some() {
            let convert = byte_bpe::CONVERT;
            let reason = format!("there is no tokenizer.json, and {other} is not supported: {convert}");
            return Err(Error::format(folder, reason));
        }
    }
    Err(Error::format(folder, "there is no tokenizer.json"))
}

/// Adds the tokens before and after a text that `tokenizer_config.json` requests, if `tokenizer.json` adds
/// none. Transformers did so up to version 4 for the tokenizer classes of LLaMA and Gemma, and some models
/// were trained that way and need it (DeepSeek's distilled ones). Version 5 no longer reads these settings
/// beside a `tokenizer.json`.
fn with_ends(mut tokenizer: Tokenizer, files: &ModelFiles, path: &Path) -> Result<Tokenizer> {
    let has_none = |processor: &PostProcessorWrapper| matches!(processor, PostProcessorWrapper::ByteLevel(_));
    if !tokenizer.get_post_processor().is_none_or(has_none) {
        return Ok(tokenizer);
    }
    let settings: Map<String, Value> = byte_bpe::optional(files, "tokenizer_config.json")?;
    let class = settings.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    if !["LlamaTokenizer", "GemmaTokenizer"].contains(&class.trim_end_matches("Fast")) {
        return Ok(tokenizer);
    }
    let end = |asked: &str, role: &str| -> Result<Option<(String, usize)>> {
        // The defaults: a token before the text, none after it.
        if !settings.get(asked).and_then(Value::as_bool).unwrap_or(role == "bos_token") {
            return Ok(None);
        }
        let Some(name) = settings.get(role).and_then(token_text).map(str::to_string) else {
            return Ok(None);
        };
        match tokenizer.token_to_id(&name) {
            Some(id) => Ok(Some((name, id as usize))),
            None => Err(Error::format(path, format!("{role} {name:?} is not in the vocabulary"))),
        }
    };
    let ends = [end("add_bos_token", "bos_token")?, end("add_eos_token", "eos_token")?];
    if ends.iter().all(Option::is_none) {
        return Ok(tokenizer);
    }
    let [before, after] = ends;
    let processor: PostProcessorWrapper =
        serde_json::from_value(template(before, after)).map_err(|e| Error::format(path, e.to_string()))?;
    tokenizer.with_post_processor(Some(processor));
    Ok(tokenizer)
}

/// Parses the bytes of the tokenizer file `path`.
pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Tokenizer> {
    // Parse as JSON first: the crate's errors do not say where a file is malformed, and it does not always
    // report one.
    let outline: Outline = json::parse(bytes, path)?;
    let longest = outline.model.vocab.0;
    if longest > MAX_PIECE_BYTES {
        let reason =
            format!("its vocabulary has a piece of {longest} bytes, expected at most {MAX_PIECE_BYTES}");
        return Err(Error::format(path, reason));
    }
    caught(|| Tokenizer::from_bytes(bytes)).map_err(|reason| Error::format(path, reason))
}

/// The part of a file that is checked before the crate reads it.
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

/// The length in bytes of the longest string in a value.
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

/// Calls a tokenizer.
///
/// # Errors
/// If the call fails or panics.
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
        // The first is not a number: tokenizers 0.23.2 panics on it while it reads the decoder.
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
        assert!(refusal(json!([["<unk>", 0.0], ["a".repeat(MAX_PIECE_BYTES), -1.0]])).is_ok());
        assert!(refusal(json!({ long: 1 })).is_err());
    }

    /// A RoBERTa folder with the bundled model's `tokenizer.json` split into separate files, and the original
    /// tokenizer.
    fn taken_apart() -> Option<(tempfile::TempDir, Tokenizer)> {
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/tiny-roberta");
        let path = assets.join("tokenizer.json");
        if !path.exists() {
            crate::testing::skipped("the bundled model is not in the package");
            return None;
        }
        let text: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
        let pairs = text["model"]["merges"].as_array().unwrap().iter();
        let pair = |pair: &serde_json::Value| match pair.as_str() {
            Some(pair) => pair.to_string(),
            None => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        };
        write("merges.txt", format!("#version: 0.2\n{}\n", pairs.map(pair).collect::<Vec<_>>().join("\n")));
        write("vocab.json", text["model"]["vocab"].to_string());
        write("config.json", json!({"model_type": "roberta"}).to_string());
        write("tokenizer_config.json", json!({"add_prefix_space": true}).to_string());
        std::fs::copy(assets.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        Some((dir, read(&path).unwrap()))
    }

    fn of(dir: &tempfile::TempDir) -> Result<Tokenizer> {
        of_model(&ModelFiles::locate(dir.path().to_str().unwrap(), None)?)
    }

    #[test]
    fn a_tokenizer_of_two_files_gives_the_ids_of_the_one_that_holds_both() -> Result<()> {
        let Some((dir, whole)) = taken_apart() else { return Ok(()) };
        let parts = of(&dir)?;
        let ids = |tokenizer: &Tokenizer, first: &str, second: Option<&str>| match second {
            Some(second) => tokenizer.encode((first, second), true).unwrap().get_ids().to_vec(),
            None => tokenizer.encode(first, true).unwrap().get_ids().to_vec(),
        };
        let texts = ["a gorgeous , witty film", "d\u{e9}j\u{e0} vu <mask> !", "", "Two  blanks\tand 1,234"];
        for text in texts {
            assert_eq!(ids(&parts, text, None), ids(&whole, text, None), "{text}");
            assert_eq!(ids(&parts, text, Some("so it is")), ids(&whole, text, Some("so it is")), "{text}");
            let ids = ids(&whole, text, None);
            assert_eq!(parts.decode(&ids, true).unwrap(), whole.decode(&ids, true).unwrap());
        }
        // For other models, nothing is added around a text unless the settings request it.
        std::fs::write(dir.path().join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
        let plain = ids(&of(&dir)?, "witty", None);
        assert_eq!([&[0], plain.as_slice(), &[2]].concat(), ids(&whole, "witty", None));
        let settings =
            json!({"add_prefix_space": true, "add_bos_token": true, "bos_token": {"content": "<s>"}});
        std::fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        assert_eq!(ids(&of(&dir)?, "witty", None), [&[0], plain.as_slice()].concat());
        Ok(())
    }

    #[test]
    fn the_ends_that_llamas_settings_ask_for_are_put_around_a_text_without_any() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: Value| std::fs::write(dir.path().join(name), text.to_string()).unwrap();
        std::fs::write(
            dir.path().join("model.safetensors"),
            [8, 0, 0, 0, 0, 0, 0, 0, b'{', b'}', b' ', b' ', b' ', b' ', b' ', b' '],
        )
        .unwrap();
        write("config.json", json!({"model_type": "qwen2"}));
        let tokenizer = |processor: Value| {
            let added = |id: u32, content: &str| {
                json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true})
            };
            json!({"version": "1.0", "added_tokens": [added(0, "<b>"), added(1, "<e>")], "normalizer": null,
                "pre_tokenizer": {"type": "Whitespace"}, "post_processor": processor, "decoder": null,
                "model": {"type": "WordLevel", "unk_token": "<e>", "vocab": {"<b>": 0, "<e>": 1, "who": 2, "you": 3}}})
        };
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
        let ids = |pair: bool| -> Result<Vec<u32>> {
            let tokenizer = of(&dir)?;
            let encoded =
                if pair { tokenizer.encode(("who", "you"), true) } else { tokenizer.encode("who", true) };
            Ok(encoded.unwrap().get_ids().to_vec())
        };
        let settings = |class: &str, bos: bool, eos: bool| {
            json!({"tokenizer_class": class, "add_bos_token": bos, "add_eos_token": eos, "bos_token": "<b>",
                "eos_token": {"content": "<e>"}})
        };
        for processor in [Value::Null, byte_level] {
            write("tokenizer.json", tokenizer(processor));
            for (class, bos, eos, one, two) in [
                ("LlamaTokenizerFast", true, false, vec![0, 2], vec![0, 2, 0, 3]),
                ("LlamaTokenizer", true, true, vec![0, 2, 1], vec![0, 2, 1, 0, 3, 1]),
                ("GemmaTokenizerFast", false, true, vec![2, 1], vec![2, 1, 3, 1]),
                ("LlamaTokenizerFast", false, false, vec![2], vec![2, 3]),
                ("Qwen2Tokenizer", true, true, vec![2], vec![2, 3]),
            ] {
                write("tokenizer_config.json", settings(class, bos, eos));
                assert_eq!((ids(false)?, ids(true)?), (one, two), "{class}");
            }
        }
        write("tokenizer_config.json", json!({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<b>"}));
        assert_eq!(ids(false)?, [0, 2], "the class's own default");
        // A post-processor in the file is kept.
        let own = json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {}});
        write("tokenizer.json", tokenizer(own));
        write("tokenizer_config.json", settings("LlamaTokenizerFast", true, true));
        assert_eq!(ids(false)?, [2]);
        let mut unknown = settings("LlamaTokenizerFast", true, true);
        unknown["bos_token"] = json!("<unknown>");
        write("tokenizer.json", tokenizer(Value::Null));
        write("tokenizer_config.json", unknown);
        let error = of(&dir).unwrap_err().to_string();
        assert!(error.contains("bos_token \"<unknown>\" is not in the vocabulary"), "{error}");
        Ok(())
    }

    #[test]
    fn a_tokenizer_that_is_not_read_is_told_with_what_to_do() {
        let Some((dir, _)) = taken_apart() else { return };
        let message = || of(&dir).unwrap_err().to_string();
        // The two files do not say how a text is pre-tokenised.
        for (model, class, refused) in [
            ("qwen2", None, true),
            ("qwen2", Some("Qwen2Tokenizer"), true),
            ("llama", Some("LlamaTokenizerFast"), true),
            ("llama", Some("GPT2TokenizerFast"), false),
            ("roberta", Some("RobertaTokenizer"), false),
        ] {
            std::fs::write(dir.path().join("config.json"), json!({"model_type": model}).to_string()).unwrap();
            let settings = json!({"tokenizer_class": class}).to_string();
            std::fs::write(dir.path().join("tokenizer_config.json"), settings).unwrap();
            assert_eq!(of(&dir).is_err(), refused, "{model} {class:?}");
            assert!(!refused || message().contains("differently from GPT-2"), "{}", message());
        }
        std::fs::write(dir.path().join("merges.txt"), "#version: 0.2\na b\nabc\n").unwrap();
        assert!(message().contains("merges.txt, line 3: expected two pieces"), "{}", message());
        std::fs::write(dir.path().join("merges.txt"), "nosuch piece\n").unwrap();
        assert!(message().contains("vocab.json"), "{}", message());
        std::fs::write(dir.path().join("merges.txt"), "version https://git-lfs.github.com/spec/v1\n")
            .unwrap();
        assert!(message().contains("merges.txt: it is a Git LFS pointer"), "{}", message());
        std::fs::remove_file(dir.path().join("merges.txt")).unwrap();
        assert!(message().contains("vocab.json without merges.txt is not enough"), "{}", message());
        std::fs::remove_file(dir.path().join("vocab.json")).unwrap();
        for name in ["tokenizer.model", "spm.model"] {
            std::fs::write(dir.path().join(name), "").unwrap();
            assert!(
                message().contains(&format!("{name} is not supported: convert it once")),
                "{}",
                message()
            );
            std::fs::remove_file(dir.path().join(name)).unwrap();
        }
        assert!(message().ends_with(": there is no tokenizer.json"), "{}", message());
    }
}
