//! Distributions.

pub mod dirichlet;
pub mod gaussian;
pub mod wishart;
