//! A frozen linear layer with one adapter, for use in any candle model. It needs no other part of this crate
//! and counts its own draws.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;
use candle_nn::{Module, ModuleT};

use super::base::BaseLinear;
use super::context::Context;
use super::interface::Adapter;
use super::pass::Pass;

/// A frozen linear layer with an adapter of method `A`.
///
/// `forward_t(xs, true)` is for training: a fresh draw at every call, and dropout. `forward_t(xs, false)`
/// computes the mean and is deterministic; [`Self::mean`] offers it as a plain `Module`.
#[derive(Debug)]
pub struct AdaptedLinear<A> {
    base: BaseLinear,
    adapter: A,
    draws: AtomicU64,
}

impl<A: Adapter> AdaptedLinear<A> {
    /// Combines `base` with this adapter. The base is frozen: weights that are variables (of a `VarMap`) are
    /// detached and get no gradient.
    pub fn from_parts(base: impl Into<BaseLinear>, adapter: A) -> Self {
        Self { base: base.into().frozen(), adapter, draws: AtomicU64::new(0) }
    }

    /// The frozen layer.
    pub fn base(&self) -> &BaseLinear {
        &self.base
    }

    /// The adapter.
    pub fn adapter(&self) -> &A {
        &self.adapter
    }

    /// The adapter, to change it in place.
    pub fn adapter_mut(&mut self) -> &mut A {
        &mut self.adapter
    }

    /// The index of the next draw of `forward_t(_, true)`.
    pub fn next_draw(&self) -> u64 {
        self.draws.load(Ordering::Relaxed)
    }

    /// Sets the index of the next draw, as when a checkpoint is restored.
    pub fn set_next_draw(&self, draw: u64) {
        self.draws.store(draw, Ordering::Relaxed);
    }

    /// Computes the output in the given context, without changing any state.
    ///
    /// # Shapes
    /// - `xs`: `(.., in_dim)`
    /// - output: `(.., out_dim)`
    ///
    /// # Errors
    /// If shapes or dtypes do not fit.
    pub fn forward_with(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        self.adapter.forward(xs, &self.base, cx)
    }

    /// The layer at its mean, as a plain `Module`.
    pub fn mean(&self) -> MeanView<'_, A> {
        MeanView(self)
    }
}

impl<A: Adapter> ModuleT for AdaptedLinear<A> {
    fn forward_t(&self, xs: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let pass =
            if train { Pass::Train { draw: self.draws.fetch_add(1, Ordering::Relaxed) } } else { Pass::Mean };
        self.forward_with(xs, &pass.into())
    }
}

/// An [`AdaptedLinear`] at its mean.
#[derive(Debug, Clone, Copy)]
pub struct MeanView<'a, A>(&'a AdaptedLinear<A>);

impl<A: Adapter> Module for MeanView<'_, A> {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        self.0.forward_with(xs, &Pass::Mean.into())
    }
}
