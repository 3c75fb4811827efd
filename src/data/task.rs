//! The text classification tasks of GLUE and SuperGLUE, and their examples.
//!
//! [`Task::load_folder`] reads a task from a folder.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::labels::Labels;

/// A GLUE or SuperGLUE task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// Microsoft Research Paraphrase Corpus: do two sentences mean the same?
    Mrpc,
    /// Corpus of Linguistic Acceptability: is a sentence grammatical?
    Cola,
    /// Recognising Textual Entailment.
    Rte,
    /// Word in Context: does a word mean the same in two sentences?
    Wic,
    /// Yes/no questions about a passage.
    BoolQ,
    /// Stanford Sentiment Treebank, two classes.
    Sst2,
    /// Does a sentence answer a question?
    Qnli,
    /// Quora Question Pairs: are two questions duplicates?
    Qqp,
    /// Multi-genre natural language inference, three classes.
    Mnli,
    /// Semantic Textual Similarity Benchmark: a score from 0 to 5.
    Stsb,
}

/// The answer to an example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Label {
    /// A class, counted from 0 in the order of [`Task::label_names`].
    Class(u32),
    /// The number to predict, for regression.
    Score(f32),
    /// Not known: a row to predict. It is ignored by losses and metrics.
    Unknown,
}

impl Label {
    /// A similarity score, if it is in the benchmark's range.
    pub(crate) fn checked_score(score: f32) -> std::result::Result<Self, String> {
        if (0.0..=5.0).contains(&score) {
            Ok(Self::Score(score))
        } else {
            Err(format!("score {score}, expected a number from 0 to 5"))
        }
    }
}

/// One example: a text or a pair, and the answer where it is known.
///
/// ```
/// use monteclora::data::task::{Example, Label};
///
/// let labelled = Example::new("A fine film.", None, Label::Class(1));
/// let pair = Example::from(("Is it raining?", "It is wet outside.")); // to predict: without a label
/// assert_eq!((labelled.text_b, pair.label), (None, Label::Unknown));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The first text, or the only one.
    pub text_a: String,
    /// The second text of a pair.
    pub text_b: Option<String>,
    /// The answer.
    pub label: Label,
}

impl Example {
    /// Creates an example, with trailing white space removed from its texts.
    ///
    /// Some data sets have trailing white space (SST-2 ends every sentence with a space), and byte-level
    /// tokenizers make a token of it. Every reader creates its rows here, so that all formats give the same
    /// tokens.
    pub fn new(text_a: &str, text_b: Option<&str>, label: Label) -> Self {
        let text = |text: &str| text.trim_end().to_owned();
        Self { text_a: text(text_a), text_b: text_b.map(text), label }
    }
}

impl From<&str> for Example {
    /// A text to predict.
    fn from(text: &str) -> Self {
        Self::new(text, None, Label::Unknown)
    }
}

impl From<&String> for Example {
    /// A text to predict.
    fn from(text: &String) -> Self {
        Self::from(text.as_str())
    }
}

impl From<(&str, &str)> for Example {
    /// A pair of texts to predict.
    fn from((text_a, text_b): (&str, &str)) -> Self {
        Self::new(text_a, Some(text_b), Label::Unknown)
    }
}

impl From<&Self> for Example {
    /// A copy.
    fn from(example: &Self) -> Self {
        example.clone()
    }
}

/// Returns `examples`, or an error that names `path` if there are none.
pub(super) fn non_empty(examples: Vec<Example>, path: &Path) -> Result<Vec<Example>> {
    if examples.is_empty() {
        return Err(Error::format(path, "no examples"));
    }
    Ok(examples)
}

/// A task's labelled examples.
#[derive(Debug, Clone, PartialEq)]
pub struct Splits {
    /// The training set.
    pub train: Vec<Example>,
    /// The development sets by name: `matched` and `mismatched` for MNLI, one `dev` otherwise.
    pub dev: Vec<(String, Vec<Example>)>,
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 10] = [
        Self::Mrpc,
        Self::Cola,
        Self::Rte,
        Self::Wic,
        Self::BoolQ,
        Self::Sst2,
        Self::Qnli,
        Self::Qqp,
        Self::Mnli,
        Self::Stsb,
    ];

    /// The name, in lower case; also the task's configuration in its hub repository.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mrpc => "mrpc",
            Self::Cola => "cola",
            Self::Rte => "rte",
            Self::Wic => "wic",
            Self::BoolQ => "boolq",
            Self::Sst2 => "sst2",
            Self::Qnli => "qnli",
            Self::Qqp => "qqp",
            Self::Mnli => "mnli",
            Self::Stsb => "stsb",
        }
    }

    /// The names of the classes, in the order of their numbers; empty for regression.
    pub const fn label_names(self) -> &'static [&'static str] {
        match self {
            Self::Mrpc => &["not_equivalent", "equivalent"],
            Self::Cola => &["unacceptable", "acceptable"],
            Self::Rte | Self::Qnli => &["entailment", "not_entailment"],
            Self::Wic | Self::BoolQ => &["false", "true"],
            Self::Sst2 => &["negative", "positive"],
            Self::Qqp => &["not_duplicate", "duplicate"],
            Self::Mnli => &["entailment", "neutral", "contradiction"],
            Self::Stsb => &[],
        }
    }

    /// The number of outputs of a classification head: 1 for regression.
    pub const fn num_labels(self) -> usize {
        if self.is_regression() {
            1
        } else {
            self.label_names().len()
        }
    }

    /// Whether the answer is a number rather than a class.
    pub const fn is_regression(self) -> bool {
        matches!(self, Self::Stsb)
    }

    /// The metric that picks the best checkpoint: `matthews`, `pearson` or `accuracy`.
    pub const fn primary_metric(self) -> &'static str {
        match self {
            Self::Cola => "matthews",
            Self::Stsb => "pearson",
            _ => "accuracy",
        }
    }

    /// The metrics that its benchmark reports on each development set.
    pub const fn metrics(self) -> &'static [&'static str] {
        match self {
            Self::Mrpc | Self::Qqp => &["accuracy", "f1"],
            Self::Cola => &["matthews"],
            Self::Stsb => &["pearson", "spearman"],
            _ => &["accuracy"],
        }
    }

    /// Possible names of the task's folder: the benchmark's first, then the hub's.
    pub const fn folder_names(self) -> &'static [&'static str] {
        match self {
            Self::Mrpc => &["MRPC", "mrpc"],
            Self::Cola => &["CoLA", "cola"],
            Self::Rte => &["RTE", "rte"],
            Self::Wic => &["WiC", "wic", "WiC_dataset"],
            Self::BoolQ => &["BoolQ", "boolq"],
            Self::Sst2 => &["SST-2", "sst2"],
            Self::Qnli => &["QNLI", "qnli"],
            Self::Qqp => &["QQP", "qqp"],
            Self::Mnli => &["MNLI", "mnli"],
            Self::Stsb => &["STS-B", "stsb"],
        }
    }

    /// The data set repository on the hub.
    pub const fn hub_repo(self) -> &'static str {
        match self {
            Self::Wic | Self::BoolQ => "aps/super_glue",
            _ => "nyu-mll/glue",
        }
    }

    /// The sets as (name in [`Splits`], name on the hub), `train` first.
    pub(crate) const fn hub_splits(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Mnli => &[
                ("train", "train"),
                ("matched", "validation_matched"),
                ("mismatched", "validation_mismatched"),
            ],
            _ => &[("train", "train"), ("dev", "validation")],
        }
    }

    /// The files to fetch from [`Self::hub_repo`], as (name of the set in [`Splits`], path in the
    /// repository), `train` first.
    pub fn hub_files(self) -> Vec<(String, String)> {
        let file = |split| format!("{}/{split}-00000-of-00001.parquet", self.name());
        self.hub_splits().iter().map(|(name, split)| ((*name).to_owned(), file(split))).collect()
    }
}

impl From<Task> for Labels {
    /// The names of the task's classes; for a regression, the name of its one output.
    fn from(task: Task) -> Self {
        match task.label_names() {
            [] => Self::numbered(task.num_labels()),
            names => Self::new(names.iter().copied()).unwrap_or_else(|_| Self::numbered(names.len())),
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Task {
    type Err = Error;

    /// Reads a name in upper or lower case, with or without its hyphen (`sst2`, `SST-2`).
    fn from_str(text: &str) -> Result<Self> {
        let plain = text.to_ascii_lowercase().replace(['-', '_'], "");
        Self::ALL.into_iter().find(|task| task.name() == plain).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::config("task", format!("{text:?}, expected one of {names}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_strangers_refused() {
        for task in Task::ALL {
            assert_eq!(task.name().parse::<Task>().unwrap(), task);
            assert_eq!(task.folder_names()[0].parse::<Task>().unwrap(), task);
            assert_eq!(task.num_labels() == 1, task.is_regression());
            assert_eq!(task.hub_files()[0].0, "train");
            assert!(task.metrics().contains(&task.primary_metric()));
            assert_eq!(Labels::from(task).len(), task.num_labels());
            assert_eq!(Labels::from(task).are_numbers(), task.is_regression());
        }
        let message = "wnli".parse::<Task>().unwrap_err().to_string();
        assert!(message.starts_with("invalid task: \"wnli\", expected one of mrpc, cola,"), "{message}");
        let files = Task::Mnli.hub_files();
        assert_eq!(files[2].1, "mnli/validation_mismatched-00000-of-00001.parquet");
    }
}
