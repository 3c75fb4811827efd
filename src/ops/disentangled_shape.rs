//! The sizes of a disentangled attention, and the conversion of its tensors to heads.

use candle_core::{bail, Result, Tensor};

use super::attention_mask::Shape;

/// The sizes of one call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Positioned {
    /// The sizes of the attention itself.
    pub content: Shape,
    /// The number of relative positions, `m`.
    pub positions: usize,
}

impl Positioned {
    pub fn new(q: &Tensor, k: &Tensor, v: &Tensor, rows: &[u32], heads: usize) -> Result<Self> {
        let (b, tk, width) = v.dims3()?;
        let ((queries, q_width), (keys, k_width)) = (q.dims2()?, k.dims2()?);
        let positions = keys.saturating_sub(b * tk);
        let all = queries.saturating_sub(positions);
        if b == 0 || heads == 0 || !width.is_multiple_of(heads) || width == 0 || positions == 0 {
            bail!("attention: v {:?} and k {:?} do not fit {heads} heads and positions", v.dims(), k.dims());
        }
        let tq = all / b;
        if !all.is_multiple_of(b) || tq > tk || q_width != width || k_width != width {
            bail!("attention: q {:?}, k {:?}, v {:?} do not fit", q.dims(), k.dims(), v.dims());
        }
        let last = rows.iter().max().map_or(0, |row| *row as usize);
        if rows.len() + 1 != 2 * tk || last >= positions {
            bail!(
                "attention: {} distances with rows up to {last} do not fit {tk} keys and {positions} positions",
                rows.len()
            );
        }
        let content = Shape { b, tq, tk, heads, kv_heads: heads, dim: width / heads };
        Ok(Self { content, positions })
    }

    /// The row of positions for each pair of a query and a key, `(tq, tk)` of u32.
    pub fn index(&self, rows: &[u32], beside: &Tensor) -> Result<Tensor> {
        let Shape { tq, tk, .. } = self.content;
        let index: Vec<u32> = (0..tq).flat_map(|i| (0..tk).map(move |j| rows[i + tk - 1 - j])).collect();
        Tensor::from_vec(index, (tq, tk), beside.device())
    }

    /// Splits a projection into heads: the `t` tokens in each row of the batch, `(b, heads, t, dim)`, and the
    /// positions, `(b, heads, m, dim)`, repeated for each row of the batch.
    pub fn split(&self, x: &Tensor, t: usize) -> Result<(Tensor, Tensor)> {
        let Shape { b, heads, dim, .. } = self.content;
        let content = x.narrow(0, 0, b * t)?.reshape((b, t, heads, dim))?.transpose(1, 2)?.contiguous()?;
        let positions = x.narrow(0, b * t, self.positions)?.reshape((1, self.positions, heads, dim))?;
        let positions = positions.transpose(1, 2)?.broadcast_as((b, heads, self.positions, dim))?;
        Ok((content, positions.contiguous()?))
    }

    /// `(b, t, heads * dim)` as heads, `(b, heads, t, dim)`.
    pub fn split_values(&self, x: &Tensor, t: usize) -> Result<Tensor> {
        let Shape { b, heads, dim, .. } = self.content;
        x.reshape((b, t, heads, dim))?.transpose(1, 2)?.contiguous()
    }

    /// `(b, heads, t, dim)` as `(b, t, heads * dim)`.
    pub fn join(&self, x: &Tensor) -> Result<Tensor> {
        let (b, heads, t, dim) = x.dims4()?;
        x.transpose(1, 2)?.reshape((b, t, heads * dim))
    }

    /// The transpose of [`Self::split`]: the positions are summed over the batch.
    pub fn unsplit(&self, content: &Tensor, positions: &Tensor) -> Result<Tensor> {
        let content = self.join(content)?.flatten_to(1)?;
        Tensor::cat(&[&content, &self.join(&positions.sum_keepdim(0)?)?.squeeze(0)?], 0)
    }
}

/// Expands `index` (rows, columns) for a gather along the last dimension of (b, heads, rows, m).
pub(super) fn spread(index: &Tensor, b: usize, heads: usize) -> Result<Tensor> {
    let (rows, columns) = index.dims2()?;
    index.broadcast_as((b, heads, rows, columns))?.contiguous()
}
