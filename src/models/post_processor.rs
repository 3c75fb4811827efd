//! The post-processor of a `tokenizer.json`, for tokenizers read from GGUF files and from model folders.

use serde_json::{json, Map, Value};

/// A post-processor that puts a token before and one after each text, given by their names and ids.
pub(crate) fn template(before: Option<(String, usize)>, after: Option<(String, usize)>) -> Value {
    let special = |end: &Option<(String, usize)>, number: usize| {
        end.as_ref().map(|(name, _)| json!({"SpecialToken": {"id": name, "type_id": number}}))
    };
    let around = |text: &str, number: usize| -> Vec<Value> {
        let text = json!({"Sequence": {"id": text, "type_id": number}});
        [special(&before, number), Some(text), special(&after, number)].into_iter().flatten().collect()
    };
    let described =
        |(name, id): &(String, usize)| (name.clone(), json!({"id": name, "ids": [id], "tokens": [name]}));
    let specials: Map<String, Value> = before.iter().chain(&after).map(described).collect();
    let pair = [around("A", 0), around("B", 1)].concat();
    json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": specials})
}
