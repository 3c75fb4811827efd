//! Rows of f32 and bf16 matrices on a CUDA device, taken out and put back.

use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Result, Shape, Tensor};

use super::launch::{address, count, device_of, empty, grid, launch, supports_all};

/// Whether these kernels support rows of `xs` at `places`: f32 or bf16, on a CUDA device, neither empty.
pub(crate) fn supports(places: &Tensor, xs: &Tensor) -> bool {
    supports_all([xs]) && places.elem_count() > 0
}

/// The rows of `xs` `(n, dim)` at `places` (u32, below n): `(places, dim)`.
///
/// # Errors
/// If the tensors are not supported ([`supports`]), or the device fails.
pub(crate) fn take(places: &Tensor, xs: &Tensor) -> Result<Tensor> {
    let (device, xs) = (device_of(xs)?, xs.contiguous()?);
    let (rows, dim) = (places.elem_count(), xs.dim(1)?);
    let ys = empty(device, &Shape::from((rows, dim)), xs.dtype())?;
    let (words, halves) = words(device, &xs)?;
    let (from, to) = (address(device, &xs, xs.dtype())?, address(device, &ys, xs.dtype())?);
    let (rows, places) = (count(rows)?, address(device, places, DType::U32)?);
    launch!(device; grid(rows); take_rows(&words, &halves, &places, &from, &to));
    Ok(ys)
}

/// A matrix `(total, dim)` with the rows of `xs` at `places` (u32, ascending and below `total`)
/// and zero elsewhere.
///
/// # Errors
/// As [`take`].
pub(crate) fn put(places: &Tensor, total: usize, xs: &Tensor) -> Result<Tensor> {
    let (device, xs) = (device_of(xs)?, xs.contiguous()?);
    let ys = empty(device, &Shape::from((total, xs.dim(1)?)), xs.dtype())?;
    let (words, halves) = words(device, &xs)?;
    let (from, to) = (address(device, &xs, xs.dtype())?, address(device, &ys, xs.dtype())?);
    let (total, len, places) =
        (count(total)?, count(places.elem_count())?, address(device, places, DType::U32)?);
    launch!(device; grid(total); put_rows(&words, &halves, &len, &places, &from, &to));
    Ok(ys)
}

/// The number of words in a row, and whether they have 16 bits, for rows that are not at
/// multiples of 32 bits.
fn words(device: &CudaDevice, xs: &Tensor) -> Result<(u32, u32)> {
    let (dim, dtype) = (xs.dim(1)?, xs.dtype());
    let bytes = dim * dtype.size_in_bytes();
    let whole = bytes.is_multiple_of(4) && address(device, xs, dtype)?.is_multiple_of(4);
    Ok((count(if whole { bytes / 4 } else { dim })?, u32::from(!whole)))
}
