//! A model's frozen weights without a file: random, made on the device, and shared by all models.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use monteclora::models::{Quantization, QuantizedSource, Wanted, Weights as ModelWeights};
use monteclora::noise::{Noise, Purpose};
use monteclora::ops::QuantizedWeight;

/// A model's frozen base: [`random_weights`], or a quantised version of them, each made once and shared as
/// well.
pub fn base(dtype: DType, quantization: Option<Quantization>, device: &Device) -> ModelWeights<'static> {
    let dense = random_weights(dtype, device);
    let Some(quantization) = quantization else { return dense.into() };
    let passing = VarBuilder::from_backend(Box::new(Passing), DType::F32, Device::Cpu);
    let blocks = Blocks { source: quantization.source(&passing), made: Mutex::default() };
    ModelWeights::new(dense, Arc::new(blocks))
}

/// Weights with the initialisation that their layers ask for, each made at its first use; clones give the
/// same tensors. On a GPU the device's own generator makes them, billions per second: their values do not
/// matter, and one host thread would take minutes.
pub fn random_weights(dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(Weights(Mutex::default())), dtype, device.clone())
}

/// Weights by name.
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

/// The same weights without storing them: quantisation needs each only once.
struct Passing;

impl SimpleBackend for Passing {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        make(&shape, name, init, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("{name}: a new weight needs a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        false
    }
}

/// Quantised weights by name, as a source made them.
struct Blocks {
    source: Arc<dyn QuantizedSource>,
    made: Mutex<HashMap<String, QuantizedWeight>>,
}

impl QuantizedSource for Blocks {
    fn get(&self, wanted: &Wanted) -> monteclora::Result<Option<QuantizedWeight>> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(weight) = made.get(wanted.name) {
            return Ok(Some(weight.clone()));
        }
        let weight = self.source.get(wanted)?;
        made.extend(weight.clone().map(|weight| (wanted.name.to_string(), weight)));
        Ok(weight)
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
