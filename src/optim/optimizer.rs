//! The optimisers of the training loop, as one type.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;

use super::adamw::AdamW;
use super::gradients::Gradients;
use super::ivon::Ivon;
use super::moments::Moments;
use crate::error::Result;

/// An optimiser of the trainable parameters of a store.
#[derive(Debug)]
pub enum Optimizer {
    /// AdamW: losses are computed at the parameters.
    AdamW(AdamW),
    /// IVON: losses are computed at posterior draws around the parameters.
    Ivon(Ivon),
}

impl Optimizer {
    /// Called before the loss of the micro-batch with draw `draw`: sets the weights at which it is computed.
    ///
    /// # Errors
    /// As [`Ivon::perturb`].
    pub fn before_loss(&mut self, draw: u64) -> Result<()> {
        match self {
            Self::AdamW(_) => Ok(()),
            Self::Ivon(ivon) => ivon.perturb(draw),
        }
    }

    /// Called after the backward pass of that loss: restores the parameters.
    ///
    /// # Errors
    /// As [`Ivon::observe`].
    pub fn after_backward(&mut self, gradients: &GradStore) -> Result<()> {
        match self {
            Self::AdamW(_) => Ok(()),
            Self::Ivon(ivon) => ivon.observe(gradients),
        }
    }

    /// Called instead of [`Self::step`] if a step is skipped: restores the parameters, wherever the losses
    /// stopped.
    ///
    /// # Errors
    /// As [`Ivon::skip`].
    pub fn skip(&mut self) -> Result<()> {
        match self {
            Self::AdamW(_) => Ok(()),
            Self::Ivon(ivon) => ivon.skip(),
        }
    }

    /// Takes one step at learning rate `lr`.
    ///
    /// # Errors
    /// As [`AdamW::step`] and [`Ivon::step`].
    pub fn step(&mut self, grads: &Gradients, lr: f64) -> Result<()> {
        match self {
            Self::AdamW(adamw) => adamw.step(grads, lr),
            Self::Ivon(ivon) => ivon.step(grads, lr),
        }
    }

    /// Returns the optimiser state of every parameter. Clones share their tensors.
    pub fn remembered(&self) -> &BTreeMap<String, Moments> {
        match self {
            Self::AdamW(adamw) => adamw.remembered(),
            Self::Ivon(ivon) => ivon.remembered(),
        }
    }

    /// Continues from the state of another optimiser of the same parameters.
    ///
    /// # Errors
    /// As [`AdamW::restore`].
    pub fn restore(&mut self, moments: &BTreeMap<String, Moments>) -> Result<()> {
        match self {
            Self::AdamW(adamw) => adamw.restore(moments),
            Self::Ivon(ivon) => ivon.restore(moments),
        }
    }
}
