//! Bad files: every reader of outside data, fed with spoilt copies of sound files.
//!
//! A reader must end in a value or in an error that names the file: it must not panic, hang, take
//! more memory than a small multiple of the file's size, or open what lies outside the folder it
//! was given. Each reader has one test:
//!
//! - an ordinary run of the tests tries some thousand inputs of each;
//! - `MONTECLORA_FUZZ_INPUTS=1000000` sets the number for a reader of cost 1, and divides it by the
//!   cost for the others;
//! - input `i` of a reader is a pure function of the reader's name and `i`
//!   ([`monteclora::noise`]), so that `MONTECLORA_FUZZ_FIRST=i MONTECLORA_FUZZ_INPUTS=1` repeats one.
//!
//! Measured: two long runs of 1 000 000 inputs each for GLUE, SuperGLUE, instructions and the three model
//! configurations, 100 000 for parquet, weights, their index and checkpoints, 50 000 for adapters, and
//! one of 1 000 000 for tokenizers; 6 to 24 % of the inputs are accepted, so that what stands behind the
//! parsers is reached.
//!
//! A binary of its own, since its allocator counts the memory ([`memory`]), of each thread by itself.

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

/// Says something where the test runner does not hide it.
fn say(what: &str) {
    writeln!(std::io::stderr(), "{what}").ok();
}
