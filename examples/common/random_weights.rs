//! A model's frozen weights without a file: random, made on the device, one set for all who ask.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use monteclora::noise::{Noise, Purpose};

/// Weights that begin as their layers ask, each made when it is first asked for; clones give the same tensors. On a
/// GPU its own generator makes them, billions in a second: their values mean nothing here, and a thread of the host
/// would take minutes.
pub fn random_weights(dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(Weights(Mutex::default())), dtype, device.clone())
}

/// By name.
struct Weights(Mutex<HashMap<String, Tensor>>);

impl Weights {
    fn find(&self, name: &str) -> Option<Tensor> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }
}

impl SimpleBackend for Weights {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if let Some(weight) = self.find(name) {
            if weight.shape() != &shape {
                candle_core::bail!("{name}: asked for as {:?} and as {shape:?}", weight.shape());
            }
            return weight.to_dtype(dtype);
        }
        let weight = make(&shape, name, init, device)?.to_dtype(dtype)?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_string(), weight.clone());
        Ok(weight)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        match self.find(name) {
            Some(weight) => Ok(weight),
            None => candle_core::bail!("{name}: a new weight needs a shape"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.find(name).is_some()
    }
}

fn make(shape: &Shape, name: &str, init: Init, device: &Device) -> Result<Tensor> {
    match init {
        Init::Randn { mean: 0.0, stdev } if device.is_cpu() => {
            let mut values = vec![0f32; shape.elem_count()];
            Noise::new(1).stream(name, Purpose::Init).fill_normal_f32(0, &mut values);
            values.iter_mut().for_each(|value| *value *= stdev as f32);
            Tensor::from_vec(values, shape, device)
        }
        other => other.var(shape, DType::F32, device).map(|var| var.as_detached_tensor()),
    }
}
