//! The widest vector instructions of the CPU at hand, chosen when the program runs.

#[cfg(target_arch = "x86_64")]
pub(crate) use pulp::Arch;

/// Evaluates an expression compiled for the CPU's own vector instructions (up to AVX-512), so that
/// the simple loops in it become SIMD; a program built for any x86-64 machine otherwise has SSE2
/// alone.
///
/// No result depends on the choice: sums and products keep their order and are not contracted. A macro
/// and no function: the compiler inlines a closure that is called in one place whatever its size, and
/// what is not inlined is not compiled for these instructions.
macro_rules! vectorized {
    ($body:expr) => {{
        #[cfg(target_arch = "x86_64")]
        match $crate::util::simd::Arch::new() {
            $crate::util::simd::Arch::V4(simd) => simd.vectorize(|| $body),
            $crate::util::simd::Arch::V3(simd) => simd.vectorize(|| $body),
            _ => $body,
        }
        #[cfg(not(target_arch = "x86_64"))]
        $body
    }};
}

pub(crate) use vectorized;
