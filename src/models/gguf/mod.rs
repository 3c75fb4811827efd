//! GGUF, the files of llama.cpp and Ollama: models read from them, whole or quantised, and adapters and merged models
//! written as them. What GGUF calls things lives here and nowhere else.
//!
//! Everything here is under Hugging Face's names on this side: a file becomes a `config.json` ([`Gguf::config`]), a
//! `tokenizer.json` ([`Gguf::tokenizer`]) and tensors ([`Gguf::weights`]), so that no model knows where it came from.

mod architecture;
mod config;
mod file;
mod header;
mod rope;
mod rows;
mod tokenizer;
mod value;
mod weights;

pub use file::Gguf;
pub use tokenizer::tokenizer_metadata;
pub use value::Value;
