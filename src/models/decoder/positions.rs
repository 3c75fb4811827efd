//! Rotary positions: which kind a layer has, and how the angles are scaled.

use crate::error::{Error, Result};
use crate::util::check;

/// The kind of rotary positions of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positions {
    /// The model's main rotary positions, `DecoderConfig::rotary`.
    Global,
    /// `DecoderConfig::local_rotary`: those of layers with a window, which have their own base (Gemma 3).
    Local,
    /// No rotary positions: only the causal mask gives the order (every fourth layer of SmolLM 3).
    None,
}

/// The settings of rotary positions: pair i of the first `dim` elements of each head rotates by
/// `theta^(-2 i / dim)` per position, before scaling.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryConfig {
    /// The base of the frequencies.
    pub theta: f32,
    /// The number of rotated elements of each head: all, or fewer (partial rotary positions).
    pub dim: usize,
    /// How the angles are scaled for longer texts.
    pub scaling: RotaryScaling,
}

/// The scaling of rotary angles for texts longer than those of pre-training.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RotaryScaling {
    /// No scaling.
    None,
    /// All frequencies are divided by `factor` (Chen et al. 2023).
    Linear {
        /// The divisor of the frequencies.
        factor: f32,
    },
    /// LLaMA 3.1's rule: low frequencies are divided by `factor`, high ones stay; interpolated in between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// A frequency is low if it makes fewer turns than this within the original context.
        low_freq_factor: f32,
        /// A frequency is high if it makes more turns than this within the original context.
        high_freq_factor: f32,
        /// The original context, in tokens.
        original: usize,
    },
    /// YaRN (Peng et al. 2023): as `Llama3`, but interpolated linearly in the pair index, and with larger
    /// cosines and sines.
    Yarn {
        /// The divisor of low frequencies.
        factor: f32,
        /// Frequencies with more turns than this within the original context stay.
        beta_fast: f32,
        /// Frequencies with fewer turns than this within the original context are divided by `factor`.
        beta_slow: f32,
        /// The original context, in tokens.
        original: usize,
        /// Whether the ends of the ramp are rounded outwards to whole pairs.
        truncate: bool,
        /// The factor on cosines and sines.
        magnitude: f32,
    },
    /// LongRoPE (Ding et al. 2024): each pair has its own divisor, and another one in texts longer than the
    /// original context.
    LongRope {
        /// The divisors of the pairs' frequencies in texts of up to `original` tokens.
        short: Vec<f32>,
        /// The divisors in longer texts, for all positions of such a text.
        long: Vec<f32>,
        /// The original context, in tokens.
        original: usize,
        /// The factor on cosines and sines.
        magnitude: f32,
    },
}

impl RotaryConfig {
    /// Checks that the values are valid for heads of width `head_dim`.
    ///
    /// # Errors
    /// If one is not; the error names the option.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        check::positive("rope_theta", f64::from(self.theta))?;
        if self.dim == 0 || !self.dim.is_multiple_of(2) || self.dim > head_dim {
            let reason = format!(
                "expected an even number of at most {head_dim} rotated elements per head, got {}",
                self.dim
            );
            return Err(Error::config("partial_rotary_factor", reason));
        }
        let positive = |value: f32| value > 0.0 && value.is_finite();
        let (fits, wanted) = match &self.scaling {
            RotaryScaling::None => (true, ""),
            RotaryScaling::Linear { factor } => (positive(*factor), "linear needs a positive factor"),
            &RotaryScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original } => (
                positive(factor) && positive(low) && high > low && high.is_finite() && original > 0,
                "llama3 needs a positive factor, 0 < low_freq_factor < high_freq_factor and an original \
                 length",
            ),
            &RotaryScaling::Yarn { factor, beta_fast, beta_slow, original, magnitude, .. } => (
                [factor, beta_slow, magnitude].into_iter().all(positive)
                    && positive(beta_fast)
                    && beta_fast >= beta_slow
                    && original > 0
                    && self.theta != 1.0,
                "yarn needs a positive factor, 0 < beta_slow <= beta_fast, an original length and a base \
                 other than 1",
            ),
            RotaryScaling::LongRope { short, long, original, magnitude } => (
                short.len() == self.dim / 2
                    && long.len() == self.dim / 2
                    && short.iter().chain(long).all(|factor| positive(*factor))
                    && *original > 0
                    && positive(*magnitude),
                "longrope needs a positive short_factor and long_factor for each rotated pair of elements, \
                 and an original length",
            ),
        };
        if fits {
            return Ok(());
        }
        Err(Error::config("rope_scaling", format!("{wanted}, got {:?}", self.scaling)))
    }
}
