//! The hub's client against a hub on the loopback: what it finds, fetches, refuses and never tells; and
//! the parquet files of its data sets.

mod fixture;
#[cfg(feature = "parquet")]
mod parquet;
#[cfg(feature = "parquet")]
#[path = "../support/parquet_files.rs"]
mod parquet_files;
mod repositories;
mod secrets;
mod server;
mod transfers;
