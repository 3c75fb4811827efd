//! Arguments of cuBLAS calls: sizes, dtypes, transposes, compute types and the math mode.
#![allow(unsafe_code)] // cuBLAS trusts its handle

use candle_core::cuda_backend::cudarc::cublas::sys;
use candle_core::cuda_backend::{gemm_reduced_precision_f32, WrapErr};
use candle_core::{bail, DType, Result};

/// A size as a cuBLAS argument.
///
/// # Errors
/// If it is 2^31 or more.
pub(super) fn size(n: usize) -> Result<i32> {
    match i32::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => bail!("cuBLAS counts to 2^31, got {n}"),
    }
}

/// The data type of a matrix.
///
/// # Errors
/// If `dtype` is neither f32 nor bf16.
pub(super) fn data_type(dtype: DType) -> Result<sys::cudaDataType_t> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
        other => bail!("matrix products on a device: expected f32 or bf16, got {other:?}"),
    }
}

/// The operation on a factor that is or is not transposed.
pub(super) fn operation(transposed: bool) -> sys::cublasOperation_t {
    match transposed {
        false => sys::cublasOperation_t::CUBLAS_OP_N,
        true => sys::cublasOperation_t::CUBLAS_OP_T,
    }
}

/// Makes cuBLAS add the partial sums of several processors in f32 even if the result is bf16; by default it may
/// round them before. The mode stays set: it only makes candle's own products more precise.
///
/// # Safety
/// `blas` must be a valid handle.
///
/// # Errors
/// If cuBLAS fails.
pub(super) unsafe fn sum_in_f32(blas: sys::cublasHandle_t) -> Result<()> {
    let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle is valid.
    unsafe { sys::cublasSetMathMode(blas, mode) }.result().w()
}

/// The compute type of products of factors of `dtype`: single precision, or TF32 for f32 where it is allowed
/// ([`crate::ops::allow_tf32`]).
pub(super) fn compute_type(dtype: DType) -> sys::cublasComputeType_t {
    match dtype {
        DType::F32 if gemm_reduced_precision_f32() => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    }
}
