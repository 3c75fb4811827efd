//! Encodes prompts and answers as token ids.

use tokenizers::{Encoding, Tokenizer};

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
}

/// Encodes rows and marks the tokens that count in the loss.
#[derive(Debug, Clone)]
pub struct PromptEncoder {
    tokenizer: Tokenizer,
    max_length: usize,
    /// The tokens that end a text; the first is appended to answers.
    ends: Vec<u32>,
    learn_prompt: bool,
}

impl PromptEncoder {
    /// Creates an encoder of rows with at most `max_length` tokens. `ends` are the tokens that end a text
    /// (`None`, or those of [`DecoderConfig`](crate::models::decoder::DecoderConfig)): the first is appended to
    /// every answer that does not end with one of them, and the end counts in the loss. Prompts count only with
    /// `learn_prompt`. The truncation and padding settings of the tokenizer's file are overridden; its
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
        Ok(Self { tokenizer, max_length, ends: ends.into_iter().collect(), learn_prompt })
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
        let encoding = tokenizer::ask(|| self.tokenizer.encode(text, true))?;
        Ok(self.tokens(&encoding, row.prompt.len(), 0).ids.len())
    }

    /// Encodes a prompt for generation, without the special tokens that some tokenizers add at the end of a
    /// text.
    ///
    /// # Errors
    /// If the tokenizer fails.
    pub fn prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = tokenizer::ask(|| self.tokenizer.encode_fast(prompt, true))?;
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
        let mut out = Encodings { rows: Vec::with_capacity(rows.len()), cut: 0, dropped: 0 };
        for (chunk, first) in rows.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
            let texts: Vec<String> =
                chunk.iter().map(|row| format!("{}{}", row.prompt, row.answer)).collect();
            let encodings = tokenizer::ask(|| self.tokenizer.encode_batch(texts, true))?;
            for ((encoding, prompted), row) in encodings.iter().zip(chunk).zip(first..) {
                let whole = self.tokens(encoding, prompted.prompt.len(), row);
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
        Ok(out)
    }

    /// The untruncated tokens of a row whose prompt has `prompt` bytes, with its end and the loss mask.
    fn tokens(&self, encoding: &Encoding, prompt: usize, row: usize) -> Tokens {
        let start = doubled_start(encoding);
        let mut ids = encoding.get_ids()[start..].to_vec();
        let own = encoding.get_offsets().iter().zip(encoding.get_special_tokens_mask()).skip(start);
        let of_answer = |(_, end): (usize, usize)| self.learn_prompt || end > prompt;
        let mut learnt: Vec<bool> =
            own.map(|(offsets, special)| *special == 0 && of_answer(*offsets)).collect();
        // Some tokenizers add an end token themselves, and texts that a chat template rendered have one.
        match (self.ends.first(), ids.last()) {
            (Some(_), Some(last)) if self.ends.contains(last) => learnt[ids.len() - 1] = true,
            (Some(end), _) => {
                ids.push(*end);
                learnt.push(true);
            }
            (None, _) => {}
        }
        Tokens { ids, learnt, row }
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
