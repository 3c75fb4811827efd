//! Task data: reading, encoding, batching.

pub mod batch;
mod byte_bpe;
pub mod causal;
pub mod chat;
pub mod encode;
mod folder;
pub mod glue;
pub mod instruct;
mod lines;
pub mod masked;
#[cfg(feature = "parquet")]
pub mod parquet;
mod records;
mod row;
pub mod split;
pub mod superglue;
pub mod table;
pub mod task;
mod test_sets;
pub mod tokenizer;
mod wic;
