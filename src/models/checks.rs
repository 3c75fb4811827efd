//! Checks of what the configurations of encoders and decoders have in common.

use crate::error::{Error, Result};
use crate::util::check;

/// # Errors
/// Names the first size that is 0.
pub fn sizes(sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| *size == 0) {
        Some((option, _)) => Err(Error::config(*option, "must be positive")),
        None => Ok(()),
    }
}

/// # Errors
/// Names the first rate that is not in [0, 1).
pub fn rates(rates: &[(&str, f64)]) -> Result<()> {
    rates.iter().try_for_each(|(option, rate)| check::share(option, *rate))
}

/// # Errors
/// If a special token has an id that no word has.
pub fn token_id(option: &str, id: u32, vocab_size: usize) -> Result<()> {
    if (id as usize) < vocab_size {
        return Ok(());
    }
    Err(Error::config(option, format!("{id} is outside a vocabulary of {vocab_size}")))
}
