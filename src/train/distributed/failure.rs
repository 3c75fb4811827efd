//! An error in the form that is sent to the other processes.

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// What the other processes learn of an error.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Failure {
    /// Treated by every process as its own error, as the step may be skipped.
    NonFinite {
        step: usize,
        term: String,
        /// The bits of the value, since JSON has neither NaN nor infinity.
        bits: u64,
        layer: Option<String>,
        rows: Vec<usize>,
    },
    /// Any other error, as text.
    Other(String),
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        match error {
            Error::NonFinite { step, term, value, layer, rows } => Self::NonFinite {
                step: *step,
                term: term.clone(),
                bits: value.to_bits(),
                layer: layer.clone(),
                rows: rows.clone(),
            },
            other => Self::Other(other.to_string()),
        }
    }
}

impl Failure {
    /// Returns the error for the processes other than `rank`, where it occurred.
    pub fn into_error(self, rank: usize) -> Error {
        match self {
            Self::NonFinite { step, term, bits, layer, rows } => {
                Error::NonFinite { step, term, value: f64::from_bits(bits), layer, rows }
            }
            Self::Other(reason) => Error::Distributed { rank, reason },
        }
    }
}
