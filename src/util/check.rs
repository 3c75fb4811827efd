//! Checks the domains of options.

use crate::error::{Error, Result};

/// Checks that `value` is positive and finite.
///
/// # Errors
/// If it is not; the error names the option.
pub(crate) fn positive(option: &str, value: f64) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        Ok(())
    } else {
        Err(Error::config(option, format!("expected a positive number, got {value}")))
    }
}

/// Checks that `value` is at least 1.
///
/// # Errors
/// If it is 0; the error names the option.
pub(crate) fn at_least_one(option: &str, value: usize) -> Result<()> {
    if value == 0 {
        return Err(Error::config(option, "expected at least 1, got 0"));
    }
    Ok(())
}

/// Checks that `value` is at least 0 and below 1.
///
/// # Errors
/// If it is not; the error names the option.
pub(crate) fn share(option: &str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        Ok(())
    } else {
        Err(Error::config(option, format!("expected a number in [0, 1), got {value}")))
    }
}

/// Checks that `value` is at least 0 and finite.
///
/// # Errors
/// If it is not; the error names the option.
pub(crate) fn not_negative(option: &str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() {
        Ok(())
    } else {
        Err(Error::config(option, format!("expected zero or a positive number, got {value}")))
    }
}
