//! GGUF, the file format of llama.cpp and Ollama: reads models, quantised or not, and writes adapters and
//! merged models.
//!
//! GGUF's names are used only in this module. The rest of the crate sees Hugging Face's: a file is presented
//! as a `config.json` ([`Gguf::config`]), a `tokenizer.json` ([`Gguf::tokenizer`]) and tensors
//! ([`Gguf::var_builder`], [`Gguf::quantized`]), so that models do not depend on the format of their files.

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
