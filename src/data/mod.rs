//! Task data.
