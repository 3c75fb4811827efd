//! Checks of configuration fields that encoders and decoders share.

use crate::error::{Error, Result};
use crate::util::check;

/// Checks that every size is at least 1.
///
/// # Errors
/// If a size is 0; the error names the first.
pub fn sizes(sizes: &[(&str, usize)]) -> Result<()> {
    sizes.iter().try_for_each(|(option, size)| check::at_least_one(option, *size))
}

/// Checks that every rate is in `[0, 1)`.
///
/// # Errors
/// If a rate is not; the error names the first.
pub fn rates(rates: &[(&str, f64)]) -> Result<()> {
    rates.iter().try_for_each(|(option, rate)| check::share(option, *rate))
}

/// Checks that the id of a special token is in the vocabulary.
///
/// # Errors
/// If it is not.
pub fn token_id(option: &str, id: u32, vocab_size: usize) -> Result<()> {
    if (id as usize) < vocab_size {
        return Ok(());
    }
    Err(Error::config(option, format!("{id} is outside a vocabulary of {vocab_size}")))
}
