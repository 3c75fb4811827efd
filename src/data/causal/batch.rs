//! Padded batches for a causal language model, with the positions and targets of the loss.

use candle_core::{Device, Tensor};

use super::tokens::Tokens;
use crate::error::{Error, Result};
use crate::ops::Rows;

/// Rows as tensors on one device: `b` rows of `t` tokens, `n` of which are targets of the loss.
#[derive(Debug, Clone)]
pub struct CausalBatch {
    /// [`Tokens::row`] of each row.
    pub rows: Vec<usize>,
    /// `(b, t)` of u32.
    pub input_ids: Tensor,
    /// `(b, t)` of u8, 1 on real tokens; always on the host, where a decoder reads it to pack the batch.
    pub attention_mask: Tensor,
    /// The `n` positions, in the flattened `(b * t)`, whose hidden states predict a target; each is one
    /// before its target. The shift happens here and nowhere else.
    pub positions: Rows,
    /// `(n)` of i64: the tokens to predict; always on the host, where the losses read them.
    pub targets: Tensor,
    /// The number of targets of each row.
    pub counts: Vec<usize>,
}

impl CausalBatch {
    /// Pads `rows` on the right with `pad_id` to the longest of them.
    ///
    /// # Errors
    /// If there is no row, or no token to predict.
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
            attention_mask: Tensor::from_vec(mask, (b, t), &Device::Cpu)?,
            positions: Rows::new(positions, b * t, device)?,
            targets: Tensor::from_vec(targets, n, &Device::Cpu)?,
            counts: rows.iter().map(|row| row.targets()).collect(),
        })
    }
}
