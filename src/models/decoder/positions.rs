//! Which rotary positions a layer has, and how their angles grow.

use crate::error::{Error, Result};
use crate::util::check;

/// Which of a model's rotary positions a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positions {
    /// Those of the whole text.
    Global,
    /// Those of layers with a window, where they have a base of their own (Gemma 3).
    Local,
    /// None: order is told by the causal mask alone (SmolLM 3, in every fourth layer).
    None,
}

/// The angles of rotary positions: pair i of the first `dim` elements of each head turns by `theta^(-2 i / dim)` a
/// position, before scaling.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryConfig {
    /// The base.
    pub theta: f32,
    /// How many elements of each head turn: all, or fewer (partial rotary positions).
    pub dim: usize,
    /// How the angles are changed for longer texts.
    pub scaling: RotaryScaling,
}

/// How angles are changed so that a model reads longer texts than it was trained on at first.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RotaryScaling {
    /// Not at all.
    None,
    /// All go `factor` times slower (Chen et al. 2023).
    Linear {
        /// How much slower.
        factor: f32,
    },
    /// LLaMA 3.1's rule: waves longer than the original context go `factor` times slower, short ones stay, those
    /// between are mixed.
    Llama3 {
        /// How much slower.
        factor: f32,
        /// Turns within the original context below which a wave is long.
        low_freq_factor: f32,
        /// Turns above which it is short.
        high_freq_factor: f32,
        /// The original context, in tokens.
        original: usize,
    },
    /// YaRN (Peng et al. 2023): the same idea with a ramp over the pairs, and larger cosines and sines.
    Yarn {
        /// How much slower.
        factor: f32,
        /// Turns within the original context above which a wave stays.
        beta_fast: f32,
        /// Turns below which it is slowed down wholly.
        beta_slow: f32,
        /// The original context, in tokens.
        original: usize,
        /// Whether the ramp begins and ends at whole pairs.
        truncate: bool,
        /// What cosines and sines are multiplied by.
        magnitude: f32,
    },
    /// LongRoPE (Ding et al. 2024): each pair has a divisor of its own, another one once a text is longer than the
    /// original context.
    LongRope {
        /// Divisors of the pairs' angles in short texts.
        short: Vec<f32>,
        /// Those in long texts, whose every position they are for.
        long: Vec<f32>,
        /// The original context, in tokens: the longest short text.
        original: usize,
        /// What cosines and sines are multiplied by.
        magnitude: f32,
    },
}

impl RotaryConfig {
    /// Checks that the values fit each other and heads so wide.
    ///
    /// # Errors
    /// Names the option at fault.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        check::positive("rope_theta", f64::from(self.theta))?;
        if self.dim == 0 || !self.dim.is_multiple_of(2) || self.dim > head_dim {
            let reason = format!("{} of a head's {head_dim} elements cannot turn in pairs", self.dim);
            return Err(Error::config("partial_rotary_factor", reason));
        }
        let positive = |value: f32| value > 0.0 && value.is_finite();
        let (fits, wanted) = match &self.scaling {
            RotaryScaling::None => (true, ""),
            RotaryScaling::Linear { factor } => (positive(*factor), "linear wants a positive factor"),
            &RotaryScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original } => (
                positive(factor) && positive(low) && high > low && high.is_finite() && original > 0,
                "llama3 wants a positive factor, 0 < low_freq_factor < high_freq_factor and an original length",
            ),
            &RotaryScaling::Yarn { factor, beta_fast, beta_slow, original, magnitude, .. } => (
                [factor, beta_slow, magnitude].into_iter().all(positive)
                    && positive(beta_fast)
                    && beta_fast >= beta_slow
                    && original > 0
                    && self.theta != 1.0,
                "yarn wants a positive factor, 0 < beta_slow <= beta_fast, an original length and a base other than 1",
            ),
            RotaryScaling::LongRope { short, long, original, magnitude } => (
                short.len() == self.dim / 2
                    && long.len() == self.dim / 2
                    && short.iter().chain(long).all(|factor| positive(*factor))
                    && *original > 0
                    && positive(*magnitude),
                "longrope wants a positive short_factor and long_factor for each pair of elements that turns, and an \
                 original length",
            ),
        };
        if fits {
            return Ok(());
        }
        Err(Error::config("rope_scaling", format!("{wanted}, got {:?}", self.scaling)))
    }
}
