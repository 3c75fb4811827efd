//! Gradients by parameter name, and AdamW, for the loop here and for any other.

mod adamw;
mod gradients;
mod update;

pub use adamw::{AdamW, AdamWConfig};
pub use gradients::{check_gradients, clip_grad_norm, GradientReport, Gradients};
pub use update::Moments;
