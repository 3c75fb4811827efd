//! The tables of rotary angles, for each way of scaling them.

use std::f32::consts::PI;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor};

use super::positions::{RotaryConfig, RotaryScaling};

/// Cosines and sines.
pub(super) type Angles = (Tensor, Tensor);

/// Cosines and sines of positions `0 ..`, made as far as they were needed: a model for 131072
/// positions would keep 64 MB that hardly any run reads.
#[derive(Debug)]
pub(super) struct Rotary {
    short: Table,
    /// The table of texts longer than so many tokens, where it is another.
    long: Option<(usize, Table)>,
    dtype: DType,
    device: Device,
}

/// One set of frequencies and what was made of it.
#[derive(Debug)]
struct Table {
    frequencies: Vec<f32>, // (dim / 2)
    magnitude: f32,
    made: Mutex<Option<Angles>>, // (positions, dim / 2) each
}

impl Rotary {
    /// For weights of `dtype`: the angles are in f64 for f64 and in f32 for all others.
    pub fn new(config: &RotaryConfig, dtype: DType, device: &Device) -> Self {
        let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let plain = plain(config);
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
                let long = Table::new(divided(long), *magnitude);
                let short = Table::new(divided(short), *magnitude);
                return Self { short, long: Some((*original, long)), dtype, device: device.clone() };
            }
        };
        Self { short: Table::new(frequencies, magnitude), long: None, dtype, device: device.clone() }
    }

    /// Whether a text of so many tokens has the angles of long ones.
    pub fn is_long(&self, length: usize) -> bool {
        self.long.as_ref().is_some_and(|(original, _)| length > *original)
    }

    /// Cosines and sines of positions `first .. first + count` in a text of `length` tokens,
    /// `(1, count, dim / 2)` each.
    pub fn angles(&self, first: usize, count: usize, length: usize) -> Result<Angles> {
        let table = match &self.long {
            Some((_, long)) if self.is_long(length) => long,
            _ => &self.short,
        };
        let end = first + count;
        let mut made = table.made.lock().unwrap_or_else(PoisonError::into_inner);
        let (cos, sin) = match made.take() {
            Some(tables) if tables.0.dim(0)? >= end => tables,
            _ => table.make(end.next_power_of_two(), self.dtype, &self.device)?,
        };
        let part = |table: &Tensor| table.narrow(0, first, count)?.unsqueeze(0);
        let angles = (part(&cos)?, part(&sin)?);
        *made = Some((cos, sin));
        Ok(angles)
    }
}

impl Table {
    fn new(frequencies: Vec<f32>, magnitude: f32) -> Self {
        Self { frequencies, magnitude, made: Mutex::new(None) }
    }

    /// The angle is rounded to single precision, as in the models' own training.
    fn make(&self, positions: usize, dtype: DType, device: &Device) -> Result<Angles> {
        let angles: Vec<f32> = (0..positions)
            .flat_map(|position| self.frequencies.iter().map(move |frequency| position as f32 * frequency))
            .collect();
        let shape = (positions, self.frequencies.len());
        let table = |f: fn(f32) -> f32| {
            let values = angles.iter().map(|angle| f(*angle) * self.magnitude).collect::<Vec<_>>();
            Tensor::from_vec(values, shape, device)?.to_dtype(dtype)
        };
        Ok((table(f32::cos)?, table(f32::sin)?))
    }
}

/// `theta^(-2 i / dim)`.
fn plain(config: &RotaryConfig) -> Vec<f32> {
    let (dim, theta) = (config.dim, config.theta);
    (0..dim).step_by(2).map(|i| 1.0 / theta.powf(i as f32 / dim as f32)).collect()
}

/// LLaMA 3.1's rule for one frequency.
fn slowed(frequency: f32, scaling: &RotaryScaling) -> f32 {
    let RotaryScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original } = scaling
    else {
        return frequency;
    };
    let turns = *original as f32 * frequency / (2.0 * PI); // within the original context
    let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    (1.0 - share) * frequency / factor + share * frequency
}

/// YaRN's: a ramp between the pairs that turn `beta_fast` and `beta_slow` times within the original context.
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
