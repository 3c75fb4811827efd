//! What the integration tests share.

pub mod checkpoints;
mod common;
pub mod decoders;
mod encoders;
mod golden;
#[cfg(unix)]
pub mod programs;

pub use common::{assert_close, asset, case, data, scatter, skipped, small, Outcome};
pub use encoders::{padded_batch, toy_classifier, toy_config, toy_weights};
pub use golden::{golden, vb};
