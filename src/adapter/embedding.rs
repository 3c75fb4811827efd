//! The place where tokens become vectors: a model's word embedding, and the virtual tokens before it.

use candle_core::{bail, DType, Tensor};

use crate::error::{Error, Result};
use crate::ops::{self, OpPath, Weight};

/// The word embedding of a model and, under prompt tuning, the embeddings of virtual tokens that stand
/// before those of every row.
///
/// Padding on the left stands between the two at first. Where a model's positions count columns,
/// [`Self::after_padding`] brings them together.
#[derive(Debug)]
pub struct AdaptableEmbedding {
    words: Weight,          // (vocab, d)
    scale: Option<f64>,     // of words, not of virtual tokens
    prompt: Option<Tensor>, // (p, d)
}

impl AdaptableEmbedding {
    /// The table `words` of shape `(vocab, d)`, without virtual tokens.
    pub fn new(words: impl Into<Weight>) -> Self {
        Self { words: words.into(), scale: None, prompt: None }
    }

    /// The same with words' embeddings multiplied by `scale`, in their own dtype (Gemma).
    pub fn scaled_by(self, scale: Option<f64>) -> Self {
        Self { scale, ..self }
    }

    /// The table, `(vocab, d)`.
    pub fn words(&self) -> &Weight {
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
            let width = self.words.dims2()?.1;
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
    pub fn lookup(&self, ids: &Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        let words = self.words.lookup(ids, path)?;
        match self.scale {
            Some(scale) => words * scale,
            None => Ok(words),
        }
    }

    /// The embeddings of whole rows, virtual tokens first.
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
        // Repeated before it is rounded: the gradients of the rows are then summed in the prompt's dtype.
        let prompt = prompt.unsqueeze(0)?.broadcast_as((ids.dim(0)?, p, d))?.to_dtype(words.dtype())?;
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

    /// Moves the virtual tokens of each row behind the padding on its left, directly before its first
    /// real token. Rows without such padding, and those of padding alone, stay as they are.
    ///
    /// # Shapes
    /// - `rows`: `(b, p + t, ..)`, what [`Self::forward`] or [`Self::extend_mask`] made
    /// - `mask`: `(b, t)`, not 0 on real tokens
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
        // On a GPU, to read it would hold everything up; there the exchange costs next to nothing.
        if padding.device().is_cpu() && padding.max_all()?.to_scalar::<f32>()? == 0.0 {
            return Ok(rows);
        }
        let prompt = (padding.zeros_like()? + p as f64)?;
        let (there, back) = (exchange(&padding, &prompt, p + t)?, exchange(&prompt, &padding, p + t)?);
        let take = |rows: &Tensor, from: &Tensor| {
            rows.contiguous()?.flatten(0, 1)?.index_select(from, 0)?.reshape(rows.shape())
        };
        let moved = take(&rows.detach(), &there)?;
        // Every element goes to one place: the gradient is taken from there, and nothing is summed.
        ops::custom_vjp("after padding", [&rows], moved, move |call| Ok([Some(take(&call.grad, &back)?)]))
    }

    /// Whether rows of so many tokens, virtual ones among them, are within a model's longest.
    ///
    /// # Errors
    /// If they are not.
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

/// How many columns before the first real token of each row, `(b, 1)`; 0 of a row that has none. In
/// f32, exactly, where every backend has a maximum.
fn left_padding(mask: &Tensor) -> candle_core::Result<Tensor> {
    let t = mask.dim(1)?;
    // The first real token has the most columns from itself to the end.
    let to_end = Tensor::arange_step(t as f32, 0f32, -1f32, mask.device())?;
    let most = mask.ne(0u8)?.to_dtype(DType::F32)?.broadcast_mul(&to_end)?.max_keepdim(1)?;
    (most.affine(-1.0, t as f64)? * most.ne(0f32)?.to_dtype(DType::F32)?)?.contiguous()
}

/// Where the elements of flattened rows of `n` come from, `(b * n)` of u32, when two blocks at the
/// beginning of each row change places: `first`, `(b, 1)`, is how many elements the one has that comes
/// first afterwards, `second` those of the other.
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
