//! The three distributions of the method, batched, differentiable, in single or double precision.
//!
//! Each samples by transforming given noise (`rsample`), and has moments and a KL divergence, always in the
//! order `kl_divergence(posterior, prior)`.

pub mod dirichlet;
pub mod gaussian;
pub mod wishart;

pub use dirichlet::{Dirichlet, Estimator};
pub use gaussian::Gaussian;
pub use wishart::{Covariance, Wishart};
