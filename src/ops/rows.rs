//! Rows taken out of a matrix and put back, so that a padded batch only costs the computation
//! for its real tokens.

use std::sync::Arc;

use candle_core::{bail, DType, Device, Result, Shape, Tensor};

use super::custom_vjp::custom_vjp;
use super::host::{dense, for_rows, tensor, Host};
use super::path::{Implementation, OpPath};
#[cfg(feature = "cuda")]
use crate::kernels::gather as kernels;

/// Some rows of a matrix, each at most once, in ascending order.
#[derive(Debug, Clone)]
pub struct Rows {
    places: Arc<Vec<u32>>, // on the host, ascending
    index: Tensor,         // the same, on the device of the matrices
    total: usize,
}

impl Rows {
    /// The rows, numbered in row-major order, where `mask` is not 0.
    ///
    /// The mask is read on the host; if it is on another device, this waits for that device.
    ///
    /// # Errors
    /// If the mask cannot be read as integers.
    pub fn of_mask(mask: &Tensor) -> Result<Self> {
        let flags = mask.to_dtype(DType::U8)?.flatten_all()?.to_vec1::<u8>()?;
        let places: Vec<u32> = (0u32..).zip(&flags).filter(|(_, flag)| **flag != 0).map(|(i, _)| i).collect();
        Self::new(places, flags.len(), mask.device())
    }

    /// The rows at `places` of a matrix with `total` rows.
    ///
    /// # Errors
    /// Unless the places strictly ascend and are below `total`.
    pub fn new(places: Vec<u32>, total: usize, device: &Device) -> Result<Self> {
        if !places.is_sorted_by(|a, b| a < b) || places.last().is_some_and(|last| *last as usize >= total) {
            bail!("rows: expected ascending places below {total}, got {places:?}");
        }
        let index = Tensor::new(places.as_slice(), device)?;
        Ok(Self { places: Arc::new(places), index, total })
    }

    /// These rows, and `more` rows appended to the matrix.
    ///
    /// # Errors
    /// If candle fails.
    pub fn followed_by(&self, more: usize) -> Result<Self> {
        let last = (self.total..self.total + more).map(|place| place as u32);
        let places = self.places.iter().copied().chain(last).collect();
        Self::new(places, self.total + more, self.index.device())
    }

    /// The indices of these rows in the matrix, ascending.
    pub fn places(&self) -> &[u32] {
        &self.places
    }

    /// The number of these rows.
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// The number of rows of the matrix.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Takes these rows out of `xs`.
    ///
    /// # Shapes
    /// - `xs`: `(.., dim)`, of [`Self::total`] rows
    /// - output: `(count, dim)`
    ///
    /// # Errors
    /// If `xs` has another number of rows.
    pub fn take(&self, xs: &Tensor, path: OpPath) -> Result<Tensor> {
        let xs = matrix(xs, self.total)?;
        if path == OpPath::Reference {
            return xs.index_select(&self.index, 0);
        }
        let (y, rows) = (self.gather(path, &xs.detach())?, self.clone());
        custom_vjp("take rows", [&xs], y, move |call| Ok([Some(rows.scatter(path, &call.grad)?)]))
    }

    /// A matrix with `xs` in these rows and zero in all others: the transpose of [`Self::take`].
    ///
    /// # Shapes
    /// - `xs`: `(.., dim)`, of [`Self::count`] rows
    /// - output: `(total, dim)`
    ///
    /// # Errors
    /// If `xs` has another number of rows.
    pub fn put(&self, xs: &Tensor, path: OpPath) -> Result<Tensor> {
        let xs = matrix(xs, self.count())?;
        if path == OpPath::Reference {
            let zeros = Tensor::zeros((self.total, xs.dim(1)?), xs.dtype(), xs.device())?;
            return zeros.index_add(&self.index, &xs, 0);
        }
        let (y, rows) = (self.scatter(path, &xs.detach())?, self.clone());
        custom_vjp("put rows", [&xs], y, move |call| Ok([Some(rows.gather(path, &call.grad)?)]))
    }

    fn gather(&self, path: OpPath, xs: &Tensor) -> Result<Tensor> {
        let how = path.on(&[xs]);
        #[cfg(feature = "cuda")]
        if how == Implementation::Kernels && kernels::supports(&self.index, xs) {
            return kernels::take(&self.index, xs);
        }
        if how != Implementation::Slices {
            return xs.contiguous()?.index_select(&self.index, 0);
        }
        let (xs, dim) = (dense(xs)?, xs.dim(1)?);
        let source = Host::of(&xs)?;
        let mut out = vec![0f32; self.count() * dim];
        let source: &[f32] = &source;
        for_rows(&mut out, dim, |first, rows| {
            for (row, &place) in rows.chunks_exact_mut(dim.max(1)).zip(&self.places[first..]) {
                let start = place as usize * dim;
                row.copy_from_slice(&source[start..start + dim]);
            }
        });
        tensor(out, (self.count(), dim))
    }

    fn scatter(&self, path: OpPath, xs: &Tensor) -> Result<Tensor> {
        let dim = xs.dim(1)?;
        let how = path.on(&[xs]);
        #[cfg(feature = "cuda")]
        if how == Implementation::Kernels && kernels::supports(&self.index, xs) {
            return kernels::put(&self.index, self.total, xs);
        }
        if how != Implementation::Slices {
            let zeros = Tensor::zeros((self.total, dim), xs.dtype(), xs.device())?;
            return zeros.index_add(&self.index, &xs.contiguous()?, 0);
        }
        let xs = dense(xs)?;
        let source = Host::of(&xs)?;
        let source: &[f32] = &source;
        let mut out = vec![0f32; self.total * dim];
        for_rows(&mut out, dim, |first, rows| {
            let end = first + rows.len() / dim.max(1);
            let start = self.places.partition_point(|&place| (place as usize) < first);
            for (i, &place) in (start..).zip(&self.places[start..]).take_while(|(_, p)| (**p as usize) < end)
            {
                let row = (place as usize - first) * dim;
                rows[row..row + dim].copy_from_slice(&source[i * dim..(i + 1) * dim]);
            }
        });
        tensor(out, (self.total, dim))
    }
}

/// Reshapes `(.., dim)` to a matrix with this number of rows.
fn matrix(xs: &Tensor, rows: usize) -> Result<Tensor> {
    let dim = xs.dims().last().copied().unwrap_or(0);
    let shape = Shape::from((rows, dim));
    if xs.rank() < 2 || xs.elem_count() != shape.elem_count() {
        bail!("rows: expected {rows} rows, got {:?}", xs.dims());
    }
    xs.reshape(shape)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    #[test]
    fn what_is_taken_out_goes_back_to_its_place_with_its_gradient() -> Result<()> {
        let device = Device::Cpu;
        let mask = Tensor::new(&[[1u8, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], &device)?;
        let rows = Rows::of_mask(&mask)?;
        assert_eq!((rows.count(), rows.total()), (6, 12));
        // More than one piece of work, and a matrix that is not in row-major order.
        for dim in [2, 3000] {
            let data = Tensor::arange(0f32, (12 * dim) as f32, &device)?.reshape((dim, 12))?.t()?;
            let xs = Var::from_tensor(&data.reshape((4, 3, dim))?)?;
            for path in OpPath::ALL {
                let taken = rows.take(&xs, path)?;
                let back = rows.put(&(&taken * 2.0)?, path)?;
                let flags = mask.flatten_all()?.to_dtype(DType::F32)?.unsqueeze(1)?;
                let want = (xs.reshape((12, dim))?.broadcast_mul(&flags)? * 2.0)?;
                assert_eq!((&back - &want)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0, "{path:?}");
                assert_eq!(taken.get(2)?.to_vec1::<f32>()?, xs.get(1)?.get(0)?.to_vec1::<f32>()?);
                let weight = Tensor::arange(0f32, (12 * dim) as f32, &device)?.reshape((12, dim))?;
                let grads = (&back * &weight)?.sum_all()?.backward()?;
                let Some(grad) = grads.get(&xs) else { bail!("no gradient") };
                let want = (weight.broadcast_mul(&flags)? * 2.0)?.reshape((4, 3, dim))?;
                assert_eq!((grad - &want)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.0, "{path:?}");
            }
        }
        let error =
            rows.take(&Tensor::zeros((5, 2), DType::F32, &device)?, OpPath::Fused).unwrap_err().to_string();
        assert!(error.contains("expected 12 rows, got [5, 2]"), "{error}");
        for places in [vec![3, 3], vec![4, 2], vec![0, 12]] {
            let error = Rows::new(places, 12, &device).unwrap_err().to_string();
            assert!(error.contains("ascending places below 12"), "{error}");
        }
        Ok(())
    }
}
