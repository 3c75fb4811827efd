//! The gamma function's family: what the Dirichlet and Wishart distributions need.
//!
//! [`functions`] and [`gamma`] work on the host in double precision; `tensor` lifts them to
//! candle tensors with gradients.

pub mod functions;
pub mod gamma;
pub(crate) mod tensor;

pub use functions::{digamma, ln_gamma, softmax, trigamma};
pub use gamma::{gamma_quantile, GammaQuantile};
