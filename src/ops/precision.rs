//! The precision of matrix products of f32 on CUDA devices.

use candle_core::cuda;

/// Allows f32 matrix products on CUDA devices to round their factors to TF32.
///
/// TF32 has a mantissa of 10 bits instead of 23; sums stay in f32. Such products run on tensor cores, some
/// four to eight times as fast. Off by default, as in PyTorch. The setting applies to the whole process,
/// including candle's own products; it does not affect the CPU and products of bf16.
///
/// With an f32 base, all of its products become less precise, by up to 2^-10 of their terms. An f32 adapter
/// beside a bf16 base does not need TF32: its products run on tensor cores in parts that lose nothing
/// (GUIDE.md, "CUDA").
pub fn allow_tf32(allow: bool) {
    cuda::set_gemm_reduced_precision_f32(allow);
}

/// Whether f32 products may use TF32, as set by [`allow_tf32`] or through candle's own switch.
pub fn tf32_allowed() -> bool {
    cuda::gemm_reduced_precision_f32()
}
