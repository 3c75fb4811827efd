//! Benchmarks of language models: multiple choice, GSM8K, HumanEval.

mod benchmark;
mod choice;
pub mod code;
mod extract;
mod generated;
pub mod gsm8k;
mod likelihood;
pub mod sandbox;

pub use benchmark::Benchmark;
pub use choice::{chosen_by_name, score_choices, ChoiceScores, Normalize};
pub use extract::{extracted, CodeAnswer};
pub use generated::Generator;
