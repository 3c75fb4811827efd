//! Cosines and sines of rotary positions.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor};

/// Cosines and sines.
pub type Angles = (Tensor, Tensor);

/// The cosines and sines of one set of frequencies at positions `0 ..`, computed only as far as they were
/// needed: the table of a model with 131072 positions would take 64 MB that hardly any run reads.
#[derive(Debug)]
pub struct RotaryTable {
    frequencies: Vec<f32>, // (dim / 2)
    magnitude: f32,
    dtype: DType,
    device: Device,
    made: Mutex<Option<Angles>>, // (positions, dim / 2) each
}

impl RotaryTable {
    /// Creates a table for weights of `dtype`: its values are f64 for f64 weights and f32 for all others.
    /// Cosines and sines are multiplied by `magnitude`.
    pub fn new(frequencies: Vec<f32>, magnitude: f32, dtype: DType, device: &Device) -> Self {
        let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        Self { frequencies, magnitude, dtype, device: device.clone(), made: Mutex::new(None) }
    }

    /// The unscaled frequencies, `theta^(-2 i / dim)`.
    pub fn plain(theta: f32, dim: usize) -> Vec<f32> {
        (0..dim).step_by(2).map(|i| 1.0 / theta.powf(i as f32 / dim as f32)).collect()
    }

    /// Cosines and sines of positions `first .. first + count`, `(1, count, dim / 2)` each.
    ///
    /// # Errors
    /// If candle fails.
    pub fn angles(&self, first: usize, count: usize) -> Result<Angles> {
        let end = first + count;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let (cos, sin) = match made.take() {
            Some(tables) if tables.0.dim(0)? >= end => tables,
            _ => self.make(end.next_power_of_two())?,
        };
        let part = |table: &Tensor| table.narrow(0, first, count)?.unsqueeze(0);
        let angles = (part(&cos)?, part(&sin)?);
        *made = Some((cos, sin));
        Ok(angles)
    }

    /// Computes the table. The angles are rounded to single precision, as in the models' own training.
    fn make(&self, positions: usize) -> Result<Angles> {
        let angles: Vec<f32> = (0..positions)
            .flat_map(|position| self.frequencies.iter().map(move |frequency| position as f32 * frequency))
            .collect();
        let shape = (positions, self.frequencies.len());
        let table = |f: fn(f32) -> f32| {
            let values = angles.iter().map(|angle| f(*angle) * self.magnitude).collect::<Vec<_>>();
            Tensor::from_vec(values, shape, &self.device)?.to_dtype(self.dtype)
        };
        Ok((table(f32::cos)?, table(f32::sin)?))
    }
}
