//! Parts that the encoders' configurations share: defaults, checks, names of classes.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::labels::{self, Labels};

/// The defaults of transformers for fields that a file leaves out.
pub mod defaults {
    use std::collections::BTreeMap;

    /// The exact GELU.
    pub fn gelu() -> String {
        "gelu".to_string()
    }

    /// Dropout in the body.
    pub fn dropout() -> f64 {
        0.1
    }

    /// The standard deviation that new weights start with.
    pub fn initializer_range() -> f64 {
        0.02
    }

    /// The default names of two classes.
    pub fn id2label() -> BTreeMap<usize, String> {
        super::label_names(2)
    }
}

/// Deserialises names of classes, which need not be strings.
///
/// # Errors
/// If the keys are not numbers.
pub fn label_texts<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<BTreeMap<usize, String>, D::Error> {
    let names = BTreeMap::<usize, Value>::deserialize(deserializer)?;
    Ok(names.iter().map(|(class, name)| (*class, labels::plain(name))).collect())
}

/// Hugging Face's default names of `n` classes.
pub fn label_names(n: usize) -> BTreeMap<usize, String> {
    Labels::numbered(n).names().iter().cloned().enumerate().collect()
}

/// Sets the number of classes to `n`. If it changes, all names become the defaults.
pub fn set_num_labels(names: &mut BTreeMap<usize, String>, n: usize) {
    if names.len() != n {
        *names = label_names(n);
    }
}

/// Checks that `heads` divides `width`; `option` is the name of the heads' field.
///
/// # Errors
/// If it does not.
pub fn check_heads(option: &str, heads: usize, width: usize) -> Result<()> {
    if width.is_multiple_of(heads) {
        return Ok(());
    }
    Err(Error::config(option, format!("{heads} heads do not divide {width}")))
}

/// Checks that an option has the only supported value.
///
/// # Errors
/// If it has another value.
pub fn check_is(option: &str, value: &str, expected: &str) -> Result<()> {
    if value == expected {
        return Ok(());
    }
    Err(Error::config(option, format!("expected {expected}, got {value}")))
}
