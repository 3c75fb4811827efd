//! Task data.

mod folder;
pub mod glue;
pub mod masked;
#[cfg(feature = "hub")]
pub mod parquet;
pub mod superglue;
pub mod task;
