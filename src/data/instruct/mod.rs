//! Prompts and their answers: instruction data, GSM8K, code and plain text.
//!
//! Templates, with the prompt up to `|` and the answer after it:
//!
//! - `instruct` (Alpaca's, which LLM-Adapters and the paper's authors use):
//!   `Below is an instruction that describes a task. Write a response that appropriately completes
//!   the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n|{output}`; for a row with an
//!   `input`, the first sentence mentions it, and it stands before the response under `### Input:\n`;
//! - `completion` (TRL's prompt and completion): `{prompt}|{completion}`;
//! - `gsm8k` (of the LM evaluation harness): `Question: {question}\nAnswer:| {answer}`;
//! - `code` (HumanEval): `{prompt}|{canonical_solution}`;
//! - `text`: an empty prompt, and the whole text as answer.

mod format;
mod prompted;
mod read;
#[cfg(test)]
mod tests;

pub use format::{instruction_prompt, Format};
pub use prompted::{Choices, ProgramTests, Prompted};
pub use read::{prompts_from, read, read_from, read_prompts};
