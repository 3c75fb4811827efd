//! The names of the fine-tuning methods, and which options a method of each name has.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The name of a fine-tuning method, as spelled on the command line.
// Exhaustive: every place that makes a method from its name has to know them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MethodName {
    /// MonteCLoRA.
    MonteCLoRA,
    /// MonteCLoRA as in the authors' released code.
    Released,
    /// LoRA.
    Lora,
    /// LoRA with a prior.
    Map,
    /// LoRA-FA.
    LoraFa,
    /// DoRA.
    Dora,
    /// AdaLoRA.
    AdaLora,
    /// BLoB.
    Blob,
    /// IA3.
    Ia3,
    /// Bottleneck adapters.
    Bottleneck,
    /// Prompt tuning.
    Prompt,
    /// Full fine-tuning.
    Full,
}

impl MethodName {
    /// Every name, in the order in which messages list them.
    pub const ALL: [Self; 12] = [
        Self::MonteCLoRA,
        Self::Released,
        Self::Lora,
        Self::Map,
        Self::LoraFa,
        Self::Dora,
        Self::AdaLora,
        Self::Blob,
        Self::Ia3,
        Self::Bottleneck,
        Self::Prompt,
        Self::Full,
    ];

    /// Returns the name as a text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MonteCLoRA => "monteclora",
            Self::Released => "monteclora-released",
            Self::Lora => "lora",
            Self::Map => "map",
            Self::LoraFa => "lora-fa",
            Self::Dora => "dora",
            Self::AdaLora => "adalora",
            Self::Blob => "blob",
            Self::Ia3 => "ia3",
            Self::Bottleneck => "bottleneck",
            Self::Prompt => "prompt",
            Self::Full => "full",
        }
    }

    /// Whether it is MonteCLoRA, of the paper or as released.
    pub const fn is_monteclora(self) -> bool {
        matches!(self, Self::MonteCLoRA | Self::Released)
    }

    /// Whether it adapts layers that can be chosen.
    pub const fn has_targets(self) -> bool {
        !matches!(self, Self::Prompt | Self::Full)
    }

    /// Whether it has a rank, and a B with a learning rate of its own: in a pair B A, or in a bottleneck,
    /// whose width is the rank.
    pub const fn has_rank(self) -> bool {
        self.has_targets() && !matches!(self, Self::Ia3)
    }

    /// Whether its update is a low-rank pair B A, scaled by alpha.
    pub const fn has_pair(self) -> bool {
        self.has_rank() && !matches!(self, Self::Bottleneck)
    }

    /// Whether the pair can be scaled by alpha / sqrt(rank) instead of alpha / rank.
    pub const fn has_rslora(self) -> bool {
        self.has_pair() && !matches!(self, Self::AdaLora | Self::Blob)
    }
}

impl fmt::Display for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for MethodName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|name| name.as_str() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::as_str).join(", ");
            Error::config("method", format!("expected one of {names}, got {text}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_back_to_itself_and_an_unknown_one_is_told_them_all() -> Result<()> {
        for name in MethodName::ALL {
            assert_eq!(name.to_string().parse::<MethodName>()?, name);
        }
        let error = "qlora".parse::<MethodName>().unwrap_err().to_string();
        let names = MethodName::ALL.map(MethodName::as_str).join(", ");
        assert_eq!(error, format!("invalid method: expected one of {names}, got qlora"));
        Ok(())
    }
}
