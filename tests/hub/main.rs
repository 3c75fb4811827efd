//! Tests of the hub client against a server on the loopback interface: what it finds, downloads and refuses,
//! and that it keeps the token secret; and of the parquet files of the hub's data sets.

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
