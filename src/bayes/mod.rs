//! Prediction from a posterior, and the ways to one that need no other training: dropout,
//! checkpoints, temperature, Laplace; what draws say of uncertainty.

mod ensemble;
pub mod laplace;
mod predict;
mod temperature;
mod uncertainty;

pub use ensemble::{Ensemble, McDropout};
pub use laplace::{Laplace, LastLayer, Linearised, Scope, Taps};
pub(crate) use predict::RunningMean;
pub use predict::{logits, posterior_draws, posterior_probabilities, posterior_scores, Predictor};
pub use temperature::{Temperature, BOUNDS as TEMPERATURE_BOUNDS};
pub use uncertainty::{auroc, entropy, uncertainty, Uncertainty};
