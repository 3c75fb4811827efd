//! Matrix products that candle does not offer: those added to existing memory, those of parts of matrices,
//! and those of bf16 factors with an f32 result.
#![allow(unsafe_code)] // cuBLAS takes addresses and trusts the sizes

use std::ops::Range;

use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{bail, DType, Result, Shape, Tensor};

use super::cublas::{compute_type, data_type, operation, size, sum_in_f32};
use super::launch::{address, device_of, empty};

/// A matrix to read: some rows and columns of a contiguous tensor, or their transpose.
#[derive(Clone)]
pub(crate) struct Mat<'a> {
    tensor: &'a Tensor,
    rows: Range<usize>,
    columns: Range<usize>,
    transposed: bool,
}

impl<'a> Mat<'a> {
    /// The whole of a tensor `(rows, columns)`.
    ///
    /// # Errors
    /// If the tensor is not a matrix.
    pub fn new(tensor: &'a Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        Ok(Self { tensor, rows: 0..rows, columns: 0..columns, transposed: false })
    }

    /// The view of these rows of the tensor.
    pub fn rows(self, rows: Range<usize>) -> Self {
        Self { rows, ..self }
    }

    /// The view of these columns of the tensor.
    pub fn columns(self, columns: Range<usize>) -> Self {
        Self { columns, ..self }
    }

    /// The transposed view.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn dims(&self) -> (usize, usize) {
        match self.transposed {
            false => (self.rows.len(), self.columns.len()),
            true => (self.columns.len(), self.rows.len()),
        }
    }

    /// The address of the first element, and the distance in elements between rows in memory.
    fn place(&self, device: &CudaDevice) -> Result<(u64, i32)> {
        let (height, width) = self.tensor.dims2()?;
        if self.rows.end > height || self.columns.end > width {
            bail!("gemm: rows {:?} and columns {:?} of {:?}", self.rows, self.columns, self.tensor.dims());
        }
        let first = self.rows.start * width + self.columns.start;
        let dtype = self.tensor.dtype();
        Ok((address(device, self.tensor, dtype)? + (first * dtype.size_in_bytes()) as u64, size(width)?))
    }
}

/// `scale lhs rhs` on a device, summed in single precision.
///
/// # Shapes
/// - `lhs`: (m, k), `rhs`: (k, n), both of f32 or both of bf16
/// - output: `(m, n)` of `dtype`, which is that of the factors or f32
///
/// # Errors
/// If sizes, dtypes or devices do not fit, a size is 0, or cuBLAS fails.
pub(crate) fn product(scale: f64, lhs: &Mat, rhs: &Mat, dtype: DType) -> Result<Tensor> {
    let shape = Shape::from((lhs.dims().0, rhs.dims().1));
    let ys = empty(device_of(lhs.tensor)?, &shape, dtype)?;
    gemm(&ys, 0.0, scale, lhs, rhs)?;
    Ok(ys)
}

/// `ys += scale lhs rhs`, rounded once. `ys` must be contiguous with m rows and not shared: it
/// is changed in place.
///
/// # Errors
/// As [`product`].
pub(crate) fn add_product(ys: &Tensor, scale: f64, lhs: &Mat, rhs: &Mat) -> Result<()> {
    gemm(ys, 1.0, scale, lhs, rhs)
}

/// `ys = beta ys + alpha lhs rhs`.
fn gemm(ys: &Tensor, beta: f32, alpha: f64, lhs: &Mat, rhs: &Mat) -> Result<()> {
    let ((m, k), (inner, n)) = (lhs.dims(), rhs.dims());
    let (dtype, out) = (lhs.tensor.dtype(), ys.dtype());
    let fits = k == inner && ys.elem_count() == m * n && rhs.tensor.dtype() == dtype;
    if !fits || m * n * k == 0 || out != dtype && out != DType::F32 {
        let (lhs, rhs) = (lhs.dims(), rhs.dims());
        bail!("gemm: {lhs:?} by {rhs:?} of {dtype:?} into {:?} of {out:?}", ys.dims());
    }
    let (inputs, output) = (data_type(dtype)?, data_type(out)?);
    let device = device_of(ys)?;
    let ((l, l_width), (r, r_width)) = (lhs.place(device)?, rhs.place(device)?);
    let (to, alpha) = (address(device, ys, out)?, alpha as f32);
    let (m, n, k) = (size(m)?, size(n)?, size(k)?);
    let blas = device.cublas_handle();
    let blas = *blas.handle();
    device.cuda_stream().context().bind_to_thread().w()?;
    // SAFETY: `place` has checked that rows and columns lie in their tensors, and `fits` that the
    // sizes match; alpha and beta outlive the call. cuBLAS is column-major and sees a row-major
    // matrix as its transpose, so the factors are exchanged.
    unsafe {
        sum_in_f32(blas)?;
        result::gemm_ex(
            blas,
            operation(rhs.transposed),
            operation(lhs.transposed),
            n,
            m,
            k,
            (&raw const alpha).cast(),
            r as *const _,
            inputs,
            r_width,
            l as *const _,
            inputs,
            l_width,
            (&raw const beta).cast(),
            to as *mut _,
            output,
            n,
            compute_type(dtype),
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
        .w()
    }
}
