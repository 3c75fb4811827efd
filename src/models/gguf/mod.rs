//! GGUF, the files of llama.cpp and Ollama: models read from them, whole or quantised, and adapters and merged models
//! written as them. What GGUF calls things lives here and nowhere else.
//!
//! Everything here is under Hugging Face's names on this side: a file becomes a `config.json` ([`Gguf::config`]), a
//! `tokenizer.json` ([`Gguf::tokenizer`]) and tensors ([`Gguf::var_builder`], [`Gguf::quantized`]), so that no model knows where it came from.

mod adapter;
mod architecture;
mod blocks;
mod config;
mod file;
mod header;
mod kind;
mod metadata;
mod model;
mod rope;
mod rows;
mod tokenizer;
mod value;
mod weights;
mod write;

pub use adapter::{check_adapter, write_adapter};
pub use file::Gguf;
pub use kind::GgufKind;
pub use model::Texts;
pub(in crate::models) use model::{check_model, write_model, Named};
pub use value::Value;
