//! Placeholder, replaced at merge: the examples of a task.

/// One row: a text or a pair of texts, and its label.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The first text.
    pub text_a: String,
    /// The second text of a pair.
    pub text_b: Option<String>,
    /// The label.
    pub label: Label,
}

/// What is to be predicted.
#[derive(Debug, Clone, PartialEq)]
pub enum Label {
    /// A class, counted from 0.
    Class(u32),
    /// A number.
    Score(f32),
}
