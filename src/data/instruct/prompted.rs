//! Prompts with their answers, and what else is known of them.

use crate::error::{Error, Result};

/// A prompt and the answer to learn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompted {
    /// What is given.
    pub prompt: String,
    /// What is to follow it.
    pub answer: String,
    /// The answers to choose from, where the instruction lists them.
    pub choices: Option<Choices>,
    /// What tests a generated answer, where it completes a program.
    pub tests: Option<ProgramTests>,
}

impl Prompted {
    /// The choices of the row at place `i`.
    ///
    /// # Errors
    /// If it has none; the error counts rows from 1.
    pub(crate) fn choices(&self, i: usize) -> Result<&Choices> {
        let none = || Error::config("data", format!("row {} has no choices (no `Answer format:`)", i + 1));
        self.choices.as_ref().ok_or_else(none)
    }

    /// The tests of the row at place `i`.
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
    /// The name of the function that the prompt begins.
    pub entry_point: String,
    /// A program that defines `check(candidate)`.
    pub test: String,
}

/// The answers of a multiple-choice question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    /// Their names, such as `answer1`, in the order of the instruction.
    pub names: Vec<String>,
    /// What would follow the prompt for each of them.
    pub answers: Vec<String>,
    /// Which is right.
    pub correct: usize,
}
