//! Posterior draws that are kept while a prediction lasts.
//!
//! A draw of the posterior is the same weights for every batch of an evaluation and every token of
//! a text. Making it anew each time changes no number but costs more than the layer itself where
//! one token is a batch.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::{Result, Tensor, TensorId};

/// The effective A of a layer (its mean's identity) under a draw.
type Held = HashMap<(TensorId, u64), Tensor>;

thread_local! {
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

/// Runs `f` on this thread with every draw of [`Pass::Posterior`](crate::slot::Pass::Posterior)
/// made once and kept until `f` returns: `r x in_dim` numbers for each layer and draw. Inside,
/// draws carry no gradient and do not see later changes of the parameters: it is for prediction.
///
/// The outermost scope counts; scopes inside it share what it keeps.
pub fn with_held_draws<T>(f: impl FnOnce() -> T) -> T {
    /// Lets go of the draws, also when `f` panics.
    struct Release(bool);
    impl Drop for Release {
        fn drop(&mut self) {
            if self.0 {
                HELD.set(None);
            }
        }
    }
    let outermost = HELD.with_borrow_mut(|held| {
        let outermost = held.is_none();
        held.get_or_insert_default();
        outermost
    });
    let _release = Release(outermost);
    f()
}

/// The tensor that `make` gives for a layer's draw, made once in a scope of [`with_held_draws`].
pub(super) fn held(layer: TensorId, draw: u64, make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
    let key = (layer, draw);
    match HELD.with_borrow(|held| held.as_ref().map(|held| held.get(&key).cloned())) {
        None => make(),
        Some(Some(tensor)) => Ok(tensor),
        Some(None) => {
            let tensor = make()?.detach();
            HELD.with_borrow_mut(|held| held.as_mut().map(|held| held.insert(key, tensor.clone())));
            Ok(tensor)
        }
    }
}
