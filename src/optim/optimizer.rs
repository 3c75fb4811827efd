//! The optimisers that the loop knows, behind one name.

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
    /// AdamW, whose losses are at the parameters.
    AdamW(AdamW),
    /// IVON, whose losses are at draws around them.
    Ivon(Ivon),
}

impl Optimizer {
    /// Before the loss of the micro-batch with draw `draw`: puts the weights in place that it is taken at.
    ///
    /// # Errors
    /// As [`Ivon::perturb`].
    pub fn before_loss(&mut self, draw: u64) -> Result<()> {
        match self {
            Self::AdamW(_) => Ok(()),
            Self::Ivon(ivon) => ivon.perturb(draw),
        }
    }

    /// After the backward pass of that loss: puts the parameters back.
    ///
    /// # Errors
    /// As [`Ivon::observe`].
    pub fn after_backward(&mut self, gradients: &GradStore) -> Result<()> {
        match self {
            Self::AdamW(_) => Ok(()),
            Self::Ivon(ivon) => ivon.observe(gradients),
        }
    }

    /// In place of a step that is not taken, wherever its losses ended: puts the parameters back.
    ///
    /// # Errors
    /// As [`Ivon::skip`].
    pub fn skip(&mut self) -> Result<()> {
        match self {
            Self::AdamW(_) => Ok(()),
            Self::Ivon(ivon) => ivon.skip(),
        }
    }

    /// One step at learning rate `lr`.
    ///
    /// # Errors
    /// As [`AdamW::step`] and [`Ivon::step`].
    pub fn step(&mut self, grads: &Gradients, lr: f64) -> Result<()> {
        match self {
            Self::AdamW(adamw) => adamw.step(grads, lr),
            Self::Ivon(ivon) => ivon.step(grads, lr),
        }
    }

    /// What is remembered of every parameter. Cloned, the tensors are the same.
    pub fn remembered(&self) -> &BTreeMap<String, Moments> {
        match self {
            Self::AdamW(adamw) => adamw.remembered(),
            Self::Ivon(ivon) => ivon.remembered(),
        }
    }

    /// Continues where another optimiser of the same parameters stopped.
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
