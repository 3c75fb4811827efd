//! An error as it crosses from one process to the others.

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// What the other processes are told of an error.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Failure {
    /// All of them treat it as their own: a step may be left out.
    NonFinite {
        step: usize,
        term: String,
        /// The bits of the value, since JSON has neither NaN nor infinity.
        bits: u64,
        layer: Option<String>,
        rows: Vec<usize>,
    },
    /// Anything else, in words.
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
    /// The error that the processes beside `rank` return.
    pub fn into_error(self, rank: usize) -> Error {
        match self {
            Self::NonFinite { step, term, bits, layer, rows } => {
                Error::NonFinite { step, term, value: f64::from_bits(bits), layer, rows }
            }
            Self::Other(reason) => Error::Distributed { rank, reason },
        }
    }
}
