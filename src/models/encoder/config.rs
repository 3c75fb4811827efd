//! What the encoders' configurations have in common: defaults, checks, the names of the classes.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::labels::{self, Labels};

/// What transformers takes where a file says nothing.
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

    /// Two classes.
    pub fn id2label() -> BTreeMap<usize, String> {
        super::label_names(2)
    }
}

/// Names of classes, which need be no texts.
///
/// # Errors
/// If they are not numbered.
pub fn label_texts<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<BTreeMap<usize, String>, D::Error> {
    let names = BTreeMap::<usize, Value>::deserialize(deserializer)?;
    Ok(names.iter().map(|(class, name)| (*class, labels::plain(name))).collect())
}

/// Classes as Hugging Face names them where nobody does.
pub fn label_names(n: usize) -> BTreeMap<usize, String> {
    Labels::numbered(n).names().iter().cloned().enumerate().collect()
}

/// Makes it `n` classes; the names stay where there are as many.
pub fn set_num_labels(names: &mut BTreeMap<usize, String>, n: usize) {
    if names.len() != n {
        *names = label_names(n);
    }
}

/// # Errors
/// Unless `heads` divides `width`; `option` is what the file calls the heads.
pub fn check_heads(option: &str, heads: usize, width: usize) -> Result<()> {
    if width.is_multiple_of(heads) {
        return Ok(());
    }
    Err(Error::config(option, format!("{heads} heads do not divide {width}")))
}

/// # Errors
/// Unless the option has the one value that is supported.
pub fn check_is(option: &str, value: &str, expected: &str) -> Result<()> {
    if value == expected {
        return Ok(());
    }
    Err(Error::config(option, format!("expected {expected}, got {value}")))
}
