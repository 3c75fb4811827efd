//! Families of decoders: how each says in its `config.json` which switches are on.

mod base;
mod fields;
mod gemma2;
mod gemma3;
mod llama;
mod mistral;
mod phi3;
mod qwen2;
mod qwen3;
mod rope;
mod smollm3;
mod table;

pub(super) use table::{class, model_types, read};
