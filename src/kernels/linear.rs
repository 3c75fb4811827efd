//! Kernels around the matrix products of linear layers on a CUDA device: biases, and adapters
//! split into bf16 parts.

use std::ops::Range;

use candle_core::{DType, Result, Shape, Tensor};

use super::launch::{address, count, device_of, empty, launch, narrow, some_rows, spread};

/// A tensor of `shape (.., dim)` whose every row is the bias `(dim)`.
///
/// # Errors
/// Unless the kernels support the bias ([`super::supports_all`]).
pub(crate) fn bias_rows(bias: &Tensor, shape: &Shape) -> Result<Tensor> {
    let (device, bias) = (device_of(bias)?, bias.contiguous()?);
    let ys = empty(device, shape, bias.dtype())?;
    let (dim, narrow) = (count(bias.elem_count())?, narrow(&bias));
    let rows = count(shape.elem_count() / bias.elem_count().max(1))?;
    let (from, to) = (address(device, &bias, bias.dtype())?, address(device, &ys, bias.dtype())?);
    launch!(device; some_rows(rows); bias_rows(&rows, &dim, &narrow, &from, &to));
    Ok(ys)
}

/// The layout of f32 matrices split into bf16 parts. The rank is padded to `padded`; if there is a bias to
/// add, `lead` columns precede the parts of B and those of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SplitLayout {
    pub rank: usize,
    pub padded: usize,
    pub lead: usize,
}

impl SplitLayout {
    /// Creates a layout with columns in multiples of eight, as tensor cores require.
    pub fn new(rank: usize, biased: bool) -> Self {
        Self { rank, padded: rank.next_multiple_of(8), lead: if biased { 8 } else { 0 } }
    }

    /// The layout without leading columns, for A and what it is multiplied by.
    pub fn unled(self) -> Self {
        Self { lead: 0, ..self }
    }

    /// The columns, or rows, of a factor that hold all three parts.
    pub fn whole(&self) -> Range<usize> {
        self.lead + self.padded..self.lead + 4 * self.padded
    }

    /// The columns, or rows, of a factor that are multiplied by a product's parts.
    pub fn facing(&self) -> Range<usize> {
        0..self.lead + 3 * self.padded
    }

    /// The columns of a product that hold its two parts.
    pub fn halves(&self) -> Range<usize> {
        self.lead..self.lead + 2 * self.padded
    }

    /// Splits A, `(rank, width)` of f32, into `(4 padded, width)`, and B, `(height, rank)` of f32, into
    /// `(height, lead + 4 padded)`: the first part twice, then the second and the third.
    ///
    /// # Errors
    /// If a tensor is not contiguous, of another dtype or not on a device, or the device fails.
    pub fn factors(&self, a: &Tensor, b: &Tensor, bias: Option<&Tensor>) -> Result<[Tensor; 2]> {
        let (device, width, height) = (device_of(a)?, a.dim(1)?, b.dim(0)?);
        let parts = [
            empty(device, &Shape::from((4 * self.padded, width)), DType::BF16)?,
            empty(device, &Shape::from((height, self.lead + 4 * self.padded)), DType::BF16)?,
        ];
        let (rank, padded, lead) = self.counts()?;
        let mut config = spread(count(width.max(height) * self.padded)?);
        config.grid_dim.1 = 2;
        let (width, height) = (count(width)?, count(height)?);
        let (a, b) = (address(device, a, DType::F32)?, address(device, b, DType::F32)?);
        let bias = bias.map(|bias| address(device, bias, DType::BF16)).transpose()?.unwrap_or(0);
        let (to_a, to_b) =
            (address(device, &parts[0], DType::BF16)?, address(device, &parts[1], DType::BF16)?);
        launch!(device; config; split_factors(
            &rank, &padded, &lead, &width, &height, &a, &b, &bias, &to_a, &to_b
        ));
        Ok(parts)
    }

    /// Sums the three thirds of a product, `(rows, 3 padded)` of f32, and splits the sum into
    /// `(rows, lead + 3 padded)`: the first part, the second, and the first again.
    ///
    /// # Errors
    /// As [`Self::factors`].
    pub fn product(&self, thirds: &Tensor) -> Result<Tensor> {
        let (device, rows) = (device_of(thirds)?, thirds.dim(0)?);
        let parts = empty(device, &Shape::from((rows, self.lead + 3 * self.padded)), DType::BF16)?;
        let (_, padded, lead) = self.counts()?;
        let (config, rows) = (spread(count(rows * self.padded)?), count(rows)?);
        let (from, to) = (address(device, thirds, DType::F32)?, address(device, &parts, DType::BF16)?);
        launch!(device; config; split_product(&rows, &padded, &lead, &from, &to));
        Ok(parts)
    }

    /// The gradients of A and B, f32, from their two parts, `(2 padded, width)` and
    /// `(height, 2 padded)` of f32.
    ///
    /// # Errors
    /// As [`Self::factors`].
    pub fn gradients(&self, a: Option<&Tensor>, b: Option<&Tensor>) -> Result<[Option<Tensor>; 2]> {
        let Some(device) = a.or(b).map(device_of).transpose()? else { return Ok([None, None]) };
        let (width, height) = (a.map_or(Ok(0), |a| a.dim(1))?, b.map_or(Ok(0), |b| b.dim(0))?);
        let like = |shape: (usize, usize)| empty(device, &Shape::from(shape), DType::F32);
        let da = a.map(|_| like((self.rank, width))).transpose()?;
        let db = b.map(|_| like((height, self.rank))).transpose()?;
        let (rank, padded, _) = self.counts()?;
        let mut config = spread(count(width.max(height) * self.rank)?);
        config.grid_dim.1 = 2;
        let (width, height) = (count(width)?, count(height)?);
        let place =
            |tensor: Option<&Tensor>| tensor.map_or(Ok(0), |tensor| address(device, tensor, DType::F32));
        let (a, b, to_a, to_b) = (place(a)?, place(b)?, place(da.as_ref())?, place(db.as_ref())?);
        launch!(device; config; join_gradients(&rank, &padded, &width, &height, &a, &b, &to_a, &to_b));
        Ok([da, db])
    }

    fn counts(&self) -> Result<(u32, u32, u32)> {
        Ok((count(self.rank)?, count(self.padded)?, count(self.lead)?))
    }
}
