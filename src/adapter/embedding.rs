//! A model's word embedding, and the virtual tokens of prompt tuning in front of it.

use candle_core::{bail, DType, Tensor};

use crate::error::{Error, Result};
use crate::ops::{self, OpPath, Weight};

/// The word embedding of a model and, with prompt tuning, the embeddings of the virtual tokens that precede
/// every row.
///
/// In rows that are padded on the left, the padding at first lies between the virtual tokens and the text.
/// For models whose positions count columns, [`Self::after_padding`] moves the virtual tokens next to the
/// text.
#[derive(Debug)]
pub struct AdaptableEmbedding {
    words: Weight,          // (vocab, d)
    scale: Option<f64>,     // applies to words, not to virtual tokens
    prompt: Option<Tensor>, // (p, d)
}

impl AdaptableEmbedding {
    /// Creates an embedding from the table `words`, `(vocab, d)`, without virtual tokens.
    pub fn new(words: impl Into<Weight>) -> Self {
        Self { words: words.into(), scale: None, prompt: None }
    }

    /// Multiplies the embeddings of words by `scale`, in their own dtype (Gemma).
    pub fn scaled_by(self, scale: Option<f64>) -> Self {
        Self { scale, ..self }
    }

    /// The embedding table, `(vocab, d)`.
    pub fn words(&self) -> &Weight {
        &self.words
    }

    /// The number of virtual tokens.
    pub fn virtual_tokens(&self) -> usize {
        self.prompt.as_ref().map_or(0, |prompt| prompt.dims()[0])
    }

    /// Sets the virtual tokens, `(p, d)`, that precede every row; `None` removes them.
    ///
    /// # Errors
    /// If their width differs from that of the words.
    pub fn set_prompt(&mut self, prompt: Option<Tensor>) -> Result<()> {
        if let Some(prompt) = &prompt {
            let width = self.words.dims2()?.1;
            if prompt.rank() != 2 || prompt.dim(1)? != width {
                let reason = format!("expected virtual tokens (p, {width}), got {:?}", prompt.shape());
                return Err(Error::config("prompt", reason));
            }
        }
        self.prompt = prompt;
        Ok(())
    }

    /// Looks up the embeddings of tokens without virtual tokens, as for tokens that continue a row.
    ///
    /// # Shapes
    /// - `ids`: `(b, t)` of u32
    /// - output: `(b, t, d)`, the table's dtype
    ///
    /// # Errors
    /// If an id is outside the vocabulary.
    pub fn lookup(&self, ids: &Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        let words = self.words.lookup(ids, path)?;
        match self.scale {
            Some(scale) => words * scale,
            None => Ok(words),
        }
    }

    /// Computes the embeddings of whole rows, virtual tokens first.
    ///
    /// # Shapes
    /// - `ids`: `(b, t)` of u32
    /// - output: `(b, p + t, d)`, the table's dtype
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub fn forward(&self, ids: &Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        let words = self.lookup(ids, path)?;
        let Some(prompt) = &self.prompt else { return Ok(words) };
        let (p, d) = prompt.dims2()?;
        // Expanded before the cast to a narrower dtype, so that the gradients of the rows are summed in the
        // prompt's dtype.
        let prompt = prompt.unsqueeze(0)?.broadcast_as((ids.dim(0)?, p, d))?.to_dtype(words.dtype())?;
        Tensor::cat(&[&prompt, &words], 1)
    }

    /// Extends an attention mask `(b, t)` by the virtual tokens, to `(b, p + t)`.
    ///
    /// # Errors
    /// If the mask is not a matrix.
    pub fn extend_mask(&self, mask: &Tensor) -> candle_core::Result<Tensor> {
        match self.virtual_tokens() {
            0 => Ok(mask.clone()),
            p => {
                let real = Tensor::ones((mask.dims2()?.0, p), mask.dtype(), mask.device())?;
                Tensor::cat(&[&real, mask], 1)
            }
        }
    }

    /// Moves the virtual tokens of each row behind its left padding, directly before the first real token.
    /// Rows without left padding and rows of padding alone do not change.
    ///
    /// # Shapes
    /// - `rows`: `(b, p + t, ..)`, from [`Self::forward`] or [`Self::extend_mask`]
    /// - `mask`: `(b, t)`, nonzero on real tokens
    /// - output: as `rows`
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn after_padding(&self, rows: Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
        let p = self.virtual_tokens();
        let (b, t) = mask.dims2()?;
        if p == 0 || t == 0 {
            return Ok(rows);
        }
        if rows.rank() < 2 || rows.dims()[..2] != [b, p + t] {
            bail!(
                "attention mask {:?} does not fit {p} virtual tokens and rows {:?}",
                mask.dims(),
                rows.dims()
            );
        }
        let padding = left_padding(mask)?;
        // Only on the CPU: on a GPU, reading the value would synchronise, and the exchange is nearly free.
        if padding.device().is_cpu() && padding.max_all()?.to_scalar::<f32>()? == 0.0 {
            return Ok(rows);
        }
        let prompt = (padding.zeros_like()? + p as f64)?;
        let (there, back) = (exchange(&padding, &prompt, p + t)?, exchange(&prompt, &padding, p + t)?);
        let take = |rows: &Tensor, from: &Tensor| {
            rows.contiguous()?.flatten(0, 1)?.index_select(from, 0)?.reshape(rows.shape())
        };
        let moved = take(&rows.detach(), &there)?;
        // A permutation: the gradient is permuted back, and nothing has to be summed.
        ops::custom_vjp("after padding", [&rows], moved, move |call| Ok([Some(take(&call.grad, &back)?)]))
    }

    /// Checks that rows of `tokens` tokens, virtual ones included, do not exceed the model's maximum
    /// `longest`.
    ///
    /// # Errors
    /// If the rows are too long.
    pub fn check_length(&self, tokens: usize, longest: usize) -> Result<()> {
        if tokens <= longest {
            return Ok(());
        }
        let (among, or) = match self.virtual_tokens() {
            0 => (String::new(), ""),
            p => (format!(", {p} of them virtual,"), " or take fewer virtual tokens"),
        };
        let reason =
            format!("{tokens} tokens{among} are more than the model's {longest}: shorten the text{or}");
        Err(Error::config("max_length", reason))
    }
}

/// The number of columns before the first real token of each row, `(b, 1)`; 0 for a row without a real token.
/// Exact in f32, for which every backend implements the maximum.
fn left_padding(mask: &Tensor) -> candle_core::Result<Tensor> {
    let t = mask.dim(1)?;
    // The first real token has the largest distance to the end.
    let to_end = Tensor::arange_step(t as f32, 0f32, -1f32, mask.device())?;
    let most = mask.ne(0u8)?.to_dtype(DType::F32)?.broadcast_mul(&to_end)?.max_keepdim(1)?;
    (most.affine(-1.0, t as f64)? * most.ne(0f32)?.to_dtype(DType::F32)?)?.contiguous()
}

/// Source indices, `(b * n)` of u32, for flattened rows of `n` elements in which two leading blocks change
/// places. Afterwards each row begins with `first` elements of the second block, followed by `second`
/// elements of the first block; both are `(b, 1)`.
fn exchange(first: &Tensor, second: &Tensor, n: usize) -> candle_core::Result<Tensor> {
    let (b, device) = (first.dim(0)?, first.device());
    let columns = Tensor::arange(0f32, n as f32, device)?.unsqueeze(0)?; // (1, n)
    let below = |end: &Tensor| columns.broadcast_lt(end)?.to_dtype(DType::F32); // (b, n)
    let leading = below(first)?;
    let following = (below(&(first + second)?)? - &leading)?;
    let shift = (leading.broadcast_mul(second)? - following.broadcast_mul(first)?)?;
    let starts = Tensor::from_vec((0..b).map(|row| (row * n) as u32).collect(), (b, 1), device)?;
    shift.broadcast_add(&columns)?.to_dtype(DType::U32)?.broadcast_add(&starts)?.flatten_all()
}
