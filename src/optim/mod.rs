//! Gradients by parameter name, and the optimisers AdamW and IVON, for this crate's training loop or any
//! other.

mod adamw;
mod gradients;
mod ivon;
mod moments;
mod numerical;
mod optimizer;
mod update;

pub use adamw::{AdamW, AdamWConfig};
pub use gradients::{check_gradients, clip_grad_norm, GradientReport, Gradients};
pub use ivon::{Ivon, IvonConfig, IvonPosterior};
pub use moments::Moments;
pub use numerical::{check_gradients_numerically, NumericalReport};
pub use optimizer::Optimizer;
