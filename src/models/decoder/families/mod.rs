//! Families of decoders: how the `config.json` of each maps to the switches of a `DecoderConfig`.

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
