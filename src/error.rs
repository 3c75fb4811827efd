//! The crate's one error type.
//!
//! Constructors, injection and everything that reads or writes files return [`Result`]. The
//! arithmetic (`forward`, `rsample`, `kl_divergence`) returns candle's own result, because
//! candle's `Module` trait asks for it; `?` converts both ways where it is needed.

use std::path::PathBuf;

/// What can go wrong, each variant named after its condition.
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

    /// A file does not hold what its format promises.
    #[error("{}{}: {reason}", path.display(), line.map(|l| format!(", line {l}")).unwrap_or_default())]
    Format {
        /// The file at fault.
        path: PathBuf,
        /// The 1-based line or row, where the format has lines.
        line: Option<usize>,
        /// What was expected and what was found.
        reason: String,
    },

    /// The operating system refused to read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder at fault.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },

    /// A model hub did not give what was asked of it.
    #[error("hub repository {repo}: {reason}")]
    Hub {
        /// The repository (`owner/name`).
        repo: String,
        /// What happened and what to do about it.
        reason: String,
    },

    /// Training met a loss or gradient that is not finite, and stopped.
    #[error("step {step}: {term} is {value}{}; batch rows {rows:?}", layer.as_ref().map(|l| format!(", first in {l}")).unwrap_or_default())]
    NonFinite {
        /// The optimiser step at which it appeared (1-based).
        step: usize,
        /// The term of the loss, or the parameter whose gradient it was.
        term: String,
        /// The offending value.
        value: f64,
        /// The first layer whose output was not finite, where there is one.
        layer: Option<String>,
        /// The data rows of the batch.
        rows: Vec<usize>,
    },

    /// Training was asked to stop and did, after a whole step.
    #[error("stopped after step {step}")]
    Interrupted {
        /// The last optimiser step that was taken (1-based).
        step: usize,
    },

    /// Another process of a distributed run failed, or the communication between the processes did.
    #[error("rank {rank}: {reason}")]
    Distributed {
        /// The process at fault.
        rank: usize,
        /// Its error, in words.
        reason: String,
    },

    /// Candle failed: shapes, dtypes, devices.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A [`Error::Config`] for `option`.
    pub fn config(option: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { option: option.into(), reason: reason.into() }
    }

    /// A [`Error::Tensor`] for the tensor `name`.
    pub fn tensor(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), reason: reason.into() }
    }

    /// A [`Error::Format`] for a file without lines.
    pub fn format(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), line: None, reason: reason.into() }
    }

    /// A [`Error::Format`] for line `line` (1-based) of a file.
    pub fn format_at(path: impl Into<PathBuf>, line: usize, reason: impl Into<String>) -> Self {
        Self::Format { path: path.into(), line: Some(line), reason: reason.into() }
    }

    /// Turns an I/O error at `path` into [`Error::Io`]; made for `map_err`.
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
