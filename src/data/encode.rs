//! Turns texts into token ids with the `tokenizers` crate: truncation, special tokens and segment ids.
//!
//! [`Batch::collate`](crate::data::batch::Batch::collate) adds the padding of each batch.

use tokenizers::{EncodeInput, PostProcessor, Tokenizer, TruncationParams, TruncationStrategy};

use crate::data::task::{Example, Label};
use crate::data::tokenizer;
use crate::error::{Error, Result};

/// Rows per call of the tokenizer, to bound the memory of its own encodings, which are larger than ours.
const CHUNK: usize = 4096;

/// An example as token ids.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// The token ids, special tokens included, not padded; never empty.
    pub ids: Vec<u32>,
    /// The segment id of each token, as long as `ids`: 0, or 1 in the second text of a BERT pair.
    pub type_ids: Vec<u32>,
    /// The label: a class, a score, or none.
    pub label: Label,
    /// The index of the example among those encoded, from 0.
    pub row: usize,
}

impl Encoded {
    /// The token ids and the label as numbers, for a checksum of the data.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        let label = match self.label {
            Label::Class(class) => class,
            Label::Score(score) => score.to_bits(),
            Label::Unknown => u32::MAX,
        };
        self.ids.iter().copied().chain([u32::MAX, label])
    }
}

/// Fits a tokenizer to a model whose vocabulary has `vocab_size` entries. A tokenizer of another model may
/// give ids outside it for some texts only, and embedding lookups on a GPU do not check ids.
///
/// Tokens that were added to the tokenizer but not to the model, such as Gemma 3's image token, are removed
/// with a warning (`tracing`); their text is then tokenised like any other.
///
/// # Errors
/// If the vocabulary without added tokens has an id outside `vocab_size`, or if the tokenizer cannot be
/// rebuilt without the removed tokens.
pub fn fit_vocabulary(tokenizer: Tokenizer, vocab_size: usize) -> Result<Tokenizer> {
    let outside = |id: u32| id as usize >= vocab_size;
    let largest = tokenizer.get_vocab(false).into_iter().max_by_key(|(_, id)| *id);
    if let Some((token, id)) = largest.filter(|(_, id)| outside(*id)) {
        let reason = format!("its largest id is {id} ({token:?}), the model's vocabulary has {vocab_size}");
        return Err(Error::config("tokenizer", reason));
    }
    let added = tokenizer.get_added_tokens_decoder();
    let names: Vec<&str> =
        added.iter().filter(|(id, _)| outside(**id)).map(|(_, token)| token.content.as_str()).collect();
    if names.is_empty() {
        return Ok(tokenizer);
    }
    tracing::warn!(
        "the tokenizer's tokens {} are not in the model's vocabulary and are left out",
        names.join(", ")
    );
    let damaged = |error: String| Error::config("tokenizer", error);
    let text = tokenizer.to_string(false).map_err(|error| damaged(error.to_string()))?;
    let mut json: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
    if let Some(tokens) = json["added_tokens"].as_array_mut() {
        tokens.retain(|token| token["id"].as_u64().is_some_and(|id| id < vocab_size as u64));
    }
    json.to_string().parse().map_err(|error: tokenizers::Error| damaged(error.to_string()))
}

/// A tokenizer with fixed truncation.
#[derive(Debug, Clone)]
pub struct TextEncoder {
    tokenizer: Tokenizer,
}

impl TextEncoder {
    /// Creates an encoder of at most `max_length` tokens, including special tokens; pairs are truncated at
    /// the end of the longer text first. The truncation and padding settings of the tokenizer's file are
    /// overridden; its post-processor still adds the special tokens.
    ///
    /// # Errors
    /// If `max_length` is less than the number of special tokens of a pair plus two, or greater than
    /// `model_max_length`, the number of tokens for which the model has positions.
    pub fn new(mut tokenizer: Tokenizer, max_length: usize, model_max_length: usize) -> Result<Self> {
        let added = |pair| tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(pair));
        let special = added(true).max(added(false));
        let least = special + 2;
        if max_length < least {
            let reason =
                format!("a pair needs at least {least} ({special} special tokens), got {max_length}");
            return Err(Error::config("max_length", reason));
        }
        if max_length > model_max_length {
            let reason = format!("the model takes at most {model_max_length} tokens, got {max_length}");
            return Err(Error::config("max_length", reason));
        }
        let truncation =
            TruncationParams { max_length, strategy: TruncationStrategy::LongestFirst, ..Default::default() };
        tokenizer
            .with_truncation(Some(truncation))
            .map_err(|e| Error::config("max_length", e.to_string()))?
            .with_padding(None);
        Ok(Self { tokenizer })
    }

    /// The tokenizer, with this encoder's truncation.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Encodes all examples in parallel, in order; the result does not depend on the number of threads.
    ///
    /// # Errors
    /// If the tokenizer fails, gives no token for a text, or more than `max_length` (its post-processor is
    /// damaged).
    pub fn encode(&self, examples: &[Example]) -> Result<Vec<Encoded>> {
        let mut out = Vec::with_capacity(examples.len());
        let max_length = self.tokenizer.get_truncation().map_or(usize::MAX, |cut| cut.max_length);
        for chunk in examples.chunks(CHUNK) {
            let inputs: Vec<EncodeInput> = chunk
                .iter()
                .map(|example| match &example.text_b {
                    Some(second) => (example.text_a.as_str(), second.as_str()).into(),
                    None => example.text_a.as_str().into(),
                })
                .collect();
            let encodings = tokenizer::ask(|| self.tokenizer.encode_batch_fast(inputs, true))?;
            for (encoding, example) in encodings.into_iter().zip(chunk) {
                let row = out.len();
                if encoding.is_empty() {
                    return Err(Error::config("text", format!("row {row} (from 0) has no token")));
                }
                let (ids, type_ids) = (encoding.get_ids().to_vec(), encoding.get_type_ids().to_vec());
                // A damaged template may repeat a text or add too many tokens; the model has no positions for
                // them.
                if ids.len() > max_length || type_ids.len() != ids.len() {
                    let reason = format!(
                        "row {row} (from 0) has {} ids and {} segments, of at most {max_length}: its \
                         post-processor is damaged",
                        ids.len(),
                        type_ids.len()
                    );
                    return Err(Error::config("tokenizer", reason));
                }
                out.push(Encoded { ids, type_ids, label: example.label, row });
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};
    use std::path::Path;
    use tokenizers::models::wordlevel::WordLevel;
    use tokenizers::pre_tokenizers::whitespace::Whitespace;
    use tokenizers::processors::template::TemplateProcessing;
    use tokenizers::{PaddingParams, PaddingStrategy};

    /// `[PAD]` 0, `[CLS]` 1, `[SEP]` 2, `[UNK]` 3, then `a` 4 to `j` 13; with truncation and padding of its
    /// own.
    fn tiny() -> Tokenizer {
        let words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
        let vocab = words.iter().enumerate().map(|(id, word)| (word.to_string(), id as u32)).collect();
        let model = WordLevel::builder().vocab(vocab).unk_token("[UNK]".into()).build().unwrap();
        let template = TemplateProcessing::builder()
            .try_single("[CLS]:0 $A:0 [SEP]:0")
            .unwrap()
            .try_pair("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
            .unwrap()
            .special_tokens(vec![("[CLS]", 1), ("[SEP]", 2)])
            .build()
            .unwrap();
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(Whitespace {})).with_post_processor(Some(template));
        let own = TruncationParams { max_length: 4, ..Default::default() };
        let padding = PaddingParams { strategy: PaddingStrategy::Fixed(32), ..Default::default() };
        tokenizer.with_truncation(Some(own)).unwrap().with_padding(Some(padding));
        tokenizer
    }

    fn example(a: &str, b: Option<&str>) -> Example {
        Example { text_a: a.into(), text_b: b.map(Into::into), label: Label::Class(1) }
    }

    #[test]
    fn pairs_have_two_segments_and_the_file_s_own_rules_are_overridden() -> Result<()> {
        let encoder = TextEncoder::new(tiny(), 16, 512)?;
        let rows = encoder.encode(&[example("a b zzz", Some("c d")), example("e f g", None)])?;
        assert_eq!(rows[0].ids, [1, 4, 5, 3, 2, 6, 7, 2]);
        assert_eq!(rows[0].type_ids, [0, 0, 0, 0, 0, 1, 1, 1]);
        assert_eq!(rows[1].ids, [1, 8, 9, 10, 2]);
        assert_eq!((rows[1].row, &rows[1].label), (1, &Label::Class(1)));
        Ok(())
    }

    #[test]
    fn truncation_takes_from_the_longer_text_and_keeps_special_tokens() -> Result<()> {
        let encoder = TextEncoder::new(tiny(), 8, 512)?;
        let rows = encoder.encode(&[
            example("a b c d e f g", Some("h i")),
            example("a", Some("b c d e f g h")),
            example("a b c d e f g h i j", None),
        ])?;
        assert_eq!(rows[0].ids, [1, 4, 5, 6, 2, 11, 12, 2]);
        assert_eq!(rows[1].ids, [1, 4, 2, 5, 6, 7, 8, 2]);
        assert_eq!(rows[2].ids, [1, 4, 5, 6, 7, 8, 9, 2]);
        Ok(())
    }

    #[test]
    fn a_length_out_of_range_names_the_option() {
        assert!(TextEncoder::new(tiny(), 5, 512).is_ok());
        for (length, model) in [(4, 512), (0, 512), (513, 512)] {
            let error = TextEncoder::new(tiny(), length, model).unwrap_err().to_string();
            assert!(error.contains("max_length") && error.contains(&length.to_string()), "{error}");
        }
    }

    #[test]
    fn a_tokenizer_larger_than_the_model_is_refused_by_both_numbers() {
        assert!(fit_vocabulary(tiny(), 14).is_ok() && fit_vocabulary(tiny(), 50).is_ok());
        let error = fit_vocabulary(tiny(), 13).unwrap_err().to_string();
        let expected = "invalid tokenizer: its largest id is 13 (\"j\"), the model's vocabulary has 13";
        assert_eq!(error, expected);
        // Added tokens outside the model's vocabulary are removed, those inside it stay.
        let mut added = tiny();
        added
            .add_special_tokens(["<new>", "<newer>"].map(|name| tokenizers::AddedToken::from(name, true)))
            .unwrap();
        let ids = |tokenizer: &Tokenizer| {
            let mut whole = tokenizer.clone();
            whole.with_truncation(None).unwrap();
            whole.encode("a <newer> <new>", true).unwrap().get_ids().to_vec()
        };
        let (whole, plain) = (ids(&added), ids(&tiny()));
        assert!(whole.contains(&14) && whole.contains(&15));
        assert_eq!(ids(&fit_vocabulary(added.clone(), 16).unwrap()), whole);
        let some = ids(&fit_vocabulary(added.clone(), 15).unwrap());
        assert!(some.contains(&14) && !some.contains(&15), "{some:?}");
        assert_eq!(ids(&fit_vocabulary(added, 14).unwrap()), plain);
    }

    #[test]
    fn order_is_kept_across_chunks_and_runs_and_no_token_is_an_error() -> Result<()> {
        let examples: Vec<Example> = (0..CHUNK + 10).map(|i| example(&"a ".repeat(i % 7), None)).collect();
        let encoder = TextEncoder::new(tiny(), 16, 16)?;
        let rows = encoder.encode(&examples)?;
        assert!(rows.iter().enumerate().all(|(i, e)| e.row == i && e.ids.len() == 2 + i % 7));
        assert_eq!(rows, encoder.encode(&examples)?);
        let mut bare = tiny();
        bare.with_post_processor(None::<TemplateProcessing>);
        let encoder = TextEncoder::new(bare, 16, 16)?;
        let error = encoder.encode(&[example("a", None), example("", None)]).unwrap_err().to_string();
        assert_eq!(error, "invalid text: row 1 (from 0) has no token");
        Ok(())
    }

    #[test]
    fn a_tokenizer_that_makes_the_crate_panic_or_says_a_text_twice_is_refused() -> Result<()> {
        let read = |json: &Value| tokenizer::parse(json.to_string().as_bytes(), Path::new("tokenizer.json"));
        let template = json!({"type": "TemplateProcessing", "special_tokens": {},
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]});
        let text = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": template, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}});
        let tokenizer = read(&text)?;
        let error =
            TextEncoder::new(tokenizer, 12, 12)?.encode(&[example("b", None)]).unwrap_err().to_string();
        assert_eq!(error, "invalid tokenizer: the tokenizer is damaged: its crate panicked");
        // A repeated text exceeds the length that it was truncated to.
        let mut twice = text;
        twice["post_processor"]["single"] = twice["post_processor"]["pair"].clone();
        twice["post_processor"]["single"][1]["Sequence"]["id"] = json!("A");
        twice["pre_tokenizer"] = json!({"type": "Whitespace"});
        let encoder = TextEncoder::new(read(&twice)?, 12, 12)?;
        assert_eq!(encoder.encode(&[example("b b b", None)])?[0].ids, [1; 6]);
        let error = encoder.encode(&[example(&"b ".repeat(20), None)]).unwrap_err().to_string();
        assert!(error.contains("24 ids") && error.contains("at most 12"), "{error}");
        Ok(())
    }

    #[test]
    fn roberta_s_tokenizer_gives_the_reference_ids() -> Result<()> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let name = "shared/data/tokenizers/roberta-base/tokenizer.json";
        let Some(file) = here.ancestors().skip(1).map(|up| up.join(name)).find(|p| p.is_file()) else {
            crate::testing::skipped(&format!("no {name} beside the crate"));
            return Ok(());
        };
        let encoder = TextEncoder::new(Tokenizer::from_file(file).unwrap(), 128, 512)?;
        let hello = "Hello world! cécé herlolip";
        let rows = encoder.encode(&[example(hello, None), example("Hello", Some("Hello"))])?;
        assert_eq!(rows[0].ids, [0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2]);
        assert_eq!(rows[1].ids, [0, 31414, 2, 2, 31414, 2]);
        assert_eq!(rows[1].type_ids, [0; 6]);
        Ok(())
    }
}
