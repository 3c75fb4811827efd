//! Which implementation of a block runs.

use std::cell::Cell;

use candle_core::{DType, Tensor};

/// The three implementations of every block of [`crate::ops`].
///
/// `Fast` runs where the tensors are f32 on the CPU, `Composed` everywhere else. [`with_lane`]
/// chooses another for a scope, so that a machine without a GPU tests what a GPU will run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Slices, rayon and the `gemm` crate: f32 on the CPU. Elsewhere it means `Composed`.
    Fast,
    /// Ordinary tensor operations on detached inputs with a closed-form backward: every device and
    /// every float dtype.
    Composed,
    /// Candle's own differentiable operations: the reference that the tests compare with.
    Plain,
}

thread_local! {
    static FORCED: Cell<Option<Lane>> = const { Cell::new(None) };
}

/// Runs `f` with every block of this thread in `lane`. A backward pass stays in the lane of its
/// forward pass, wherever it is called.
///
/// # Example
/// ```
/// use candle_core::{Device, Tensor};
/// use monteclora::ops::{gelu, with_lane, Lane};
/// let xs = Tensor::new(&[-1f32, 0.5, 2.0], &Device::Cpu)?;
/// let fast = gelu(&xs)?.to_vec1::<f32>()?;
/// let composed = with_lane(Lane::Composed, || gelu(&xs))?.to_vec1::<f32>()?;
/// assert!(fast.iter().zip(&composed).all(|(a, b)| (a - b).abs() < 1e-6));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn with_lane<T>(lane: Lane, f: impl FnOnce() -> T) -> T {
    /// Puts the former lane back, also when `f` panics.
    struct Restore(Option<Lane>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(lane)));
    f()
}

/// `f` in the lane that is forced here and now, wherever it is called.
pub(super) fn with_present_lane<A: ?Sized, T>(f: impl Fn(&A) -> T) -> impl Fn(&A) -> T {
    let forced = FORCED.get();
    move |argument| match forced {
        Some(lane) => with_lane(lane, || f(argument)),
        None => f(argument),
    }
}

/// Whether [`with_lane`] asks for another lane than the fast one.
pub(crate) fn slow_lane_forced() -> bool {
    matches!(FORCED.get(), Some(Lane::Composed | Lane::Plain))
}

/// The lane for an operation on these tensors.
pub(super) fn pick(tensors: &[&Tensor]) -> Lane {
    let fast = || tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32);
    match FORCED.get() {
        Some(Lane::Plain) => Lane::Plain,
        Some(Lane::Composed) => Lane::Composed,
        Some(Lane::Fast) | None if fast() => Lane::Fast,
        Some(Lane::Fast) | None => Lane::Composed,
    }
}
