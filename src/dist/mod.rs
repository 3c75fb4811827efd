//! The three distributions of the method, batched, differentiable, in single or double precision.
//!
//! Each draws by a transform of given noise (`rsample`), knows its moments and its KL divergence,
//! always in the order `kl_divergence(posterior, prior)`.

pub mod dirichlet;
pub mod gaussian;
pub mod wishart;

pub use dirichlet::{Dirichlet, Estimator};
pub use gaussian::Gaussian;
pub use wishart::{Covariance, Wishart};
