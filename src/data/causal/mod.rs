//! Turns prompts and answers into batches for a causal language model.

mod batch;
mod encode;
mod parts;
#[cfg(test)]
mod tests;
mod tokens;

pub use batch::CausalBatch;
pub use encode::{Encodings, PromptEncoder};
pub use tokens::{pack, Tokens};
