//! What language models are measured by: multiple choice, GSM8K.

mod choice;
pub mod gsm8k;

pub use choice::{chosen_by_name, score_choices, ChoiceScores, Normalize};
