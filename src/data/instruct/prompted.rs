//! Prompts with their answers, choices and tests.

use std::ops::Range;

use crate::error::{Error, Result};

/// A prompt and the answer to learn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompted {
    /// The text that is given.
    pub prompt: String,
    /// The text to predict after the prompt.
    pub answer: String,
    /// The choices, if the instruction lists them.
    pub choices: Option<Choices>,
    /// The tests of a generated answer, if it completes a program.
    pub tests: Option<ProgramTests>,
    /// The parts to learn, as bytes of prompt and answer together, in order and apart; `None`: the answer. A
    /// conversation has a part for each turn of the assistant.
    pub learnt: Option<Vec<Range<usize>>>,
}

/// The most words and bytes of a text's [`Prompted::opening`].
const OPENING: (usize, usize) = (8, 64);

impl Prompted {
    /// What a sample text continues: the prompt; of a row without one (plain text), its first words.
    pub fn opening(&self) -> &str {
        if !self.prompt.is_empty() {
            return &self.prompt;
        }
        let text = self.answer.trim_start();
        let most = text.split_whitespace().count().div_ceil(2).min(OPENING.0);
        let mut end = 0;
        for word in text.split_whitespace().take(most) {
            end += text[end..].find(word).unwrap_or(0) + word.len();
        }
        let end = (0..=end.min(OPENING.1)).rfind(|end| text.is_char_boundary(*end)).unwrap_or(0);
        &text[..end]
    }

    /// The choices of this row; the error names it by its index `i`.
    ///
    /// # Errors
    /// If it has none; the error counts rows from 1.
    pub(crate) fn choices(&self, i: usize) -> Result<&Choices> {
        let none = || Error::config("data", format!("row {} has no choices (no `Answer format:`)", i + 1));
        self.choices.as_ref().ok_or_else(none)
    }

    /// The tests of this row; the error names it by its index `i`.
    ///
    /// # Errors
    /// If it has none; the error counts rows from 1.
    pub(crate) fn tests(&self, i: usize) -> Result<&ProgramTests> {
        let none = || Error::config("data", format!("row {} has no tests (`entry_point`, `test`)", i + 1));
        self.tests.as_ref().ok_or_else(none)
    }
}

/// How a completed program is tested, as in HumanEval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramTests {
    /// The name of the function whose definition the prompt begins.
    pub entry_point: String,
    /// A program that defines `check(candidate)`.
    pub test: String,
}

/// The answers of a multiple-choice question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    /// The names of the choices, such as `answer1`, in the order of the instruction.
    pub names: Vec<String>,
    /// The full answer text of each choice.
    pub answers: Vec<String>,
    /// The index of the right choice.
    pub correct: usize,
}
