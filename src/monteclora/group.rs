//! Layers that make their draws together: the adapters of one injection. The first layer that a forward pass
//! of the model reaches computes the draws of all.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Result, Tensor};

use super::posterior::Posterior;
use crate::adapter::{Context, Pass};

/// The layers of one injection, which make their draws together.
#[derive(Debug)]
pub(crate) struct DrawGroup {
    number: usize,
    /// Indexed by a layer's place; `None` if the layer was dropped.
    members: Mutex<Vec<Option<GroupMember>>>,
}

/// The inputs of a layer's draw: its posterior, A `(r, in_dim)` and eps.
pub(super) struct DrawRequest<'a> {
    pub posterior: &'a Posterior,
    pub mean: &'a Tensor,
    pub eps: f64,
}

/// A layer as its group stores it: the inputs of its draw.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // on the CPU each layer supplies its own A and eps
pub(super) struct GroupMember {
    /// The name `{path}.{adapter}`, by which a schedule identifies the layer.
    pub name: String,
    /// A, `(r, in_dim)`.
    pub mean: Tensor,
    pub posterior: Posterior,
}

impl GroupMember {
    /// The scale of the layer's perturbation.
    #[cfg(feature = "cuda")]
    pub fn eps(&self, cx: &Context) -> f64 {
        eps(&self.posterior, &self.name, cx)
    }
}

/// The scale of the perturbation of the layer `name`: a schedule's factor applies in training only.
pub(super) fn eps(posterior: &Posterior, name: &str, cx: &Context) -> f64 {
    let eps = posterior.sample_scaler();
    match cx.pass {
        Pass::Train { .. } => eps * cx.scaler_factors.of(name),
        Pass::Mean | Pass::Posterior { .. } => eps,
    }
}

impl Default for DrawGroup {
    fn default() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        Self { number: NEXT.fetch_add(1, Ordering::Relaxed), members: Mutex::default() }
    }
}

impl DrawGroup {
    // A panic while the lock is held leaves the list whole.
    fn lock(&self) -> MutexGuard<'_, Vec<Option<GroupMember>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A layer's place in its group; dropping it removes the layer from the group.
#[derive(Debug)]
pub(super) struct GroupMembership {
    group: Arc<DrawGroup>,
    index: usize,
}

impl GroupMembership {
    /// Takes the next place in `group`.
    pub fn new(group: &Arc<DrawGroup>, member: GroupMember) -> Self {
        let mut members = group.lock();
        members.push(Some(member));
        Self { group: group.clone(), index: members.len() - 1 }
    }

    /// Takes this layer's part of draw `draw`; if this pass has not made it yet, `make` makes the parts of
    /// all members. Returns `None` outside a model's forward pass, if `make` makes no part for this layer, or
    /// once after the layer's posterior was replaced.
    ///
    /// # Errors
    /// As `make`.
    pub fn take<T: Send + 'static>(
        &self,
        own: &Posterior,
        draw: u64,
        cx: &Context,
        make: impl FnOnce(&[Option<GroupMember>]) -> Result<Vec<Option<T>>>,
    ) -> Result<Option<T>> {
        let Some(cache) = cx.pass_cache() else { return Ok(None) };
        if let Some(member) = &mut self.group.lock()[self.index] {
            if !member.posterior.is(own) {
                member.posterior = own.clone();
                return Ok(None);
            }
        }
        let make = || {
            let members = self.group.lock().clone();
            make(&members)
        };
        cache.take((self.group.number, draw, cx.tape().is_some()), self.index, make)
    }
}

impl Drop for GroupMembership {
    fn drop(&mut self) {
        self.group.lock()[self.index] = None;
    }
}
