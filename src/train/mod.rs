//! Training.

mod gradients;
mod optim;
mod schedule;

pub use gradients::{clip_grad_norm, Gradients};
pub use optim::{AdamW, AdamWConfig};
pub use schedule::Schedule;
