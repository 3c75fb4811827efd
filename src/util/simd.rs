//! Selects the widest vector instructions of the CPU at run time.

#[cfg(target_arch = "x86_64")]
pub(crate) use pulp::Arch;

/// Evaluates an expression compiled for the CPU's own vector instructions (up to AVX-512), so that simple
/// loops in it become SIMD code. A program built for any x86-64 machine otherwise only uses SSE2.
///
/// Results do not depend on the selection: sums and products keep their order and are not contracted. This is
/// a macro because the compiler inlines a closure that is called in only one place, whatever its size, and
/// code that is not inlined is not compiled for these instructions.
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
