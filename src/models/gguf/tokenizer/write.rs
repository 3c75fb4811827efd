//! Conversion of a `tokenizer.json` to GGUF metadata.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::parts::{BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED};
use super::pre::PreTokenizer;
use crate::error::{Error, Result};
use crate::models::gguf::value::Value;

/// Returns the metadata with which llama.cpp tokenises as this `tokenizer.json` does, for a model with
/// `vocab_size` rows: byte-level BPE as `gpt2`, SentencePiece as `llama`.
///
/// # Errors
/// If the tokenizer is of another kind, has a pre-tokenizer that llama.cpp has no name for, or has malformed
/// merges or a vocabulary outside the model's rows.
pub fn tokenizer_metadata(tokenizer: &Json, vocab_size: usize) -> Result<Vec<(String, Value)>> {
    let refuse = |reason: String| Err(Error::config("tokenizer.json", reason));
    let model = &tokenizer["model"];
    // Files of old versions of the tokenizers crate do not give the model's type.
    let kind = model["type"].as_str().unwrap_or("BPE");
    if kind != "BPE" {
        return refuse(format!("expected byte-level BPE or SentencePiece's BPE, got {kind}"));
    }
    let sentence_piece = model["byte_fallback"] == true;
    let (kind, pre) = match (sentence_piece, PreTokenizer::of(tokenizer)) {
        (true, _) => ("llama", "default"),
        (false, Some(pre)) => ("gpt2", pre.names[0]),
        (false, None) => {
            return refuse(format!(
                "llama.cpp does not support this pre-tokenizer: {}",
                tokenizer["pre_tokenizer"]
            ));
        }
    };
    let (pieces, kinds) = pieces(tokenizer, vocab_size, sentence_piece)?;
    let pairs = pairs(model)?;
    let mut metadata: Vec<(&str, Value)> = vec![("model", kind.into()), ("pre", pre.into())];
    if sentence_piece {
        metadata.push(("scores", Value::Floats(scores(&pieces, &pairs))));
        metadata.push(("add_space_prefix", leading_space(tokenizer).into()));
    } else {
        // A space inside a token would be taken for the separator.
        let joined = |[left, right]: &[&str; 2]| {
            format!("{} {}", left.replace(' ', "\u{120}"), right.replace(' ', "\u{120}"))
        };
        metadata.push(("merges", Value::Texts(pairs.iter().map(joined).collect())));
    }
    metadata.push(("tokens", Value::Texts(pieces)));
    metadata.push(("token_type", Value::Ints(kinds)));
    let (first, last) = around(tokenizer);
    metadata.push(("add_bos_token", first.is_some().into()));
    metadata.push(("add_eos_token", last.is_some().into()));
    for (name, id) in [("bos_token_id", first), ("eos_token_id", last)] {
        metadata.extend(id.map(|id| (name, Value::U32(id))));
    }
    Ok(metadata.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect())
}

/// The token of each row of the model, and its type.
fn pieces(tokenizer: &Json, vocab_size: usize, sentence_piece: bool) -> Result<(Vec<String>, Vec<i32>)> {
    let Some(vocabulary) = tokenizer["model"]["vocab"].as_object() else {
        return Err(Error::config("tokenizer.json", "its model has no vocabulary"));
    };
    let mut pieces: Vec<String> = (0..vocab_size).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; vocab_size];
    let unknown = tokenizer["model"]["unk_token"].as_str();
    let is_byte =
        |piece: &str| sentence_piece && piece.len() == 6 && piece.starts_with("<0x") && piece.ends_with('>');
    let mut put = |id: Option<u64>, piece: &str, kind: i32| {
        let outside = || {
            let reason = format!("token {piece:?} has id {id:?}, the model's vocabulary has {vocab_size}");
            Error::config("tokenizer.json", reason)
        };
        let id =
            id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocab_size).ok_or_else(outside)?;
        (pieces[id], kinds[id]) = (piece.to_string(), kind);
        Ok::<(), Error>(())
    };
    for (piece, id) in vocabulary {
        let kind = match piece.as_str() {
            piece if Some(piece) == unknown => UNKNOWN,
            piece if is_byte(piece) => BYTE,
            _ => NORMAL,
        };
        put(id.as_u64(), piece, kind)?;
    }
    for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let Some(content) = token["content"].as_str() else { continue };
        if token["id"].as_u64().is_some_and(|id| id >= vocab_size as u64) {
            tracing::warn!("{content:?} is a token of the tokenizer but not of the model: it is left out");
            continue;
        }
        match (Some(content) == unknown, token["special"] == true) {
            (true, _) => put(token["id"].as_u64(), content, UNKNOWN)?,
            (_, true) => put(token["id"].as_u64(), content, CONTROL)?,
            // llama.cpp matches it in the raw text, where spaces are not replaced yet.
            _ if sentence_piece => put(token["id"].as_u64(), &content.replace(SPACE, " "), USER_DEFINED)?,
            _ => put(token["id"].as_u64(), content, USER_DEFINED)?,
        }
    }
    Ok((pieces, kinds))
}

/// The merges: arrays of two in newer files, texts with a space in older ones.
fn pairs(model: &Json) -> Result<Vec<[&str; 2]>> {
    fn pair(merge: &Json) -> Option<[&str; 2]> {
        match merge.as_array().map(Vec::as_slice) {
            Some([left, right]) => Some([left.as_str()?, right.as_str()?]),
            _ => merge.as_str()?.split_once(' ').map(|(left, right)| [left, right]),
        }
    }
    let merges = model["merges"].as_array().into_iter().flatten();
    let error = || Error::config("tokenizer.json", "expected two pieces in each merge");
    merges.map(|merge| pair(merge).ok_or_else(error)).collect()
}

/// SentencePiece's scores. llama.cpp joins the highest score first, so the score of a token is minus the rank
/// of its first merge; tokens without a merge come last.
fn scores(pieces: &[String], pairs: &[[&str; 2]]) -> Vec<f32> {
    let mut first = HashMap::new();
    for (place, [left, right]) in pairs.iter().enumerate() {
        first.entry(format!("{left}{right}")).or_insert(place);
    }
    pieces.iter().map(|piece| -(first.get(piece).copied().unwrap_or(pairs.len()) as f32)).collect()
}

/// Whether a space is put before the first word.
fn leading_space(tokenizer: &Json) -> bool {
    let steps = |of: &Json, inner: &str| match of[inner].as_array() {
        Some(steps) => steps.clone(),
        None => vec![of.clone()],
    };
    let prepends = |step: &Json| step["type"] == "Prepend";
    let before = |step: &Json| {
        step["type"] == "Metaspace" && step["prepend_scheme"] != "never" && step["add_prefix_space"] != false
    };
    steps(&tokenizer["normalizer"], "normalizers").iter().any(prepends)
        || steps(&tokenizer["pre_tokenizer"], "pretokenizers").iter().any(before)
}

/// The tokens that a text begins and ends with.
fn around(tokenizer: &Json) -> (Option<u32>, Option<u32>) {
    let processor = &tokenizer["post_processor"];
    let steps = match processor["processors"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![processor],
    };
    let Some(template) = steps.into_iter().find(|step| step["type"] == "TemplateProcessing") else {
        return (None, None);
    };
    let single: &[Json] = template["single"].as_array().map(Vec::as_slice).unwrap_or_default();
    let id = |item: Option<&Json>| {
        let name = item?["SpecialToken"]["id"].as_str()?;
        template["special_tokens"][name]["ids"][0].as_u64().and_then(|id| u32::try_from(id).ok())
    };
    let text = single.iter().position(|item| !item["Sequence"].is_null()).unwrap_or(0);
    (id(single[..text].first()), id(single.get(text + 1)))
}
