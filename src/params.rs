//! The one store of trainable parameters.
//!
//! Parameters have stable names, a role and a fixed order, and start from the seed and their own
//! path. (Candle's `VarMap` starts from a generator that cannot be seeded, in the order of a
//! `HashMap`.) The optimiser, learning-rate groups, freezing, the regulariser and files know
//! parameters by these names and roles only.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::init::NormalOrUniform;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::VarBuilder;

use crate::error::{Error, Result};
use crate::noise::{Noise, Purpose};

/// What a parameter is to its method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Role {
    /// A weight of the model itself: full fine-tuning and pre-training.
    Base,
    /// A weight of a task head trained beside an adapter.
    Head,
    /// The down-projection A of a low-rank adapter.
    A,
    /// The up-projection B of a low-rank adapter.
    B,
    /// The logarithm of the Wishart scale's standard deviations, rho (`std_prior`).
    Scale,
    /// The logarithm of the Dirichlet concentration, c (`expert_weights_prior`).
    Concentration,
}

/// How a new parameter starts.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Init {
    /// Every element the same.
    Constant(f64),
    /// Uniform between the two bounds.
    Uniform(f64, f64),
    /// Normal with mean zero and this standard deviation.
    Normal(f64),
    /// The logarithm of a uniform number between the two (positive) bounds.
    LogUniform(f64, f64),
}

/// One trainable parameter.
#[derive(Debug, Clone)]
pub struct Param {
    /// The variable; layers hold the same tensor.
    pub var: Var,
    /// What it is to its method.
    pub role: Role,
    /// Whether the optimiser changes it.
    pub trainable: bool,
}

/// The store: a handle, cheap to clone; clones share their parameters.
#[derive(Debug, Clone)]
pub struct Params {
    entries: Arc<Mutex<BTreeMap<String, Param>>>,
    noise: Noise,
    dtype: DType,
    device: Device,
}

impl Params {
    /// An empty store of single-precision parameters on `device`.
    pub fn new(noise: Noise, device: &Device) -> Self {
        Self::with_dtype(noise, DType::F32, device)
    }

    /// An empty store of another dtype: double precision for tests of laws and gradients.
    pub fn with_dtype(noise: Noise, dtype: DType, device: &Device) -> Self {
        Self { entries: Arc::default(), noise, dtype, device: device.clone() }
    }

    /// The noise that initial values, draws and dropout come from.
    pub fn noise(&self) -> Noise {
        self.noise
    }

    /// The dtype of every parameter.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device of every parameter.
    pub fn device(&self) -> &Device {
        &self.device
    }

    // A panic while the lock is held leaves the map whole: each change is a single insertion.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Param>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new parameter `name`, started from the seed and its name. Its values do not depend on
    /// which other parameters exist.
    ///
    /// # Errors
    /// If the name is taken, or a bound of `init` is not finite.
    pub fn create(&self, name: &str, role: Role, shape: impl Into<Shape>, init: &Init) -> Result<Tensor> {
        let shape = shape.into();
        let mut values = vec![0f64; shape.elem_count()];
        let stream = self.noise.stream(name, Purpose::Init);
        match *init {
            Init::Constant(value) => values.fill(value),
            Init::Normal(std) => {
                stream.fill_normal(0, &mut values);
                values.iter_mut().for_each(|v| *v *= std);
            }
            Init::Uniform(low, high) => {
                stream.fill_uniform(0, &mut values);
                values.iter_mut().for_each(|v| *v = low + (high - low) * *v);
            }
            Init::LogUniform(low, high) => {
                stream.fill_uniform(0, &mut values);
                values.iter_mut().for_each(|v| *v = (low + (high - low) * *v).ln());
            }
        }
        if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
            return Err(Error::tensor(name, format!("initial value {bad} is not finite ({init:?})")));
        }
        self.insert(name, role, &Tensor::from_vec(values, shape, &self.device)?)
    }

    /// A new parameter with given values, copied and cast to the store's dtype and device.
    ///
    /// # Errors
    /// If the name is taken.
    pub fn insert(&self, name: &str, role: Role, values: &Tensor) -> Result<Tensor> {
        let mut entries = self.lock();
        if entries.contains_key(name) {
            return Err(Error::tensor(name, "a parameter of this name exists already"));
        }
        let values = values.to_device(&self.device)?.to_dtype(self.dtype)?;
        let var = Var::from_tensor(&values)?;
        let tensor = var.as_tensor().clone();
        entries.insert(name.to_string(), Param { var, role, trainable: true });
        Ok(tensor)
    }

    /// The parameter `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<Param> {
        self.lock().get(name).cloned()
    }

    /// Removes the parameter `name`; layers that hold its tensor keep it.
    pub fn remove(&self, name: &str) -> Option<Param> {
        self.lock().remove(name)
    }

    /// All parameters, in the order of their names.
    pub fn all(&self) -> Vec<(String, Param)> {
        self.lock().iter().map(|(name, param)| (name.clone(), param.clone())).collect()
    }

    /// The parameters that the optimiser changes, in the order of their names.
    pub fn trainable(&self) -> Vec<(String, Param)> {
        self.all().into_iter().filter(|(_, param)| param.trainable).collect()
    }

    /// The number of trainable scalars.
    pub fn trainable_count(&self) -> usize {
        self.trainable().iter().map(|(_, param)| param.var.elem_count()).sum()
    }

    /// Freezes or releases every parameter of a role; returns how many there are.
    pub fn set_trainable(&self, role: Role, trainable: bool) -> usize {
        self.set_trainable_where(trainable, |_, param| param.role == role)
    }

    /// Freezes or releases every parameter that `chosen` picks by its name and role; returns how many
    /// there are.
    pub fn set_trainable_where(&self, trainable: bool, chosen: impl Fn(&str, &Param) -> bool) -> usize {
        let mut entries = self.lock();
        let chosen = entries.iter_mut().filter(|(name, param)| chosen(name, param));
        chosen.map(|(_, param)| param.trainable = trainable).count()
    }

    /// Overwrites the values of the parameter `name` in place: every layer sees them.
    ///
    /// # Errors
    /// If there is no such parameter, or the shapes differ.
    pub fn set(&self, name: &str, values: &Tensor) -> Result<()> {
        let Some(param) = self.get(name) else {
            return Err(Error::tensor(name, "there is no parameter of this name"));
        };
        if param.var.shape() != values.shape() {
            return Err(Error::tensor(
                name,
                format!("expected shape {:?}, got {:?}", param.var.shape(), values.shape()),
            ));
        }
        Ok(param.var.set(&values.to_device(&self.device)?.to_dtype(self.dtype)?)?)
    }

    /// A copy of every parameter's present values, for [`Self::restore`].
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn snapshot(&self) -> Result<BTreeMap<String, Tensor>> {
        self.all().into_iter().map(|(name, p)| Ok((name, p.var.as_detached_tensor().copy()?))).collect()
    }

    /// Puts back the values of a [`Self::snapshot`].
    ///
    /// # Errors
    /// If a name is unknown or a shape differs.
    pub fn restore(&self, snapshot: &BTreeMap<String, Tensor>) -> Result<()> {
        snapshot.iter().try_for_each(|(name, values)| self.set(name, values))
    }

    /// A `VarBuilder` whose tensors become trainable parameters of this store, with the given
    /// role: full fine-tuning, pre-training and task heads.
    ///
    /// Values come from `source` where it has the tensor, else from the initialisation that the
    /// layer asks for; under [`Role::Base`] a source has to have them all, since a checkpoint with
    /// a hole would train from random weights without a word. A name asked for twice is the same
    /// parameter (tied weights).
    pub fn var_builder(&self, source: Option<VarBuilder<'static>>, role: Role) -> VarBuilder<'static> {
        let backend = Trainable { params: self.clone(), source, role };
        VarBuilder::from_backend(Box::new(backend), self.dtype, self.device.clone())
    }
}

/// The store behind a `VarBuilder`.
struct Trainable {
    params: Params,
    source: Option<VarBuilder<'static>>,
    role: Role,
}

impl SimpleBackend for Trainable {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        hint: candle_nn::Init,
        _dtype: DType,
        _device: &Device,
    ) -> candle_core::Result<Tensor> {
        if let Some(param) = self.params.get(name) {
            if param.var.shape() != &shape {
                candle_core::bail!(
                    "{name}: expected shape {shape:?}, the parameter has {:?}",
                    param.var.shape()
                )
            }
            return Ok(param.var.as_tensor().clone());
        }
        if let Some(source) = self.source.as_ref().filter(|source| source.contains_tensor(name)) {
            let values = source.get_with_hints_dtype(shape, name, hint, self.params.dtype)?;
            return Ok(self.params.insert(name, self.role, &values)?);
        }
        if self.source.is_some() && self.role == Role::Base {
            return Err(Error::tensor(name, "cannot find tensor in the checkpoint").into());
        }
        let init = match hint {
            candle_nn::Init::Const(value) => Init::Constant(value),
            candle_nn::Init::Uniform { lo, up } => Init::Uniform(lo, up),
            candle_nn::Init::Randn { mean: 0.0, stdev } => Init::Normal(stdev),
            candle_nn::Init::Randn { mean, stdev } => {
                candle_core::bail!(
                    "{name}: a normal start of mean {mean} (deviation {stdev}) is not supported"
                )
            }
            candle_nn::Init::Kaiming { dist, fan, non_linearity } => {
                let std = non_linearity.gain() / (fan.for_shape(&shape) as f64).sqrt();
                match dist {
                    NormalOrUniform::Normal => Init::Normal(std),
                    NormalOrUniform::Uniform => Init::Uniform(-std * 3f64.sqrt(), std * 3f64.sqrt()),
                }
            }
        };
        Ok(self.params.create(name, self.role, shape, &init)?)
    }

    fn get_unchecked(&self, name: &str, _dtype: DType, _device: &Device) -> candle_core::Result<Tensor> {
        match self.params.get(name) {
            Some(param) => Ok(param.var.as_tensor().clone()),
            None => candle_core::bail!("{name}: a new parameter needs a shape"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.params.get(name).is_some()
            || self.source.as_ref().is_some_and(|source| source.contains_tensor(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> Params {
        Params::new(Noise::new(7), &Device::Cpu)
    }

    #[test]
    fn initial_values_depend_on_the_seed_and_the_name_alone() -> Result<()> {
        let (one, two) = (store(), store());
        two.create("other", Role::A, 3, &Init::Normal(1.0))?;
        let values = |p: &Params| -> Result<Vec<f32>> {
            Ok(p.create("layer.a", Role::A, 4, &Init::Uniform(-1.0, 1.0))?.to_vec1()?)
        };
        let first = values(&one)?;
        assert_eq!(first, values(&two)?);
        assert!(first.iter().all(|v| v.abs() < 1.0) && first[0] != first[1]);
        Ok(())
    }

    #[test]
    fn a_name_can_be_taken_only_once() -> Result<()> {
        let params = store();
        params.create("x", Role::B, 2, &Init::Constant(0.0))?;
        let error = params.create("x", Role::B, 2, &Init::Constant(0.0)).unwrap_err();
        assert!(error.to_string().contains("tensor x"), "{error}");
        Ok(())
    }

    #[test]
    fn layers_see_values_that_are_set_and_restored() -> Result<()> {
        let params = store();
        let held = params.create("x", Role::B, 2, &Init::Constant(1.0))?;
        let before = params.snapshot()?;
        params.set("x", &Tensor::new(&[3f32, 4.0], &Device::Cpu)?)?;
        assert_eq!(held.to_vec1::<f32>()?, [3.0, 4.0]);
        params.restore(&before)?;
        assert_eq!(held.to_vec1::<f32>()?, [1.0, 1.0]);
        let error = params.set("x", &Tensor::new(&[1f32], &Device::Cpu)?).unwrap_err();
        assert!(error.to_string().contains("expected shape [2]"), "{error}");
        Ok(())
    }

    #[test]
    fn the_store_stands_behind_a_var_builder() -> Result<()> {
        let params = store();
        let vb = params.var_builder(None, Role::Head);
        let layer = candle_nn::linear(3, 2, vb.pp("out"))?;
        let again = candle_nn::linear(3, 2, vb.pp("out"))?;
        assert_eq!(params.trainable_count(), 8);
        assert_eq!(layer.weight().id(), again.weight().id());
        assert_eq!(params.all()[0].0, "out.bias");
        assert_eq!(params.set_trainable(Role::Head, false), 2);
        assert_eq!(params.trainable_count(), 0);
        Ok(())
    }
}
