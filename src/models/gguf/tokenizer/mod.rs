//! Conversion between the tokenizer in a GGUF file's metadata and `tokenizer.json`.

mod parts;
mod pre;
mod read;
mod write;

pub use write::tokenizer_metadata;
