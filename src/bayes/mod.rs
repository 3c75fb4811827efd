//! Bayesian prediction.
