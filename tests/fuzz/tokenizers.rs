//! Fuzzes tokenizer files: reading them with the `tokenizers` crate, and using the result.

use std::panic::{catch_unwind, AssertUnwindSafe};

use monteclora::data::encode::{fit_vocabulary, TextEncoder};
use monteclora::data::task::{Example, Label};
use monteclora::data::tokenizer;
use monteclora::{Error, Result};
use serde_json::{json, Value};

use super::json::Documents;
use super::mutate::Rng;
use super::reader::{Folder, Input, Reader};

fn added(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true})
}

/// A tokenizer for each type of tokenizer model, with the parts that usually go with it.
fn seeds() -> Vec<Value> {
    let of = |normalizer: Value, pre: Value, post: Value, decoder: Value, model: Value| {
        json!({"version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [added(0, "<s>"), added(1, "</s>"), added(2, "<unk>")],
            "normalizer": normalizer, "pre_tokenizer": pre, "post_processor": post, "decoder": decoder,
            "model": model})
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let roberta = json!({"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0],
        "trim_offsets": true, "add_prefix_space": false});
    let bpe = json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": "",
        "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "\u{120}": 5, "ab": 6, "\u{120}ab": 7},
        "merges": ["a b", "\u{120} ab"]});
    let template = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
            "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}});
    let bert = json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
        "strip_accents": null, "lowercase": true});
    let pieces = json!({"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "##b": 4, "c": 5}});
    let metaspace =
        json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": true});
    let unigram = json!({"type": "Unigram", "unk_id": 2, "byte_fallback": false,
        "vocab": [["<s>", 0.0], ["</s>", 0.0], ["<unk>", -2.0], ["\u{2581}", -3.5], ["a", -4.0], ["\u{2581}ab", -1.5]]});
    let sequence = json!({"type": "Sequence", "normalizers": [{"type": "NFKC"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}, {"type": "Prepend", "prepend": "x"},
        {"type": "Strip", "strip_left": true, "strip_right": false}]});
    let split = json!({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"},
        {"type": "Split", "pattern": {"Regex": "\\d{1,3}"}, "behavior": "Isolated", "invert": false},
        {"type": "Digits", "individual_digits": true}]});
    let words = json!({"type": "WordLevel", "unk_token": "<unk>",
        "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "ab": 4}});
    let mut cut = of(sequence, split, template.clone(), Value::Null, words);
    cut["truncation"] =
        json!({"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 2});
    cut["padding"] = json!({"strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<s>"});
    vec![
        of(Value::Null, byte_level.clone(), roberta, byte_level, bpe),
        of(
            bert,
            json!({"type": "BertPreTokenizer"}),
            template,
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            pieces,
        ),
        of(Value::Null, metaspace.clone(), Value::Null, metaspace, unigram),
        cut,
    ]
}

fn documents() -> Documents {
    let values: Vec<Value> = [
        "BPE",
        "Unigram",
        "WordLevel",
        "WordPiece",
        "Isolated",
        "MergedWithNext",
        "Removed",
        "always",
        "never",
        "",
        "<none>",
        "$A",
        "(a+)+$",
        "(?=(\\w+))\\1{9}",
        "[",
        "a*",
        "\u{e9}",
        "\u{1f600}",
    ]
    .map(Value::from)
    .into_iter()
    .chain([
        json!({"Regex": ""}),
        json!({"Regex": "(?!a)"}),
        json!({"String": ""}),
        json!({"type": "ByteFallback"}),
    ])
    .chain([json!({"type": "NFC"}), json!({"type": "ByteLevel"}), json!({"type": "Fuse"}), json!(["a", "b"])])
    .collect();
    let names =
        ["a", "<s>", "id", "ids", "type", "unk_id", "dropout", "vocab", "merges", "pattern", "stride"];
    Documents::new(seeds(), values, &names)
}

#[test]
fn tokenizer_files() {
    let folder = Folder::new(&["tokenizer.json"]);
    let path = folder.path().join("tokenizer.json");
    let documents = documents();
    let make = |rng: &mut Rng| folder.put(Input::one(0, documents.text(rng)));
    let example = |a: &str, b: Option<&str>| Example {
        text_a: a.to_string(),
        text_b: b.map(str::to_string),
        label: Label::Class(0),
    };
    let rows = [example("ab a  b 1234 \u{e9}\u{1f600} c", None), example("a", Some("<s> ab ab ab ab ab ab"))];
    let read = |_: &Input| -> Result<()> {
        let read = tokenizer::read(&path)?;
        fit_vocabulary(read.clone(), 50).ok();
        // The error of a text that cannot be encoded does not name the file.
        let of_file = |error: Error| Error::format(&path, error.to_string());
        let encoder = TextEncoder::new(read, 12, 512).map_err(of_file)?;
        let encoded = encoder.encode(&rows).map_err(of_file)?;
        assert!(encoded.iter().all(|row| row.ids.len() == row.type_ids.len() && row.ids.len() <= 12));
        let ids: Vec<u32> = encoded.into_iter().flat_map(|row| row.ids).collect();
        // The `tokenizers` crate may panic; this crate catches that wherever it decodes.
        catch_unwind(AssertUnwindSafe(|| encoder.tokenizer().decode(&ids, false))).ok();
        Ok(())
    };
    for seed in seeds() {
        read(&folder.put(Input::one(0, seed.to_string().into_bytes()))).unwrap();
    }
    Reader { name: "tokenizer", cost: 1, fixed: 64 << 20, times: 512, names: "tokenizer.json".to_string() }
        .run(make, read);
}
