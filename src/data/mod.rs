//! Task data.

pub mod batch;
pub mod encode;
pub mod masked;
pub mod task;
