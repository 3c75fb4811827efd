//! The enumerated options of a MonteCLoRA configuration.

use serde::{Deserialize, Serialize};

use crate::adapter::Init;
use crate::error::{Error, Result};

/// How the mixture of N components is drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mixture {
    /// `eps ||pi||_2 F Z` with one Z: the same distribution as [`Self::Explicit`] with 1/N of its noise. The
    /// gradient in pi is the conditional expectation of the explicit one.
    #[default]
    Collapsed,
    /// `eps sum_k pi_k F Z_k` with N matrices, exactly as in the paper's algorithm 1.
    Explicit,
    /// Only the component with the largest weight, with weight one (the paper, section 6.4): `eps F Z`. The
    /// concentration gets no gradient from the task; it learns only from its KL term and the cooperative
    /// loss.
    Sparse,
}

/// How the two terms of the regulariser that depend on the draw are evaluated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlEvaluation {
    /// By their exact expectation: without a draw, so without variance.
    #[default]
    Expected,
    /// At the draw of the pass, as in the paper.
    Sampled,
}

/// Which implementation's numbers to reproduce where they differ from the paper's mathematics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compat {
    /// The paper's mathematics.
    #[default]
    None,
    /// The numbers of PEFT 0.20/0.21, for parity tests and to continue a PEFT run.
    ///
    /// Never the default: PEFT's "KL" of the Dirichlet weights adds `ln Gamma(a)/Gamma(b)` where eq. 12
    /// subtracts it. At a = (1.5, 1.5), b = (1, 1) it is -0.4347, while the divergence is 0.0484. A negative
    /// value is not a divergence, and minimising it drives the weights away from the prior. PEFT also
    /// multiplies the Gaussian term by N and clips variances at 1e-3 (1e-6 in the logits of the weights).
    Peft,
}

/// The initial value of a positive quantity, for all elements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Initial {
    /// This value.
    Constant(f64),
    /// Uniform between two bounds.
    Uniform(f64, f64),
    /// The exponential of a uniform number between two bounds.
    ExpUniform(f64, f64),
}

impl Initial {
    /// Returns the initialisation of the quantity's logarithm.
    pub fn of_log(&self) -> Init {
        match *self {
            Self::Constant(value) => Init::Constant(value.ln()),
            Self::Uniform(low, high) => Init::LogUniform(low, high),
            Self::ExpUniform(low, high) => Init::Uniform(low, high),
        }
    }

    /// Checks that all of its values are positive and at most `most`.
    pub(super) fn validate(&self, option: &str, most: f64) -> Result<()> {
        let good = match *self {
            Self::Constant(value) => value > 0.0 && value <= most,
            Self::Uniform(low, high) => low >= 0.0 && low < high && high <= most,
            Self::ExpUniform(low, high) => low <= high && low.is_finite() && high.exp() <= most,
        };
        if good {
            return Ok(());
        }
        let reason = format!("expected positive, ordered values of at most {most:e}, got {self:?}");
        Err(Error::config(option, reason))
    }
}
