//! Predictions of trained models: for the rows of batches, at the posterior mean and over posterior draws,
//! and for the tokens of texts.

mod prediction;
mod predictor;
mod submission;
mod tokens;

pub use prediction::Prediction;
pub(crate) use predictor::RunningMean;
pub use predictor::{logits, posterior_draws, posterior_probabilities, posterior_scores, Predictor};
pub use submission::Submission;
pub(crate) use tokens::target_log_probabilities;
pub use tokens::token_log_probabilities;
