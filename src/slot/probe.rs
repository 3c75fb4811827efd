//! Which layer is the first whose output is not finite: asked after a loss was not.

use std::cell::RefCell;

use candle_core::{DType, Tensor};

thread_local! {
    /// None: nobody asks. Else the layer, once it is found.
    static FIRST: RefCell<Option<Option<String>>> = const { RefCell::new(None) };
}

/// Runs a forward pass on this thread and returns the path of the first [`Slot`](super::Slot) whose
/// output held NaN or infinity.
pub(crate) fn first_non_finite<T>(forward: impl FnOnce() -> T) -> Option<String> {
    /// Nobody asks any more, whatever becomes of the pass.
    struct Ask;
    impl Drop for Ask {
        fn drop(&mut self) {
            FIRST.set(None);
        }
    }
    let ask = Ask;
    FIRST.set(Some(None));
    forward();
    let found = FIRST.take().flatten();
    drop(ask);
    found
}

/// Whether somebody asks: then no layer may be computed past its slot.
pub(super) fn is_asked() -> bool {
    FIRST.with_borrow(Option::is_some)
}

/// Is told of a layer's output.
pub(super) fn look(path: &str, output: &Tensor) {
    let open = FIRST.with_borrow(|first| matches!(first, Some(None)));
    let zero = || output.detach().to_dtype(DType::F32)?.affine(0.0, 0.0)?.sum_all()?.to_scalar::<f32>();
    // NaN and infinity times zero are NaN.
    if open && zero().is_ok_and(f32::is_nan) {
        FIRST.set(Some(Some(path.to_string())));
    }
}
