//! From prompts and answers to batches of a language model.

mod batch;
mod encode;
#[cfg(test)]
mod tests;
mod tokens;

pub use batch::CausalBatch;
pub use encode::{Encodings, PromptEncoder};
pub use tokens::{pack, Tokens};
