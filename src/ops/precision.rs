//! The precision of matrix products of f32 on CUDA devices.

use candle_core::cuda;

/// Lets matrix products of f32 on CUDA devices round what they multiply to TF32, ten bits behind the point instead of 23,
/// and sum in f32: on tensor cores, where they are some four to eight times as fast. Off at first, as in PyTorch. It holds
/// for the whole process and for candle's own products too; it changes nothing on the CPU and in products of bf16.
///
/// With an f32 base all its products become coarser, by up to 2^-10 of their terms; an f32 adapter beside a bf16 base does
/// not need it, whose products run on tensor cores in parts that lose nothing (GUIDE.md, "CUDA").
pub fn allow_tf32(allow: bool) {
    cuda::set_gemm_reduced_precision_f32(allow);
}

/// Whether products of f32 may use TF32 now: set by [`allow_tf32`], or through candle's own switch.
pub fn tf32_allowed() -> bool {
    cuda::gemm_reduced_precision_f32()
}
