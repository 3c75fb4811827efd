//! The tables of rotary angles, for each kind of scaling.

use std::f32::consts::PI;

use candle_core::{DType, Device, Result};

use super::positions::{RotaryConfig, RotaryScaling};
pub(super) use crate::models::rotary_table::Angles;
use crate::models::rotary_table::RotaryTable;

/// The angles of a model's rotary positions.
#[derive(Debug)]
pub(super) struct Rotary {
    short: RotaryTable,
    /// The table for texts longer than this many tokens, if it differs (LongRoPE).
    long: Option<(usize, RotaryTable)>,
}

impl Rotary {
    /// Creates the tables for weights of `dtype`.
    pub fn new(config: &RotaryConfig, dtype: DType, device: &Device) -> Self {
        let table = |frequencies, magnitude| RotaryTable::new(frequencies, magnitude, dtype, device);
        let plain = RotaryTable::plain(config.theta, config.dim);
        let (frequencies, magnitude) = match &config.scaling {
            RotaryScaling::None => (plain, 1.0),
            RotaryScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RotaryScaling::Llama3 { .. } => {
                (plain.iter().map(|frequency| slowed(*frequency, &config.scaling)).collect(), 1.0)
            }
            RotaryScaling::Yarn { magnitude, .. } => (ramped(&plain, config), *magnitude),
            RotaryScaling::LongRope { short, long, original, magnitude } => {
                let divided = |by: &[f32]| -> Vec<f32> {
                    let powers =
                        (0..config.dim).step_by(2).map(|i| config.theta.powf(i as f32 / config.dim as f32));
                    powers.zip(by).map(|(power, factor)| 1.0 / (factor * power)).collect()
                };
                let long = table(divided(long), *magnitude);
                return Self { short: table(divided(short), *magnitude), long: Some((*original, long)) };
            }
        };
        Self { short: table(frequencies, magnitude), long: None }
    }

    /// Whether a text of `length` tokens uses the table of long texts.
    pub fn is_long(&self, length: usize) -> bool {
        self.long.as_ref().is_some_and(|(original, _)| length > *original)
    }

    /// Returns cosines and sines of positions `first .. first + count` in a text of `length` tokens,
    /// `(1, count, dim / 2)` each.
    pub fn angles(&self, first: usize, count: usize, length: usize) -> Result<Angles> {
        let table = match &self.long {
            Some((_, long)) if self.is_long(length) => long,
            _ => &self.short,
        };
        table.angles(first, count)
    }
}

/// Applies LLaMA 3.1's rule to one frequency.
fn slowed(frequency: f32, scaling: &RotaryScaling) -> f32 {
    let RotaryScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original } = scaling
    else {
        return frequency;
    };
    let turns = *original as f32 * frequency / (2.0 * PI); // within the original context
    let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    (1.0 - share) * frequency / factor + share * frequency
}

/// Applies YaRN to all frequencies: a ramp from unchanged to divided by `factor`, between the pairs that turn
/// `beta_fast` and `beta_slow` times within the original context.
fn ramped(plain: &[f32], config: &RotaryConfig) -> Vec<f32> {
    let &RotaryScaling::Yarn { factor, beta_fast, beta_slow, original, truncate, .. } = &config.scaling
    else {
        return plain.to_vec();
    };
    let (dim, theta) = (config.dim as f64, f64::from(config.theta));
    let pair = |turns: f32| {
        let wavelength = original as f64 / (f64::from(turns) * 2.0 * std::f64::consts::PI);
        dim * wavelength.ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let ramp = |i: usize| (((i as f64 - low) / (high - low)) as f32).clamp(0.0, 1.0);
    plain.iter().enumerate().map(|(i, f)| f / factor * ramp(i) + f * (1.0 - ramp(i))).collect()
}
