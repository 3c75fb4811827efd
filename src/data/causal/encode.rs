//! Encodes prompts and answers as token ids.

use std::collections::BTreeSet;

use tokenizers::{Encoding, Tokenizer};

use super::parts;
use super::tokens::{windows, Tokens};
use crate::data::instruct::Prompted;
use crate::data::tokenizer;
use crate::error::{Error, Result};

/// Texts per call of the tokenizer, to bound the memory of its own encodings, which are larger than ours.
const CHUNK: usize = 1024;

/// The encoded rows, and how many rows were truncated or dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encodings {
    /// The rows with at least one target.
    pub rows: Vec<Tokens>,
    /// The number of these rows that were truncated to `max_length`.
    pub cut: usize,
    /// The number of rows dropped because truncation removed their whole answer.
    pub dropped: usize,
    /// The special tokens with which the parts to learn end ([`Prompted::learnt`]), ascending: where a model
    /// that has learnt them ends its turn.
    pub ends: Vec<u32>,
}

/// Encodes rows and marks the tokens that count in the loss.
#[derive(Debug, Clone)]
pub struct PromptEncoder {
    tokenizer: Tokenizer,
    max_length: usize,
    /// The tokens that end a text; the first is appended to answers.
    ends: Vec<u32>,
    learn_prompt: bool,
    /// Whether texts have all their special tokens already.
    rendered: bool,
    /// The special tokens that a text may hold.
    special: BTreeSet<u32>,
}

impl PromptEncoder {
    /// Creates an encoder of rows with at most `max_length` tokens. `ends` are the tokens that end a text
    /// (`None`, or those of [`DecoderConfig`](crate::models::decoder::DecoderConfig)): the first is appended
    /// to every answer that does not end with one of them, and the end counts in the loss. Prompts count only
    /// with `learn_prompt`. The truncation and padding settings of the tokenizer's file are overridden; its
    /// post-processor still adds the special tokens.
    ///
    /// # Errors
    /// If `max_length` is below 2 or above `model_max_length`.
    pub fn new(
        mut tokenizer: Tokenizer,
        max_length: usize,
        model_max_length: usize,
        ends: impl IntoIterator<Item = u32>,
        learn_prompt: bool,
    ) -> Result<Self> {
        if !(2..=model_max_length).contains(&max_length) {
            let reason = format!("expected 2 to {model_max_length} (the model's maximum), got {max_length}");
            return Err(Error::config("max_length", reason));
        }
        tokenizer
            .with_truncation(None)
            .map_err(|e| Error::config("max_length", e.to_string()))?
            .with_padding(None);
        let added = tokenizer.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let ends = ends.into_iter().collect();
        Ok(Self { tokenizer, max_length, ends, learn_prompt, rendered: false, special })
    }

    /// The encoder for texts that a chat template rendered ([`data::chat`](crate::data::chat)): they have all
    /// their special tokens, so that none is added at either end.
    pub fn of_rendered(self) -> Self {
        Self { rendered: true, ends: Vec::new(), ..self }
    }

    /// The tokenizer, without truncation and padding.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The maximum number of tokens of a row.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The number of tokens of a row before truncation, including the end token.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn length(&self, row: &Prompted) -> Result<usize> {
        let text = format!("{}{}", row.prompt, row.answer);
        let encoding = tokenizer::ask(|| self.tokenizer.encode(text, !self.rendered))?;
        Ok(self.tokens(&encoding, row, 0).0.ids.len())
    }

    /// Encodes a prompt for generation, without the special tokens that some tokenizers add at the end of a
    /// text.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = tokenizer::ask(|| self.tokenizer.encode_fast(prompt, !self.rendered))?;
        let (ids, special) = (encoding.get_ids(), encoding.get_special_tokens_mask());
        // An empty text consists of special tokens only: keep them.
        let end = special.iter().rposition(|special| *special == 0).map_or(ids.len(), |last| last + 1);
        Ok(ids[doubled_start(&encoding)..end].to_vec())
    }

    /// The encoder for scoring answers: without end tokens, and without loss on prompts even if training has
    /// it.
    pub fn of_answers(&self) -> Self {
        Self { ends: Vec::new(), learn_prompt: false, ..self.clone() }
    }

    /// Encodes all rows in parallel, in order. Prompt and answer are tokenised as one text; a token that
    /// spans both belongs to the answer. Rows longer than `max_length` are truncated at the end. Rows without
    /// a prompt (plain text) are instead split into windows that overlap by one token, so that every token
    /// counts in the loss once. A text that already begins with the special token that the tokenizer adds
    /// (because a chat template rendered it, say) does not get a second one.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn encode(&self, rows: &[Prompted]) -> Result<Encodings> {
        let mut out =
            Encodings { rows: Vec::with_capacity(rows.len()), cut: 0, dropped: 0, ends: Vec::new() };
        let mut ends = BTreeSet::new();
        for (chunk, first) in rows.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            let texts: Vec<String> =
                chunk.iter().map(|row| format!("{}{}", row.prompt, row.answer)).collect();
            let encodings = tokenizer::ask(|| self.tokenizer.encode_batch(texts, !self.rendered))?;
            for ((encoding, prompted), row) in encodings.iter().zip(chunk).zip(first..) {
                let (whole, last) = self.tokens(encoding, prompted, row);
                ends.extend(last);
                if prompted.prompt.is_empty() {
                    out.rows.extend(windows(whole, self.max_length));
                    continue;
                }
                let cut = whole.ids.len() > self.max_length;
                let Tokens { mut ids, mut learnt, row } = whole;
                ids.truncate(self.max_length);
                learnt.truncate(self.max_length);
                let tokens = Tokens { ids, learnt, row };
                if tokens.targets() == 0 {
                    out.dropped += 1;
                } else {
                    out.cut += usize::from(cut);
                    out.rows.push(tokens);
                }
            }
        }
        out.ends = ends.into_iter().collect();
        Ok(out)
    }

    /// The untruncated tokens of the row with this index, with its end and the loss mask; and the special
    /// tokens with which its parts to learn end.
    fn tokens(&self, encoding: &Encoding, prompted: &Prompted, row: usize) -> (Tokens, Vec<u32>) {
        let start = doubled_start(encoding);
        let mut ids = encoding.get_ids()[start..].to_vec();
        let offsets = &encoding.get_offsets()[start..];
        let (of_parts, last) = match &prompted.learnt {
            None => (offsets.iter().map(|(_, end)| *end > prompted.prompt.len()).collect(), Vec::new()),
            Some(learnt) => {
                let text = format!("{}{}", prompted.prompt, prompted.answer);
                let is_special = |token: usize| self.special.contains(&ids[token]);
                parts::mark(&text, learnt, offsets, is_special)
            }
        };
        let last = last.into_iter().map(|token| ids[token]).collect();
        let own = of_parts.iter().zip(&encoding.get_special_tokens_mask()[start..]);
        let mut learnt: Vec<bool> =
            own.map(|(learnt, added)| *added == 0 && (self.learn_prompt || *learnt)).collect();
        // Some tokenizers add an end token themselves, and texts that a chat template rendered have one.
        match (self.ends.first(), ids.last()) {
            (Some(_), Some(last)) if self.ends.contains(last) => learnt[ids.len() - 1] = true,
            (Some(end), _) => {
                ids.push(*end);
                learnt.push(true);
            }
            (None, _) => {}
        }
        (Tokens { ids, learnt, row }, last)
    }
}

/// The number of tokens to drop at the start: 1 where the tokenizer adds the token that the text begins with
/// already, as texts do that a chat template rendered. A model has never seen two.
fn doubled_start(encoding: &Encoding) -> usize {
    match (encoding.get_ids(), encoding.get_special_tokens_mask()) {
        ([added, written, ..], [1, 0, ..]) if added == written => 1,
        _ => 0,
    }
}
