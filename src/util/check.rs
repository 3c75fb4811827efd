//! Domains of options.

use crate::error::{Error, Result};

/// # Errors
/// Unless `value` is positive and finite; the error names the option.
pub(crate) fn positive(option: &str, value: f64) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        Ok(())
    } else {
        Err(Error::config(option, format!("expected a positive number, got {value}")))
    }
}

/// # Errors
/// Unless `value` is at least 0 and below 1; the error names the option.
pub(crate) fn share(option: &str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        Ok(())
    } else {
        Err(Error::config(option, format!("expected a number in [0, 1), got {value}")))
    }
}

/// # Errors
/// Unless `value` is zero or positive, and finite; the error names the option.
pub(crate) fn not_negative(option: &str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() {
        Ok(())
    } else {
        Err(Error::config(option, format!("expected zero or a positive number, got {value}")))
    }
}
