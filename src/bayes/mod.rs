//! Prediction from a posterior.

mod predict;

pub use predict::{logits, posterior_probabilities, posterior_scores, Predictor};
