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

/// The inherent methods that all encoders' configurations have, to be called without a trait in scope: reading
/// a file, by `validate` of the same type, and the number of classes in `id2label`. Arguments are the fields
/// whose objects may have explicit nulls for absent fields, as the configuration itself may.
macro_rules! config_methods {
    ($($inner:literal),*) => {
        /// Reads and checks a `config.json`.
        ///
        /// # Errors
        /// If the file cannot be read, is not such a configuration, or requires an unsupported option.
        pub fn from_file(path: &::std::path::Path) -> $crate::error::Result<Self> {
            Self::parse($crate::util::json::read_config(path)?.as_bytes(), path)
        }

        /// Like [`Self::from_file`], from the file's bytes; `path` is only used in errors.
        pub(crate) fn parse(text: &[u8], path: &::std::path::Path) -> $crate::error::Result<Self> {
            let config: Self = $crate::util::json::parse_config(text, path, &[$($inner),*])?;
            config.validate().map_err(|e| $crate::error::Error::format(path, e.to_string()))?;
            Ok(config)
        }

        /// The number of outputs of a classification head.
        pub fn num_labels(&self) -> usize {
            self.id2label.len()
        }

        /// The same configuration with `n` outputs. If the number changes, the outputs get Hugging Face's
        /// default names.
        pub fn with_num_labels(mut self, n: usize) -> Self {
            $crate::models::encoder::config::set_num_labels(&mut self.id2label, n);
            self
        }
    };
}
pub(crate) use config_methods;
