//! The gamma function and its relatives, as needed by the Dirichlet and Wishart distributions.
//!
//! [`functions`] and [`gamma`] work on the host in double precision; `tensor` applies them to Candle tensors,
//! with gradients.

pub mod functions;
pub mod gamma;
pub(crate) mod tensor;

pub use functions::{digamma, ln_gamma, softmax, trigamma};
pub use gamma::{gamma_quantile, GammaQuantile};
