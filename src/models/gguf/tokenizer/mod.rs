//! Tokenizers: the pieces in a GGUF file's metadata as a `tokenizer.json`, and the other way round.

mod parts;
mod pre;
mod read;
mod write;

#[cfg(feature = "train")]
pub(crate) use parts::template;
pub use write::tokenizer_metadata;
