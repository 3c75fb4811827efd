//! Fuzz tests: every reader of external data gets mutated copies of valid files.
//!
//! A reader must return a value or an error that names the file: it must not panic, hang, take more memory
//! than a small multiple of the file's size, or open files outside the folder it was given. Each reader has
//! one test:
//!
//! - an ordinary test run tries several thousand inputs of each reader;
//! - `MONTECLORA_FUZZ_INPUTS=1000000` sets the number for a reader of cost 1; for the others it is divided by
//!   their cost;
//! - input `i` of a reader is a pure function of the reader's name and `i` ([`monteclora::noise`]), so
//!   `MONTECLORA_FUZZ_FIRST=i MONTECLORA_FUZZ_INPUTS=1` repeats it.
//!
//! Measured: two long runs of 1 000 000 inputs each for GLUE, SuperGLUE, instructions and the three model
//! configurations, 100 000 for parquet, weights, their index and checkpoints, 50 000 for adapters, and one of
//! 1 000 000 for tokenizers; 6 to 24 % of the inputs are accepted, so that the code behind the parsers is
//! reached.
//!
//! These tests are a separate binary because their global allocator counts the memory of each thread
//! ([`memory`]).

mod adapters;
mod checkpoints;
mod configs;
mod gguf;
mod json;
mod memory;
mod mutate;
#[cfg(feature = "parquet")]
mod parquet;
#[cfg(feature = "parquet")]
#[path = "../support/parquet_files.rs"]
mod parquet_files;
mod reader;
mod tensors;
mod texts;
mod tokenizers;
mod weights;

use std::io::Write;

/// Prints to standard error in a way that the test runner does not capture.
fn say(what: &str) {
    writeln!(std::io::stderr(), "{what}").ok();
}
