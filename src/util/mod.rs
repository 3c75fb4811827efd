//! Utilities for the whole crate, independent of the fine-tuning method.

pub(crate) mod check;
pub mod device;
pub(crate) mod dtype;
pub mod files;
pub(crate) mod finite;
pub(crate) mod json;
pub(crate) mod lfs_pointer;
pub(crate) mod simd;
