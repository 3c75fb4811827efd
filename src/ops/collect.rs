//! Gradients that the ops of a backward pass hand to who called it.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use candle_core::{Tensor, TensorId};

/// The variables whose gradients a backward pass on this thread collects for itself, and what it has collected: what is
/// to be added up of each. It lasts for the one call of `backward`: candle gives an op no other way to reach who called.
struct Collected {
    wanted: HashSet<TensorId>,
    grads: Parts,
}

/// What is to be added up of each tensor.
pub(super) type Parts = HashMap<TensorId, Vec<Tensor>>;

thread_local! {
    static COLLECTED: RefCell<Option<Collected>> = const { RefCell::new(None) };
}

/// Takes the gradient of an argument of an op, if the backward pass on this thread collects it; else gives it back.
pub(super) fn collect(arg: &Tensor, grad: Tensor) -> Option<Tensor> {
    COLLECTED.with_borrow_mut(|collected| match collected {
        Some(Collected { wanted, grads }) if wanted.contains(&arg.id()) => {
            grads.entry(arg.id()).or_default().push(grad);
            None
        }
        _ => Some(grad),
    })
}

/// What was collected around this pass comes back when it ends, however it ends.
pub(super) struct Collecting(Option<Collected>);

impl Collecting {
    /// Collects the gradients of `wanted` on this thread from now on.
    pub fn begin(wanted: HashSet<TensorId>) -> Self {
        Self(COLLECTED.replace(Some(Collected { wanted, grads: Parts::new() })))
    }

    /// What was collected.
    pub fn end(self) -> Parts {
        COLLECTED.with_borrow_mut(Option::take).map(|collected| collected.grads).unwrap_or_default()
    }
}

impl Drop for Collecting {
    fn drop(&mut self) {
        COLLECTED.set(self.0.take());
    }
}
