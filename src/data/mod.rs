//! Task data.

pub mod masked;
