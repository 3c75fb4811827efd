//! Layers that draw together: the adapters of one injection, of which the first that a pass of the model comes to makes
//! what all of them need.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Result, Tensor};

use super::posterior::Posterior;
use crate::adapter::{Context, Pass};

/// The layers of one injection.
#[derive(Debug)]
pub(crate) struct DrawGroup {
    number: usize,
    /// By their seats; none where the layer is gone.
    members: Mutex<Vec<Option<Member>>>,
}

/// A layer that asks for its draw: its posterior, A `(r, in_dim)` and eps.
pub(super) struct Asked<'a> {
    pub posterior: &'a Posterior,
    pub mean: &'a Tensor,
    pub eps: f64,
}

/// What the draw of a layer is made of.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // on the CPU A and eps come in when a layer takes its part
pub(super) struct Member {
    /// `{path}.{adapter}`, by which a schedule knows the layer.
    pub name: String,
    /// A, `(r, in_dim)`.
    pub mean: Tensor,
    pub posterior: Posterior,
}

impl Member {
    /// The scale of its perturbation.
    #[cfg(feature = "cuda")]
    pub fn eps(&self, cx: &Context) -> f64 {
        eps(&self.posterior, &self.name, cx)
    }
}

/// The scale of the perturbation of the layer of this name: a schedule's factor counts in training alone.
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
    fn lock(&self) -> MutexGuard<'_, Vec<Option<Member>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A layer's place in its group, which it leaves when it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    group: Arc<DrawGroup>,
    index: usize,
}

impl Seat {
    /// The next place in `group`.
    pub fn new(group: &Arc<DrawGroup>, member: Member) -> Self {
        let mut members = group.lock();
        members.push(Some(member));
        Self { group: group.clone(), index: members.len() - 1 }
    }

    /// Takes this layer's part of draw `draw`, which `make` makes for all members where this pass has not yet. None
    /// outside of a model's pass, where `make` makes none for this layer, and for once where the layer's posterior is
    /// no longer the one that the group knows.
    ///
    /// # Errors
    /// As `make`.
    pub fn take<T: Send + 'static>(
        &self,
        own: &Posterior,
        draw: u64,
        cx: &Context,
        make: impl FnOnce(&[Option<Member>]) -> Result<Vec<Option<T>>>,
    ) -> Result<Option<T>> {
        let Some(together) = cx.together() else { return Ok(None) };
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
        together.take((self.group.number, draw, cx.tape().is_some()), self.index, make)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.group.lock()[self.index] = None;
    }
}
