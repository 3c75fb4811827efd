//! Collects gradients of a backward pass directly from the ops, outside of candle's gradient store.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use candle_core::{Tensor, TensorId};

/// The variables whose gradients the backward pass on this thread collects, and the gradients collected so
/// far. It exists during one call of `backward`, and is thread-local because candle gives an op no other
/// access to the caller.
struct Collected {
    wanted: HashSet<TensorId>,
    grads: Contributions,
}

/// The gradient contributions of each tensor, yet to be summed.
pub(super) type Contributions = HashMap<TensorId, Vec<Tensor>>;

thread_local! {
    static COLLECTED: RefCell<Option<Collected>> = const { RefCell::new(None) };
}

/// Stores the gradient of an op's argument if the backward pass on this thread collects it;
/// otherwise returns it.
pub(super) fn collect(arg: &Tensor, grad: Tensor) -> Option<Tensor> {
    COLLECTED.with_borrow_mut(|collected| match collected {
        Some(Collected { wanted, grads }) if wanted.contains(&arg.id()) => {
            grads.entry(arg.id()).or_default().push(grad);
            None
        }
        _ => Some(grad),
    })
}

/// A guard for collecting. Dropping it, also after an error, restores the state of the
/// enclosing pass, if any.
pub(super) struct Collecting(Option<Collected>);

impl Collecting {
    /// Starts collecting the gradients of `wanted` on this thread.
    pub fn begin(wanted: HashSet<TensorId>) -> Self {
        Self(COLLECTED.replace(Some(Collected { wanted, grads: Contributions::new() })))
    }

    /// Stops collecting and returns the gradients.
    pub fn end(self) -> Contributions {
        COLLECTED.with_borrow_mut(Option::take).map(|collected| collected.grads).unwrap_or_default()
    }
}

impl Drop for Collecting {
    fn drop(&mut self) {
        COLLECTED.set(self.0.take());
    }
}
