//! The angles of the rotary positions, one table for all layers of a type.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor};

/// Cosines and sines of positions `0 ..`, made as far as they were needed.
#[derive(Debug)]
pub struct Rotary {
    frequencies: Vec<f32>, // (head_dim / 2)
    dtype: DType,
    device: Device,
    tables: Mutex<Option<(Tensor, Tensor)>>, // (positions, head_dim / 2) each
}

impl Rotary {
    /// Frequencies `theta^(-2 i / dim)`, for weights of `dtype`: the angles are in f64 for f64 and in f32 for all
    /// others.
    pub fn new(theta: f64, dim: usize, dtype: DType, device: &Device) -> Self {
        let dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let frequency = |i: usize| 1.0 / (theta as f32).powf(i as f32 / dim as f32);
        let frequencies = (0..dim).step_by(2).map(frequency).collect();
        Self { frequencies, dtype, device: device.clone(), tables: Mutex::new(None) }
    }

    /// Cosines and sines of the first `count` positions, `(1, count, head_dim / 2)` each.
    ///
    /// # Errors
    /// If candle fails.
    pub fn angles(&self, count: usize) -> Result<(Tensor, Tensor)> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let (cos, sin) = match tables.take() {
            Some(tables) if tables.0.dim(0)? >= count => tables,
            _ => self.make(count.next_power_of_two())?,
        };
        let part = |table: &Tensor| table.narrow(0, 0, count)?.unsqueeze(0);
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
