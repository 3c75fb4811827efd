//! Batches between the layers of an encoder, packed to their real tokens if that saves enough.

use candle_core::{Device, Tensor};

use crate::ops::{Mask, OpPath, Rows};

/// The layout of a batch between the layers of an encoder.
#[derive(Debug, Clone)]
pub struct PackedBatch {
    shape: (usize, usize), // (b, t)
    padding: Tensor,       // (b, t)
    real: Option<Rows>,
    /// The tokens (one per row) whose hidden states a layer has to compute; `None` for all.
    only: Option<Rows>,
}

impl PackedBatch {
    /// The layout of a batch of `shape` (b, t) with its attention mask (b, t), 1 on real tokens.
    ///
    /// # Errors
    /// If the mask cannot be read.
    pub fn new(shape: (usize, usize), attention_mask: &Tensor) -> candle_core::Result<Self> {
        let mut real = None;
        // On a GPU, reading the mask would stall the device.
        if attention_mask.device().is_cpu() && attention_mask.dims() == [shape.0, shape.1] {
            let rows = Rows::of_mask(attention_mask)?;
            let has_first_tokens =
                (0..shape.0).all(|row| rows.places().binary_search(&((row * shape.1) as u32)).is_ok());
            // With less than a tenth of padding, the copies cost as much as they save.
            let saves = (1..=rows.total() * 9 / 10).contains(&rows.count());
            real = Some(rows).filter(|_| saves && has_first_tokens);
        }
        Ok(Self { shape, padding: attention_mask.clone(), real, only: None })
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
