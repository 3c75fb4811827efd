//! The place where tokens become vectors: a model's word embedding, and the virtual tokens before it.

use candle_core::{Tensor, D};

use crate::error::{Error, Result};
use crate::ops;

/// The word embedding of a model and, under prompt tuning, the embeddings of virtual tokens that stand
/// before those of every row.
#[derive(Debug)]
pub struct EmbeddingSlot {
    words: Tensor,          // (vocab, d)
    prompt: Option<Tensor>, // (p, d)
}

impl EmbeddingSlot {
    /// The table `words` of shape `(vocab, d)`, without virtual tokens.
    pub fn new(words: Tensor) -> Self {
        Self { words, prompt: None }
    }

    /// The table, `(vocab, d)`.
    pub fn words(&self) -> &Tensor {
        &self.words
    }

    /// How many virtual tokens there are.
    pub fn virtual_tokens(&self) -> usize {
        self.prompt.as_ref().map_or(0, |prompt| prompt.dims()[0])
    }

    /// Puts virtual tokens, `(p, d)`, before every row, or takes them away.
    ///
    /// # Errors
    /// If they are not as wide as the words.
    pub fn set_prompt(&mut self, prompt: Option<Tensor>) -> Result<()> {
        if let Some(prompt) = &prompt {
            let width = self.words.dim(D::Minus1)?;
            if prompt.rank() != 2 || prompt.dim(1)? != width {
                let reason = format!("expected virtual tokens (p, {width}), got {:?}", prompt.shape());
                return Err(Error::config("prompt", reason));
            }
        }
        self.prompt = prompt;
        Ok(())
    }

    /// The embeddings of words alone: of tokens that continue a row.
    ///
    /// # Shapes
    /// - `ids`: `(b, t)` of u32
    /// - output: `(b, t, d)`, the table's dtype
    ///
    /// # Errors
    /// If an id is outside the vocabulary.
    pub fn lookup(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        ops::embedding(ids, &self.words)
    }

    /// The embeddings of whole rows, virtual tokens first.
    ///
    /// # Shapes
    /// - `ids`: `(b, t)` of u32
    /// - output: `(b, p + t, d)`, the table's dtype
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let words = self.lookup(ids)?;
        let Some(prompt) = &self.prompt else { return Ok(words) };
        let (p, d) = prompt.dims2()?;
        let prompt = prompt.to_dtype(words.dtype())?.unsqueeze(0)?.broadcast_as((ids.dim(0)?, p, d))?;
        Tensor::cat(&[&prompt, &words], 1)
    }

    /// An attention mask `(b, t)` for rows with their virtual tokens, `(b, p + t)`.
    ///
    /// # Errors
    /// If it is no matrix.
    pub fn extend_mask(&self, mask: &Tensor) -> candle_core::Result<Tensor> {
        match self.virtual_tokens() {
            0 => Ok(mask.clone()),
            p => {
                let real = Tensor::ones((mask.dims2()?.0, p), mask.dtype(), mask.device())?;
                Tensor::cat(&[&real, mask], 1)
            }
        }
    }
}
