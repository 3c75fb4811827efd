//! The embeddings of an encoder: the sum of word, position and token-type embeddings, then norm and dropout.

use candle_core::{DType, Tensor, D};
use candle_nn::Init;

use crate::adapter::{AdaptableEmbedding, Context};
use crate::error::Result;
use crate::models::layers::Dropout;
use crate::models::packed::PackedBatch;
use crate::models::Weights;
use crate::noise::Noise;
use crate::ops::{self, LayerNorm};

/// How the tokens of a row are numbered for the position embeddings.
#[derive(Debug, Clone, Copy)]
pub enum PositionIds {
    /// By column, from zero.
    Columns,
    /// Real tokens are numbered from `first`; padding has the number `first - 1`.
    RealTokens {
        /// The id of padding.
        pad_id: u32,
        /// The first real token's number.
        first: u32,
    },
}

/// Names and sizes of [`Embeddings`].
#[derive(Debug)]
pub struct EmbeddingsShape<'a> {
    /// The path by which dropout noise is addressed.
    pub path: &'a str,
    /// The name of the table of word embeddings.
    pub words: &'static str,
    /// The number of token ids.
    pub vocab: usize,
    /// The width of the tables.
    pub width: usize,
    /// The number of positions and how they are counted; `None` for a family without position embeddings.
    pub positions: Option<(usize, PositionIds)>,
    /// The number of token types; `None` for a family without them.
    pub token_types: Option<usize>,
    /// The norm, loaded by the caller: its name and whether it has a bias differ between families.
    pub norm: LayerNorm,
    /// Dropout of the result, in training.
    pub dropout: f64,
    /// The standard deviation that new tables start with.
    pub init_std: f64,
    /// The longest sequence, in tokens.
    pub max_length: usize,
}

/// The embeddings, which compute the first layer's input.
#[derive(Debug)]
pub struct Embeddings {
    words: AdaptableEmbedding,
    positions: Option<(Tensor, PositionIds)>, // (max positions, d)
    token_types: Option<Tensor>,              // (types, d)
    norm: LayerNorm,
    dropout: Dropout,
    max_length: usize,
}

impl Embeddings {
    /// Loads the tables from `vb`.
    ///
    /// # Errors
    /// If a tensor is missing or of another shape.
    pub fn load(vb: &Weights, shape: EmbeddingsShape, noise: Noise) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: shape.init_std };
        let table = |name: &str, rows: usize| vb.pp(name).get_with_hints((rows, shape.width), "weight", init);
        let position = |(rows, ids)| candle_core::Result::Ok((table("position_embeddings", rows)?, ids));
        let types = |rows| table("token_type_embeddings", rows);
        Ok(Self {
            words: AdaptableEmbedding::new(vb.pp(shape.words).table((shape.vocab, shape.width), init)?),
            positions: shape.positions.map(position).transpose()?,
            token_types: shape.token_types.map(types).transpose()?,
            dropout: Dropout::new(shape.dropout, noise, shape.path),
            norm: shape.norm,
            max_length: shape.max_length,
        })
    }

    /// The word embedding, which may have virtual tokens.
    pub fn words(&self) -> &AdaptableEmbedding {
        &self.words
    }

    /// The word embedding, mutably.
    pub fn words_mut(&mut self) -> &mut AdaptableEmbedding {
        &mut self.words
    }

    /// Computes the first layer's input, packed if that saves time, and the layout of the batch.
    ///
    /// # Shapes
    /// - `ids`, `types`: `(b, t)` of u32; `types` all zero where absent
    /// - `mask`: `(b, t)` of u8, 1 on real tokens
    /// - output: `(n, width)` for `n` real tokens, or `(b, p + t, width)` with `p` virtual tokens if not
    ///   packed
    ///
    /// # Errors
    /// If shapes differ, or the sequence is longer than the model's.
    pub fn embed(
        &self,
        ids: &Tensor,
        types: Option<&Tensor>,
        mask: &Tensor,
        cx: &Context,
    ) -> candle_core::Result<(Tensor, PackedBatch)> {
        let embedded = self.forward(ids, types, cx)?; // (b, p + t, d)
        let (b, t, _) = embedded.dims3()?;
        let batch = PackedBatch::new((b, t), &self.words.extend_mask(mask)?)?;
        Ok((batch.pack(embedded, cx.path)?, batch))
    }

    /// Removes the virtual tokens from hidden states (b, p + t, d).
    ///
    /// # Errors
    /// If candle fails.
    pub fn without_virtual(&self, xs: Tensor) -> candle_core::Result<Tensor> {
        match self.words.virtual_tokens() {
            0 => Ok(xs),
            p => xs.narrow(1, p, xs.dim(1)? - p),
        }
    }

    fn forward(&self, ids: &Tensor, types: Option<&Tensor>, cx: &Context) -> candle_core::Result<Tensor> {
        let (_, t) = ids.dims2()?;
        let p = self.words.virtual_tokens();
        self.words.check_length(p + t, self.max_length)?;
        let mut sum = self.words.forward(ids, cx.path)?; // (b, p + t, d)
        if let Some((table, numbering)) = &self.positions {
            let positions = ops::embedding(&self.position_ids(ids, *numbering)?, table, cx.path)?;
            sum = sum.broadcast_add(&positions)?;
        }
        if let Some(table) = &self.token_types {
            let types = match types {
                Some(types) => ops::embedding(&types.pad_with_zeros(1, p, 0)?, table, cx.path)?,
                None => table.narrow(0, 0, 1)?.unsqueeze(0)?, // (1, 1, d)
            };
            sum = sum.broadcast_add(&types)?;
        }
        self.dropout.forward(&self.norm.forward_on(&sum, cx.path)?, cx)
    }

    /// The position ids, `(b, p + t)` or `(1, p + t)` of u32, virtual tokens first.
    fn position_ids(&self, ids: &Tensor, numbering: PositionIds) -> candle_core::Result<Tensor> {
        let (p, t) = (self.words.virtual_tokens() as u32, ids.dim(1)? as u32);
        match numbering {
            PositionIds::Columns => Tensor::arange(0, p + t, ids.device())?.unsqueeze(0),
            PositionIds::RealTokens { pad_id, first } => {
                // In f32, which is exact for such small numbers, because not every backend sums integers.
                let real = ids.ne(pad_id)?.to_dtype(DType::F32)?;
                let (b, before) = (ids.dim(0)?, f64::from(first - 1));
                let own =
                    ((((real.cumsum(D::Minus1)? + f64::from(p))? * real)? + before)?).to_dtype(DType::U32)?;
                if p == 0 {
                    return Ok(own);
                }
                let virtual_ids = Tensor::arange(first, first + p, ids.device())?;
                Tensor::cat(&[&virtual_ids.unsqueeze(0)?.broadcast_as((b, p as usize))?, &own], 1)
            }
        }
    }
}
