//! What the layers of a model make for each other within one forward pass.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;

/// Parts of a forward pass that the first layer of a group that is asked makes for all of the group; each layer takes its
/// own, once.
///
/// What is made depends on the present values of parameters, so it lives no longer than the pass of a model that it was
/// made in: [`Context::of_one_pass`](super::Context::of_one_pass) begins one. (A layer that is computed again for its
/// gradient finds its part gone, and all are made again.)
#[derive(Debug, Clone, Default)]
pub(crate) struct Together {
    parts: Arc<Mutex<HashMap<Key, Parts>>>,
}

/// A group, by its number, a draw, and whether there is a tape to which the parts belong.
type Key = (usize, u64, bool);

/// The parts of a group's members that are not taken yet.
type Parts = Vec<Option<Box<dyn Any + Send>>>;

impl Together {
    /// Takes the part of member `index`; where there is none, after `make` has made those of all members. None
    /// where `make` makes none for this one.
    ///
    /// # Errors
    /// As `make`.
    pub fn take<T: Send + 'static>(
        &self,
        key: Key,
        index: usize,
        make: impl FnOnce() -> Result<Vec<Option<T>>>,
    ) -> Result<Option<T>> {
        // A panic while the lock is held leaves every part there or taken.
        let lock = || self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = lock().get_mut(&key).and_then(|parts| parts.get_mut(index)?.take());
        if let Some(part) = kept.and_then(|part| part.downcast::<T>().ok()) {
            return Ok(Some(*part));
        }
        // Not under the lock: while rayon waits for the last parts, this thread may take up another job, and that
        // job may ask here.
        let mut parts = make()?;
        let own = parts.get_mut(index).and_then(Option::take);
        let erased = parts.into_iter().map(|part| part.map(|part| Box::new(part) as Box<dyn Any + Send>));
        lock().insert(key, erased.collect());
        Ok(own)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn one_makes_all_parts_and_each_is_taken_once() -> Result<()> {
        let (together, made) = (Together::default(), AtomicUsize::new(0));
        let take = |group, draw, index| {
            together.take((group, draw, false), index, || {
                let time = made.fetch_add(1, Ordering::Relaxed);
                Ok(vec![Some((time, 0)), None, Some((time, 2))])
            })
        };
        assert_eq!((take(1, 0, 2)?, take(1, 0, 0)?), (Some((0, 2)), Some((0, 0))));
        // Gone: made again, for both.
        assert_eq!((take(1, 0, 0)?, take(1, 0, 2)?), (Some((1, 0)), Some((1, 2))));
        // Another draw, another group, a member that nothing is made for.
        assert_eq!((take(1, 1, 2)?, take(2, 0, 2)?, take(1, 0, 1)?), (Some((2, 2)), Some((3, 2)), None));
        assert_eq!(take(1, 0, 7)?, None);
        assert!(together
            .take((9, 9, true), 0, || -> Result<Vec<Option<u8>>> { candle_core::bail!("no") })
            .is_err());
        Ok(())
    }
}
