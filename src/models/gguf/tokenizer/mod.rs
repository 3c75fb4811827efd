//! Tokenizers: the pieces in a GGUF file's metadata as a `tokenizer.json`, and the other way round.

mod parts;
mod pre;
mod read;
mod write;

pub use write::tokenizer_metadata;
