//! From prompts and answers to token ids.

use tokenizers::{Encoding, Tokenizer};

use super::tokens::{windows, Tokens};
use crate::data::instruct::Prompted;
use crate::data::tokenizer;
use crate::error::{Error, Result};

/// Texts handed to the tokenizer at once: bounds the memory its own, richer encodings take.
const CHUNK: usize = 1024;

/// The rows that were encoded, and how many were cut or left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encodings {
    /// The rows with something to learn.
    pub rows: Vec<Tokens>,
    /// How many of them were cut at `max_length`.
    pub cut: usize,
    /// How many were left out, because the cut took their whole answer.
    pub dropped: usize,
}

/// A tokenizer with a rule of what is learnt.
#[derive(Debug, Clone)]
pub struct PromptEncoder {
    tokenizer: Tokenizer,
    max_length: usize,
    eos: Option<u32>,
    learn_prompt: bool,
}

impl PromptEncoder {
    /// An encoder to at most `max_length` tokens. `eos` follows every whole answer and is learnt;
    /// prompts are given, and learnt only with `learn_prompt`. Any truncation and padding of the
    /// tokenizer's own file is overridden; its post-processor still places the special tokens.
    ///
    /// # Errors
    /// If `max_length` is below 2 or above `model_max_length`.
    pub fn new(
        mut tokenizer: Tokenizer,
        max_length: usize,
        model_max_length: usize,
        eos: Option<u32>,
        learn_prompt: bool,
    ) -> Result<Self> {
        if !(2..=model_max_length).contains(&max_length) {
            let reason = format!("expected 2 to the model's {model_max_length}, got {max_length}");
            return Err(Error::config("max_length", reason));
        }
        tokenizer
            .with_truncation(None)
            .map_err(|e| Error::config("max_length", e.to_string()))?
            .with_padding(None);
        Ok(Self { tokenizer, max_length, eos, learn_prompt })
    }

    /// The tokenizer, without truncation and padding.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The most tokens of a row.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The tokens of a row before it is cut, the one that ends an answer among them.
    ///
    /// # Errors
    /// If the tokenizer refuses the text.
    pub fn length(&self, row: &Prompted) -> Result<usize> {
        let text = format!("{}{}", row.prompt, row.answer);
        let encoding = tokenizer::ask(|| self.tokenizer.encode(text, true))?;
        Ok(self.tokens(&encoding, row.prompt.len(), 0).ids.len())
    }

    /// The ids of a prompt alone, as generation continues it: without the special tokens that some
    /// tokenizers end a text with.
    ///
    /// # Errors
    /// If the tokenizer refuses the text.
    pub fn prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = tokenizer::ask(|| self.tokenizer.encode_fast(prompt, true))?;
        let (ids, special) = (encoding.get_ids(), encoding.get_special_tokens_mask());
        // Of an empty text the special tokens are all there is.
        let end = special.iter().rposition(|special| *special == 0).map_or(ids.len(), |last| last + 1);
        Ok(ids[doubled_start(&encoding)..end].to_vec())
    }

    /// The same for answers that are scored: without the token that ends one, and without their prompt even where
    /// training learns it.
    pub fn of_answers(&self) -> Self {
        Self { eos: None, learn_prompt: false, ..self.clone() }
    }

    /// Encodes every row, in order and in parallel. Prompt and answer are one text to the
    /// tokenizer; a token that reaches into the answer belongs to it. Rows longer than `max_length`
    /// lose their end; those without a prompt, which are mere text, become several, each beginning
    /// with the last token of the one before, so that every token is learnt once. A text that begins with the
    /// tokenizer's own first special token (rendered by a chat template, say) gets no second one.
    ///
    /// # Errors
    /// If the tokenizer refuses a text.
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

    /// A row of any length, whose prompt has `prompt` bytes.
    fn tokens(&self, encoding: &Encoding, prompt: usize, row: usize) -> Tokens {
        let start = doubled_start(encoding);
        let mut ids = encoding.get_ids()[start..].to_vec();
        let own = encoding.get_offsets().iter().zip(encoding.get_special_tokens_mask()).skip(start);
        let of_answer = |(_, end): (usize, usize)| self.learn_prompt || end > prompt;
        let mut learnt: Vec<bool> =
            own.map(|(offsets, special)| *special == 0 && of_answer(*offsets)).collect();
        // Some tokenizers end a text themselves.
        match (self.eos, ids.last()) {
            (Some(eos), Some(last)) if *last == eos => learnt[ids.len() - 1] = true,
            (Some(eos), _) => {
                ids.push(eos);
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
