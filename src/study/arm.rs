//! The arms of a study: what its comparisons compare.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::treatment::MEAN;
use crate::error::{Error, Result};

/// A method and a way to predict with it, written `lora:rank=4 (mean)` in plans and reports. Arms are in the
/// order of their methods, and then of their treatments.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Arm {
    /// The recipe's text.
    pub method: String,
    /// The way to predict with the trained model: `mean`, `10 draws`, `temperature` ...
    pub treatment: String,
}

impl Arm {
    /// An arm from its parts.
    pub fn new(method: impl Into<String>, treatment: impl Into<String>) -> Self {
        Self { method: method.into(), treatment: treatment.into() }
    }

    /// The arm that every method has.
    pub(super) fn mean_of(method: &str) -> Self {
        Self::new(method, MEAN)
    }

    /// The name that the recipe begins with, without its options.
    pub(super) fn recipe_name(&self) -> &str {
        self.method.split(':').next().unwrap_or_default()
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.method, self.treatment)
    }
}

impl FromStr for Arm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = text.strip_suffix(')').and_then(|text| text.split_once(" ("));
        let (method, treatment) = parts.ok_or_else(|| {
            Error::config("arm", format!("expected an arm as \"lora (mean)\", got {text:?}"))
        })?;
        Ok(Self::new(method, treatment))
    }
}

impl From<Arm> for String {
    fn from(arm: Arm) -> Self {
        arm.to_string()
    }
}

impl TryFrom<String> for Arm {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_arm_is_one_text_in_files_and_in_the_order_of_its_parts() -> Result<()> {
        let text = "lora:rank=4 (last-layer laplace)";
        let arm: Arm = text.parse()?;
        assert_eq!(arm, Arm::new("lora:rank=4", "last-layer laplace"));
        assert_eq!((arm.to_string().as_str(), arm.recipe_name()), (text, "lora"));
        assert_eq!(serde_json::to_value(&arm).ok(), Some(json!(text)));
        assert_eq!(serde_json::from_value::<Arm>(json!(text)).ok(), Some(arm));
        // As texts these two would be the other way round: ')' comes after ' '.
        assert!(Arm::new("lora", "tfb") < Arm::new("lora", "tfb held-out"));
        assert!(Arm::mean_of("lora") < Arm::new("lora:rank=4", "laplace"));
        for text in ["lora", "lora (mean", "lora(mean)", ""] {
            let error = serde_json::from_value::<Arm>(json!(text)).map(drop).unwrap_err().to_string();
            assert!(error.contains(&format!("expected an arm as \"lora (mean)\", got {text:?}")), "{error}");
        }
        Ok(())
    }
}
