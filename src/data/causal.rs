//! From prompts and answers to batches of a language model.

use candle_core::{Device, Tensor};
use tokenizers::{Encoding, Tokenizer};

use super::instruct::Prompted;
use super::tokenizer;
use crate::error::{Error, Result};

/// Texts handed to the tokenizer at once: bounds the memory its own, richer encodings take.
const CHUNK: usize = 1024;

/// A text as token ids, with what of it is to be learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// The ids, the first of a text included; never empty.
    pub ids: Vec<u32>,
    /// Whether each id is to be predicted from those before it, as long as `ids`.
    pub learnt: Vec<bool>,
    /// Which row this is, counted from 0; of packed rows the first.
    pub row: usize,
}

impl Tokens {
    /// The number of ids that are predicted: the first has nothing before it.
    pub fn targets(&self) -> usize {
        self.learnt.iter().skip(1).filter(|learnt| **learnt).count()
    }

    /// All that the row says, as numbers: for a checksum of the data.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        let learnt = self.learnt.iter().map(|learnt| u32::from(*learnt));
        self.ids.iter().copied().chain(learnt).chain([u32::MAX])
    }
}

/// The rows that were encoded, and what became of the others.
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
        Ok(ids[..end].to_vec())
    }

    /// The same without the token that ends an answer: what is scored is the answer alone.
    pub fn without_eos(&self) -> Self {
        Self { eos: None, ..self.clone() }
    }

    /// Encodes every row, in order and in parallel. Prompt and answer are one text to the
    /// tokenizer; a token that reaches into the answer belongs to it. Rows longer than `max_length`
    /// lose their end; those without a prompt, which are mere text, become several, each beginning
    /// with the last token of the one before, so that every token is learnt once.
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
        let mut ids = encoding.get_ids().to_vec();
        let own = encoding.get_offsets().iter().zip(encoding.get_special_tokens_mask());
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

/// A text in pieces of at most `max_length` tokens that overlap by one; those with nothing to learn
/// are left out.
fn windows(text: Tokens, max_length: usize) -> impl Iterator<Item = Tokens> {
    let starts = (0..text.ids.len().saturating_sub(1)).step_by(max_length - 1);
    starts
        .map(move |start| {
            let piece = start..(start + max_length).min(text.ids.len());
            Tokens {
                ids: text.ids[piece.clone()].to_vec(),
                learnt: text.learnt[piece].to_vec(),
                row: text.row,
            }
        })
        .filter(|tokens| tokens.targets() > 0)
}

/// Puts rows one after the other into sequences of at most `max_length` tokens, in their order: less
/// padding. A row is never split, but it does see those before it in its sequence, and its
/// positions go on from theirs; its first token is given, not learnt.
pub fn pack(rows: &[Tokens], max_length: usize) -> Vec<Tokens> {
    let mut packed: Vec<Tokens> = Vec::new();
    for row in rows {
        match packed.last_mut() {
            Some(last) if last.ids.len() + row.ids.len() <= max_length => {
                last.ids.extend(&row.ids);
                last.learnt.push(false);
                last.learnt.extend(row.learnt.iter().skip(1));
            }
            _ => packed.push(row.clone()),
        }
    }
    packed
}

/// Rows as tensors on one device: `b` rows of `t` tokens, `n` of which are to be predicted.
#[derive(Debug, Clone)]
pub struct CausalBatch {
    /// [`Tokens::row`] of each row.
    pub rows: Vec<usize>,
    /// `(b, t)` of u32.
    pub input_ids: Tensor,
    /// `(b, t)` of u8, 1 on real tokens.
    pub attention_mask: Tensor,
    /// `(n)` of u32: the places, in the flattened `(b * t)`, whose hidden states predict; each is
    /// one before the token that it predicts. This is the one place that shifts.
    pub positions: Tensor,
    /// `(n)` of i64: the tokens to predict; on the host, where losses look at them.
    pub targets: Tensor,
    /// `n` of each row, in their order.
    pub counts: Vec<usize>,
}

impl CausalBatch {
    /// Pads `rows` on the right with `pad_id` to the longest of them.
    ///
    /// # Errors
    /// If there is no row, or nothing to predict.
    pub fn collate(rows: &[&Tokens], pad_id: u32, device: &Device) -> Result<Self> {
        let (b, t) = (rows.len(), rows.iter().map(|row| row.ids.len()).max().unwrap_or(0));
        let (mut ids, mut mask) = (vec![pad_id; b * t], vec![0u8; b * t]);
        let (mut positions, mut targets) = (Vec::new(), Vec::new());
        for (r, row) in rows.iter().enumerate() {
            for (c, (&id, &learnt)) in row.ids.iter().zip(&row.learnt).enumerate() {
                (ids[r * t + c], mask[r * t + c]) = (id, 1);
                if learnt && c > 0 {
                    positions.push((r * t + c - 1) as u32);
                    targets.push(i64::from(id));
                }
            }
        }
        let n = targets.len();
        if n == 0 {
            return Err(Error::config("batch", format!("{b} rows have no token to predict")));
        }
        Ok(Self {
            rows: rows.iter().map(|row| row.row).collect(),
            input_ids: Tensor::from_vec(ids, (b, t), device)?,
            attention_mask: Tensor::from_vec(mask, (b, t), device)?,
            positions: Tensor::from_vec(positions, n, device)?,
            targets: Tensor::from_vec(targets, n, &Device::Cpu)?,
            counts: rows.iter().map(|row| row.targets()).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::models::wordlevel::WordLevel;
    use tokenizers::pre_tokenizers::whitespace::Whitespace;
    use tokenizers::processors::template::TemplateProcessing;

    /// `<s>` 0, `</s>` 1, `?` 2, then `a` 3 to `h` 10; a text begins with `<s>`.
    fn tiny() -> Tokenizer {
        let words = ["<s>", "</s>", "?", "a", "b", "c", "d", "e", "f", "g", "h"];
        let vocab = words.iter().enumerate().map(|(id, word)| (word.to_string(), id as u32)).collect();
        let model = WordLevel::builder().vocab(vocab).unk_token("?".into()).build().unwrap();
        let template = TemplateProcessing::builder()
            .try_single("<s> $A")
            .unwrap()
            .special_tokens(vec![("<s>", 0)])
            .build()
            .unwrap();
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(Whitespace {})).with_post_processor(Some(template));
        tokenizer
    }

    fn row(prompt: &str, answer: &str) -> Prompted {
        Prompted { prompt: prompt.into(), answer: answer.into(), ..Prompted::default() }
    }

    fn encode(max_length: usize, learn_prompt: bool, rows: &[Prompted]) -> Encodings {
        PromptEncoder::new(tiny(), max_length, 64, Some(1), learn_prompt).unwrap().encode(rows).unwrap()
    }

    #[test]
    fn the_answer_and_its_end_are_learnt_and_the_prompt_is_given() {
        let out = encode(10, false, &[row("a b", " c"), row("", "d e")]);
        assert_eq!(out.rows[0].ids, [0, 3, 4, 5, 1]);
        assert_eq!(out.rows[0].learnt, [false, false, false, true, true]);
        assert_eq!(out.rows[1].learnt, [false, true, true, true]);
        assert_eq!((out.cut, out.dropped, out.rows[1].targets()), (0, 0, 3));
        let all = encode(10, true, &[row("a b", " c")]);
        assert_eq!(all.rows[0].learnt, [false, true, true, true, true]);
        assert_eq!(
            PromptEncoder::new(tiny(), 10, 64, None, false).unwrap().prompt("a b").unwrap(),
            [0, 3, 4]
        );
    }

    #[test]
    fn a_cut_is_counted_and_a_lost_answer_leaves_the_row_out() {
        let out = encode(
            4,
            false,
            &[row("a", " b"), row("a b", " c d"), row("a b c", " d"), row("a b c d e", " f")],
        );
        assert_eq!((out.rows.len(), out.cut, out.dropped), (2, 1, 2));
        assert_eq!((out.rows[1].ids.as_slice(), out.rows[1].row), (&[0, 3, 4, 5][..], 1));
        for bad in [1, 65] {
            let error = PromptEncoder::new(tiny(), bad, 64, None, false).unwrap_err().to_string();
            assert!(error.contains("max_length"), "{error}");
        }
    }

    #[test]
    fn a_prompt_goes_on_where_a_tokenizer_would_end_it() -> Result<()> {
        let mut tokenizer = tiny();
        let ended = TemplateProcessing::builder()
            .try_single("<s> $A </s>")
            .unwrap()
            .special_tokens(vec![("<s>", 0), ("</s>", 1)])
            .build()
            .unwrap();
        tokenizer.with_post_processor(Some(ended));
        let encoder = PromptEncoder::new(tokenizer, 10, 64, Some(1), false)?;
        assert_eq!(encoder.prompt("a b")?, [0, 3, 4]);
        assert_eq!(encoder.encode(&[row("a", " b")])?.rows[0].ids, [0, 3, 4, 1]);
        Ok(())
    }

    #[test]
    fn a_long_text_becomes_pieces_and_each_of_its_tokens_is_learnt_once() -> Result<()> {
        let encode = |max_length| {
            PromptEncoder::new(tiny(), max_length, 20, Some(1), false)?.encode(&[row("", "a b c d e f g h")])
        };
        let whole = encode(10)?.rows.swap_remove(0).ids;
        assert_eq!(whole, [0, 3, 4, 5, 6, 7, 8, 9, 10, 1]);
        for (max_length, pieces) in [(4, 3), (3, 5), (9, 2), (10, 1), (2, 9)] {
            let encoded = encode(max_length)?;
            assert_eq!((encoded.rows.len(), encoded.cut, encoded.dropped), (pieces, 0, 0));
            let mut learnt = encoded.rows[0].ids[..1].to_vec();
            for tokens in &encoded.rows {
                assert!(tokens.ids.len() <= max_length && tokens.row == 0);
                assert_eq!(tokens.targets(), tokens.ids.len() - 1);
                assert_eq!(learnt.last(), tokens.ids.first());
                learnt.extend(&tokens.ids[1..]);
            }
            assert_eq!(learnt, whole);
        }
        Ok(())
    }

    #[test]
    fn packing_fills_sequences_and_loses_nothing_but_first_tokens() {
        let rows = encode(10, false, &[row("a", " b"), row("c", " d"), row("e", " f"), row("g", " h")]).rows;
        let packed = pack(&rows, 9);
        assert_eq!(
            packed.iter().map(|p| (p.ids.len(), p.targets(), p.row)).collect::<Vec<_>>(),
            [(8, 4, 0), (8, 4, 2)]
        );
        assert_eq!(packed[0].ids, [0, 3, 4, 1, 0, 5, 6, 1]);
        assert_eq!(packed[0].learnt[4..], [false, false, true, true]);
        assert_eq!(pack(&rows, 3).len(), 4); // what is too long stands alone
    }

    #[test]
    fn a_batch_points_at_the_places_before_its_targets() -> Result<()> {
        let rows = encode(10, false, &[row("a b", " c"), row("d", " e f g")]).rows;
        let batch = CausalBatch::collate(&rows.iter().collect::<Vec<_>>(), 1, &Device::Cpu)?;
        assert_eq!(batch.input_ids.to_vec2::<u32>()?, [[0, 3, 4, 5, 1, 1], [0, 6, 7, 8, 9, 1]]);
        assert_eq!(batch.attention_mask.to_vec2::<u8>()?, [[1, 1, 1, 1, 1, 0], [1; 6]]);
        assert_eq!(batch.positions.to_vec1::<u32>()?, [2, 3, 7, 8, 9, 10]);
        assert_eq!(batch.targets.to_vec1::<i64>()?, [5, 1, 7, 8, 9, 1]);
        assert_eq!(batch.counts, [2, 4]);
        assert!(CausalBatch::collate(&[], 0, &Device::Cpu).is_err());
        Ok(())
    }
}
