//! Results that the layers of a model compute for each other within one forward pass.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;

/// Intermediate results that the first layer of a group computes for all layers of the group. Each layer
/// takes its own part, once.
///
/// The parts depend on the current parameter values, so they live no longer than the forward pass in which
/// they were made; [`Context::of_one_pass`](super::Context::of_one_pass) starts one. (If a layer is
/// recomputed for its gradient, its part is already taken, and all parts are made again.)
#[derive(Debug, Clone, Default)]
pub(crate) struct PassCache {
    parts: Arc<Mutex<HashMap<Key, MemberParts>>>,
}

/// The number of a group, a draw, and whether the parts belong to a tape.
type Key = (usize, u64, bool);

/// The parts of a group's members that are not yet taken.
type MemberParts = Vec<Option<Box<dyn Any + Send>>>;

impl PassCache {
    /// Takes the part of member `index`. If it is missing, calls `make` first, which makes the parts of all
    /// members. Returns `None` if `make` makes none for this member.
    ///
    /// # Errors
    /// As `make`.
    pub fn take<T: Send + 'static>(
        &self,
        key: Key,
        index: usize,
        make: impl FnOnce() -> Result<Vec<Option<T>>>,
    ) -> Result<Option<T>> {
        // A panic while the lock is held leaves each part either there or taken.
        let lock = || self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = lock().get_mut(&key).and_then(|parts| parts.get_mut(index)?.take());
        if let Some(part) = kept.and_then(|part| part.downcast::<T>().ok()) {
            return Ok(Some(*part));
        }
        // The lock is not held here: while rayon waits for the last parts, this thread may start another job,
        // which may call `take` too.
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
        let (together, made) = (PassCache::default(), AtomicUsize::new(0));
        let take = |group, draw, index| {
            together.take((group, draw, false), index, || {
                let time = made.fetch_add(1, Ordering::Relaxed);
                Ok(vec![Some((time, 0)), None, Some((time, 2))])
            })
        };
        assert_eq!((take(1, 0, 2)?, take(1, 0, 0)?), (Some((0, 2)), Some((0, 0))));
        // Already taken: made again, for both.
        assert_eq!((take(1, 0, 0)?, take(1, 0, 2)?), (Some((1, 0)), Some((1, 2))));
        // Another draw, another group, and a member without a part.
        assert_eq!((take(1, 1, 2)?, take(2, 0, 2)?, take(1, 0, 1)?), (Some((2, 2)), Some((3, 2)), None));
        assert_eq!(take(1, 0, 7)?, None);
        assert!(together
            .take((9, 9, true), 0, || -> Result<Vec<Option<u8>>> { candle_core::bail!("no") })
            .is_err());
        Ok(())
    }
}
