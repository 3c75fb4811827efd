//! Batches between the layers of a model, packed to their real tokens if that saves enough.

use candle_core::{Device, Tensor};

use crate::ops::{Mask, OpPath, Rows};

/// The layout of a batch between the layers of a model.
#[derive(Debug, Clone)]
pub struct PackedBatch {
    shape: (usize, usize), // (b, t)
    padding: Tensor,       // (b, t)
    real: Option<Rows>,
    /// The tokens (one per row) whose hidden states a layer has to compute; `None` for all.
    only: Option<Rows>,
}

impl PackedBatch {
    /// The layout of a batch of `shape` (b, t) in an encoder, with its attention mask (b, t), 1 on real tokens.
    ///
    /// # Errors
    /// If the mask cannot be read.
    pub fn new(shape: (usize, usize), attention_mask: &Tensor) -> candle_core::Result<Self> {
        let has_first_tokens = |rows: &Rows| {
            (0..shape.0).all(|row| rows.places().binary_search(&((row * shape.1) as u32)).is_ok())
        };
        // With less than a tenth of padding, the copies cost as much as they save.
        let real = real_tokens(shape, attention_mask, 9)?.filter(has_first_tokens);
        Ok(Self { real, ..Self::whole(shape, attention_mask) })
    }

    /// The layout of a batch of `shape` (b, t) in a decoder, whose hidden states are on `device`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_decoder(
        shape: (usize, usize),
        attention_mask: &Tensor,
        device: &Device,
    ) -> candle_core::Result<Self> {
        // With less than a fifth of padding, the copies take more memory than they save, for a tenth of the
        // time.
        let real = real_tokens(shape, attention_mask, 8)?;
        let there = |real: Rows| Rows::new(real.places().to_vec(), real.total(), device);
        Ok(Self { real: real.map(there).transpose()?, ..Self::whole(shape, attention_mask) })
    }

    /// The layout of a batch that is not packed.
    pub fn whole(shape: (usize, usize), attention_mask: &Tensor) -> Self {
        Self { shape, padding: attention_mask.clone(), real: None, only: None }
    }

    /// The same batch for a layer that has to compute only the first token of each row.
    ///
    /// # Errors
    /// If candle fails.
    pub fn of_first_tokens(self, device: &Device) -> candle_core::Result<Self> {
        Ok(Self { only: Some(self.first_tokens(device)?), ..self })
    }

    /// Rows and columns of the batch, (b, t).
    pub fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// The attention mask, 1 on real tokens, (b, t).
    pub fn padding(&self) -> &Tensor {
        &self.padding
    }

    /// The attention mask as a [`Mask`]: every query sees all real tokens.
    pub fn mask(&self) -> Mask {
        Mask { padding: Some(self.padding.clone()), ..Mask::default() }
    }

    /// The tokens (one per row) whose hidden states a layer has to compute; `None` for all.
    pub fn only(&self) -> Option<&Rows> {
        self.only.as_ref()
    }

    /// The indices of the first token of each row among the packed tokens.
    ///
    /// # Errors
    /// If candle fails.
    pub fn first_tokens(&self, device: &Device) -> candle_core::Result<Rows> {
        let (b, t) = self.shape;
        let at = (0..b).map(|row| (row * t) as u32);
        match &self.real {
            Some(real) => {
                let packed = at.map(|place| real.places().partition_point(|real| *real < place) as u32);
                Rows::new(packed.collect(), real.count(), device)
            }
            None => Rows::new(at.collect(), b * t, device),
        }
    }

    /// Packs (b, t, d) to (n, d), if the batch is packed.
    ///
    /// # Errors
    /// If the shape is not the batch's.
    pub fn pack(&self, xs: Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        match &self.real {
            Some(real) => real.take(&xs, path),
            None => Ok(xs),
        }
    }

    /// Unpacks (n, d), followed by `more` rows, to (b * t + more, d), zero on padding.
    ///
    /// # Errors
    /// If the shape is not the batch's.
    pub fn pad_rows(&self, xs: Tensor, more: usize, path: OpPath) -> candle_core::Result<Tensor> {
        match &self.real {
            Some(real) => real.followed_by(more)?.put(&xs, path),
            None => Ok(xs),
        }
    }

    /// Unpacks (n, d) to (b, t, d), zero on padding.
    ///
    /// # Errors
    /// If the shape is not the packed batch's.
    pub fn pad(&self, xs: Tensor, path: OpPath) -> candle_core::Result<Tensor> {
        let Some(real) = &self.real else { return Ok(xs) };
        let (b, t) = self.shape;
        real.put(&xs, path)?.reshape((b, t, ()))
    }
}

/// The real tokens of a batch, if they are at most so many tenths of all. `None` for a mask that is not on the host,
/// where reading it would stall a device.
fn real_tokens(shape: (usize, usize), mask: &Tensor, tenths: usize) -> candle_core::Result<Option<Rows>> {
    if !mask.device().is_cpu() || mask.dims() != [shape.0, shape.1] {
        return Ok(None);
    }
    let rows = Rows::of_mask(mask)?;
    let saves = rows.count() > 0 && 10 * rows.count() <= tenths * rows.total();
    Ok(Some(rows).filter(|_| saves))
}
