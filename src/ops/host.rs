//! f32 tensors on the CPU as slices, and loops over them in pieces that do not depend on the number
//! of threads.

use std::ops::Deref;

use candle_core::{bail, CpuStorage, DType, Device, Result, Shape, Storage, StorageRef, Tensor};
use rayon::prelude::*;

use crate::util::simd::vectorized;

/// Elements of one piece of work: large enough to pay for handing it to a thread.
const PIECE: usize = 8192;

/// A borrowed view of an f32 tensor on the CPU.
pub(super) struct Host<'a> {
    storage: StorageRef<'a>,
    start: usize,
    end: usize,
}

impl<'a> Host<'a> {
    /// The elements of a contiguous tensor.
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("a contiguous tensor was expected, got strides {:?}", layout.stride());
        };
        data(&storage)?;
        Ok(Self { storage, start, end })
    }

    /// The elements from the first one of a tensor of any strides to the end of its storage.
    pub fn from_first(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let end = data(&storage)?.len();
        Ok(Self { storage, start: layout.start_offset(), end })
    }
}

impl Deref for Host<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // Checked when the view was made; the storage does not change while it is borrowed.
        data(&self.storage).map_or(&[], |data| &data[self.start..self.end])
    }
}

/// All elements of a storage.
fn data(storage: &Storage) -> Result<&[f32]> {
    match storage {
        Storage::Cpu(CpuStorage::F32(data)) => Ok(data),
        _ => bail!(
            "f32 on the cpu was expected, got {:?} on {:?}",
            storage.dtype(),
            storage.device().location()
        ),
    }
}

/// A tensor on the CPU that owns `data`.
pub(super) fn tensor(data: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &Device::Cpu)
}

/// The detached `tensor` in row-major order.
pub(super) fn dense(tensor: &Tensor) -> Result<Tensor> {
    tensor.detach().contiguous()
}

/// A vector of `len` elements in rows of `width`, filled in pieces by `f(first_row, rows)`.
pub(super) fn fill_rows(len: usize, width: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let mut out = vec![0f32; len];
    for_rows(&mut out, width, f);
    out
}

/// Calls `f(first_row, rows)` on every piece of `out`.
pub(super) fn for_rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = rows_per_piece(width);
    let work = |(i, piece): (usize, &mut [f32])| f(i * rows, piece);
    if out.len() <= rows * width {
        work((0, out)); // handing one piece to another thread costs more than it saves
    } else {
        out.par_chunks_mut(rows * width).enumerate().for_each(work);
    }
}

/// The number of rows of this width in one piece.
pub(super) fn rows_per_piece(width: usize) -> usize {
    (PIECE / width.max(1)).max(1)
}

/// `f(x)` of every element.
#[inline(always)]
pub(super) fn map(xs: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    fill_rows(xs.len(), 1, |first, out| {
        vectorized!({
            for (out, &x) in out.iter_mut().zip(&xs[first..]) {
                *out = f(x);
            }
        })
    })
}

/// `f(x, y)` of every pair of elements.
#[inline(always)]
pub(super) fn map2(xs: &[f32], ys: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    fill_rows(xs.len(), 1, |first, out| {
        vectorized!({
            for ((out, &x), &y) in out.iter_mut().zip(&xs[first..]).zip(&ys[first..]) {
                *out = f(x, y);
            }
        })
    })
}

/// `f(x, y, z)` of every triple of elements.
#[inline(always)]
pub(super) fn map3(xs: &[f32], ys: &[f32], zs: &[f32], f: impl Fn(f32, f32, f32) -> f32 + Sync) -> Vec<f32> {
    fill_rows(xs.len(), 1, |first, out| {
        vectorized!({
            for (((out, &x), &y), &z) in out.iter_mut().zip(&xs[first..]).zip(&ys[first..]).zip(&zs[first..])
            {
                *out = f(x, y, z);
            }
        })
    })
}

/// The sum of the squares of all elements, in double precision.
///
/// # Errors
/// If candle fails.
pub(crate) fn sum_of_squares(xs: &Tensor) -> Result<f64> {
    if !xs.device().is_cpu() || xs.dtype() != DType::F32 {
        return xs.detach().to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar();
    }
    let xs = dense(xs)?;
    let squares = |xs: &[f32]| {
        vectorized!({
            let mut lanes = [0f64; 8];
            let (pieces, rest) = xs.as_chunks::<8>();
            for piece in pieces {
                lanes.iter_mut().zip(piece).for_each(|(lane, x)| *lane += f64::from(*x) * f64::from(*x));
            }
            let rest = rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
            lanes.iter().sum::<f64>() + rest
        })
    };
    let host = Host::of(&xs)?;
    if host.len() <= PIECE {
        Ok(squares(&host))
    } else {
        let parts: Vec<f64> = host.par_chunks(PIECE).map(squares).collect();
        Ok(parts.iter().sum())
    }
}

/// The column sums of a matrix with rows of `width`.
pub(super) fn column_sums(xs: &[f32], width: usize) -> Vec<f32> {
    let partial = |rows: &[f32]| {
        let mut sums = vec![0f32; width];
        vectorized!(rows.chunks_exact(width).for_each(|row| add_assign(&mut sums, row)));
        sums
    };
    let parts: Vec<Vec<f32>> = xs.par_chunks(64 * width.max(1)).map(partial).collect();
    total(parts, width)
}

/// The sum of vectors of `width` elements, added in their order.
pub(super) fn total(parts: Vec<Vec<f32>>, width: usize) -> Vec<f32> {
    let mut sums = vec![0f32; width];
    for part in &parts {
        add_assign(&mut sums, part);
    }
    sums
}

/// `a += b`.
#[inline(always)]
pub(super) fn add_assign(a: &mut [f32], b: &[f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_of_another_dtype_is_an_error_and_not_empty() -> Result<()> {
        for dtype in [DType::F64, DType::BF16, DType::U32] {
            let tensor = Tensor::zeros(3, dtype, &Device::Cpu)?;
            for view in [Host::of(&tensor), Host::from_first(&tensor)] {
                let error = view.err().expect("an error").to_string();
                assert!(error.contains(&format!("f32 on the cpu was expected, got {dtype:?}")), "{error}");
            }
        }
        assert_eq!(Host::of(&Tensor::new(&[1f32, 2.0], &Device::Cpu)?)?[..], [1.0, 2.0]);
        Ok(())
    }
}
