//! The angles of the rotary position embedding, plain and with LLaMA 3's scaling.

use std::f32::consts::PI;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor};
use candle_transformers::models::llama::{Llama3RopeConfig, Llama3RopeType};

use super::config::DecoderConfig;

/// Cosines and sines of positions `0 ..`, made as far as they were needed: a model for 131072
/// positions would keep 64 MB that hardly any run reads.
#[derive(Debug)]
pub(super) struct Rotary {
    frequencies: Vec<f32>, // (head_dim / 2)
    dtype: DType,
    device: Device,
    tables: Mutex<Option<(Tensor, Tensor)>>, // (positions, head_dim / 2) each
}

impl Rotary {
    /// For weights of `dtype`: the angles are in f64 for f64 and in f32 for all others.
    pub fn new(config: &DecoderConfig, dtype: DType, device: &Device) -> Self {
        let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        Self { frequencies: frequencies(config), dtype, device: device.clone(), tables: Mutex::new(None) }
    }

    /// Cosines and sines of positions `first .. first + count`, `(1, count, head_dim / 2)` each.
    pub fn angles(&self, first: usize, count: usize) -> Result<(Tensor, Tensor)> {
        let end = first + count;
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let (cos, sin) = match tables.take() {
            Some(tables) if tables.0.dim(0)? >= end => tables,
            _ => self.make(end.next_power_of_two())?,
        };
        let part = |table: &Tensor| table.narrow(0, first, count)?.unsqueeze(0);
        let angles = (part(&cos)?, part(&sin)?);
        *tables = Some((cos, sin));
        Ok(angles)
    }

    /// The angle is rounded to single precision, as in the models' own training.
    fn make(&self, positions: usize) -> Result<(Tensor, Tensor)> {
        let angles: Vec<f32> = (0..positions)
            .flat_map(|position| self.frequencies.iter().map(move |frequency| position as f32 * frequency))
            .collect();
        let shape = (positions, self.frequencies.len());
        let table = |f: fn(f32) -> f32| {
            let values = angles.iter().map(|angle| f(*angle)).collect::<Vec<_>>();
            Tensor::from_vec(values, shape, &self.device)?.to_dtype(self.dtype)
        };
        Ok((table(f32::cos)?, table(f32::sin)?))
    }
}

/// `theta^(-2 i / dim)`, slowed down for long waves where the configuration says so.
fn frequencies(config: &DecoderConfig) -> Vec<f32> {
    let dim = config.head_dim();
    let theta = config.decoder.rope_theta;
    let plain = (0..dim).step_by(2).map(|i| 1.0 / theta.powf(i as f32 / dim as f32));
    match &config.decoder.rope_scaling {
        Some(scaling) if matches!(scaling.rope_type, Llama3RopeType::Llama3) => {
            plain.map(|frequency| slowed(frequency, scaling)).collect()
        }
        _ => plain.collect(),
    }
}

/// LLaMA 3.1's rule: waves longer than the original context go `factor` times slower, short ones
/// stay, those between are mixed.
fn slowed(frequency: f32, scaling: &Llama3RopeConfig) -> f32 {
    let original = scaling.original_max_position_embeddings as f32;
    let (low, high) = (scaling.low_freq_factor, scaling.high_freq_factor);
    let turns = original * frequency / (2.0 * PI); // within the original context
    let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    (1.0 - share) * frequency / scaling.factor + share * frequency
}
