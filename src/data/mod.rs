//! Task data: reading, encoding, batching.

<<<<<<< HEAD
pub mod batch;
pub mod encode;
=======
mod folder;
>>>>>>> data2
pub mod glue;
pub mod masked;
#[cfg(feature = "hub")]
pub mod parquet;
pub mod superglue;
pub mod task;
