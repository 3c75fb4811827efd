//! Predictions of a classifier that is linearised in its weights: a Gaussian over the weights gives Gaussian
//! logits in closed form.
//!
//! [`Taps`] record the Jacobians of the logits in the A and B of every adapter; [`LinearisedPosterior`] is
//! MonteCLoRA's own Gaussian over A, and [`LinearisedClassifier`] a classifier that predicts with it; a
//! [`Laplace`](super::Laplace) approximation has another one.

mod classifier;
mod posterior;
mod predictive;
mod record;
mod taps;
#[cfg(test)]
mod tests;

pub use classifier::LinearisedClassifier;
pub use posterior::LinearisedPosterior;
pub use predictive::Linearised;
pub(super) use record::{each_part, scale_to, BatchRecord, LayerRecord, Wanted};
pub(super) use taps::Maps;
pub use taps::Taps;
