//! Matrix products that candle has no call for: added to what is there, of some columns of a matrix, of bf16 into f32.
#![allow(unsafe_code)] // cuBLAS takes addresses and believes the sizes

use std::ops::Range;

use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{bail, DType, Result, Shape, Tensor};

use super::cublas::{compute_type, data_type, operation, size};
use super::launch::{address, device_of, empty};

/// Parts of a sum that lie on several processors meet in f32, too, where the result is bf16: by default they may be rounded
/// before.
const SUMS_IN_F32: sys::cublasMath_t = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;

/// A matrix to read: some rows and columns of a contiguous tensor, or their transpose.
#[derive(Clone)]
pub(crate) struct Mat<'a> {
    tensor: &'a Tensor,
    rows: Range<usize>,
    columns: Range<usize>,
    transposed: bool,
}

impl<'a> Mat<'a> {
    /// A tensor `(rows, columns)`.
    ///
    /// # Errors
    /// If it is no matrix.
    pub fn new(tensor: &'a Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        Ok(Self { tensor, rows: 0..rows, columns: 0..columns, transposed: false })
    }

    /// Some rows of the tensor.
    pub fn rows(self, rows: Range<usize>) -> Self {
        Self { rows, ..self }
    }

    /// Some columns of the tensor.
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

    /// Where it starts and how far apart its rows are, as the tensor lies in memory.
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
/// - output: `(m, n)` of `dtype`, which is theirs or f32
///
/// # Errors
/// If sizes, dtypes or devices do not fit, a size is 0, or cuBLAS fails.
pub(crate) fn product(scale: f64, lhs: &Mat, rhs: &Mat, dtype: DType) -> Result<Tensor> {
    let shape = Shape::from((lhs.dims().0, rhs.dims().1));
    let ys = empty(device_of(lhs.tensor)?, &shape, dtype)?;
    gemm(&ys, 0.0, scale, lhs, rhs)?;
    Ok(ys)
}

/// `ys += scale lhs rhs`, rounded once. `ys`, contiguous of m rows, is nobody else's: it is changed in place.
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
    // SAFETY: `place` has checked that rows and columns lie in their tensors, and `fits` that they are what the product
    // needs; alpha and beta outlive the call. To cuBLAS, which counts by columns, a matrix by rows is its transpose, so
    // that the product is that of the right matrix with the left. The mode left behind is the one that candle, which sets
    // none, has found.
    unsafe {
        sys::cublasSetMathMode(blas, SUMS_IN_F32).result().w()?;
        let done = result::gemm_ex(
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
            // Of bf16 always in single precision, as `product` says: candle has no such products, so that its switch
            // for those of bf16, which `products` follows, does not ask about these.
            compute_type(dtype),
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        );
        sys::cublasSetMathMode(blas, sys::cublasMath_t::CUBLAS_DEFAULT_MATH).result().w()?;
        done.w()
    }
}
