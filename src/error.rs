//! The crate's error type.
//!
//! Constructors, injection and everything that reads or writes files return [`Result`]. The arithmetic
//! (`forward`, `rsample`, `kl_divergence`) returns candle's own result, because candle's `Module` trait
//! requires it; `?` converts both ways where needed.

use std::path::PathBuf;

/// The errors of this crate, each variant named after its condition.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration value is outside its domain, or two values contradict each other.
    #[error("invalid {option}: {reason}")]
    Config {
        /// The option at fault, as the user spells it.
        option: String,
        /// What was expected and what was given.
        reason: String,
    },

    /// No linear layer of the model matches the requested targets.
    #[error("no layer matches {targets}; the model has: {available}")]
    NoTarget {
        /// The targets as they were given.
        targets: String,
        /// The names a target could have matched.
        available: String,
    },

    /// A tensor is missing, unexpected, of the wrong shape or dtype, or holds NaN or infinity.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// The tensor's full name.
        name: String,
        /// What was expected and what was found.
        reason: String,
    },

    /// A file does not match its format.
    #[error("{}{}: {reason}", path.display(), line.map(|l| format!(", line {l}")).unwrap_or_default())]
    Format {
        /// The file at fault.
        path: PathBuf,
        /// The 1-based line or row, where the format has lines.
        line: Option<usize>,
        /// What was expected and what was found.
        reason: String,
    },

    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder at fault.
        path: PathBuf,
        /// The underlying error.
        source: std::io::Error,
    },

    /// A request to a model hub failed.
    #[error("hub repository {repo}: {reason}")]
    Hub {
        /// The repository (`owner/name`).
        repo: String,
        /// What happened and what to do about it.
        reason: String,
    },

    /// Training stopped because a loss or gradient was not finite.
    #[error("step {step}: {term} is {value}{}; batch rows {rows:?}", layer.as_ref().map(|l| format!(", first in {l}")).unwrap_or_default())]
    NonFinite {
        /// The optimiser step at which it appeared (1-based).
        step: usize,
        /// The loss term, or the parameter whose gradient was not finite.
        term: String,
        /// The offending value.
        value: f64,
        /// The first layer whose output was not finite, if any.
        layer: Option<String>,
        /// The data rows of the batch.
        rows: Vec<usize>,
    },

    /// Training stopped on request, after a completed step.
    #[error("stopped after step {step}")]
    Interrupted {
        /// The last completed optimiser step (1-based).
        step: usize,
    },

    /// Another process of a distributed run failed, or the communication between the processes did.
    #[error("rank {rank}: {reason}")]
    Distributed {
        /// The rank of the process at fault.
        rank: usize,
        /// The description of its error.
        reason: String,
    },

    /// An error of candle, such as mismatched shapes, dtypes or devices.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Creates an [`Error::Config`] for `option`.
    pub fn config(option: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { option: option.into(), reason: reason.into() }
    }

    /// Creates an [`Error::Tensor`] for the tensor `name`.
    pub fn tensor(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), reason: reason.into() }
    }

    /// Creates an [`Error::Format`] without a line.
    pub fn format(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), line: None, reason: reason.into() }
    }

    /// Creates an [`Error::Format`] for line `line` (1-based) of a file.
    pub fn format_at(path: impl Into<PathBuf>, line: usize, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), line: Some(line), reason: reason.into() }
    }

    /// Turns an I/O error at `path` into [`Error::Io`]; for use with `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}
