//! The store of all trainable parameters.
//!
//! Parameters have stable names, a role and a fixed order; their initial values depend only on the seed and
//! on their own name. (Candle's `VarMap` cannot be seeded and initialises in the order of a `HashMap`.) The
//! optimiser, learning-rate groups, freezing, the regulariser and files refer to parameters by name and role.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::init::NormalOrUniform;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::VarBuilder;

use crate::error::{Error, Result};
use crate::noise::{Noise, Purpose};
use crate::ops;
use crate::util::dtype::to_dtype_device;
use crate::util::files;
use crate::util::finite::{is_finite, zero_if_finite};

/// The role of a parameter in its method.
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
    /// The logarithm rho of the Wishart scale's standard deviations (`std_prior`).
    LogStd,
    /// The logarithm c of the Dirichlet concentration (`expert_weights_prior`).
    Concentration,
    /// The square roots G of BLoB's standard deviations.
    RootStd,
    /// The row norms of DoRA.
    Magnitude,
    /// The scaling factors of activations in IA3.
    Scaling,
    /// The singular values of AdaLoRA.
    SingularValues,
    /// A bias of an adapter.
    Bias,
    /// The virtual tokens of prompt tuning.
    Prompt,
}

/// The initial values of a new parameter.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Init {
    /// The same value in every element.
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
    /// The role in its method.
    pub role: Role,
    /// Whether the optimiser updates it.
    pub trainable: bool,
}

/// A store of trainable parameters. A handle that is cheap to clone; clones share their parameters.
///
/// # Example
/// ```
/// use candle_core::Device;
/// use monteclora::{Init, Noise, Params, Role};
///
/// let params = Params::new(Noise::new(7), &Device::Cpu);
/// let a = params.create("proj.default.a", Role::A, (2, 3), &Init::Uniform(-0.5, 0.5))?;
/// params.create("proj.default.b", Role::B, (4, 2), &Init::Constant(0.0))?;
/// assert_eq!((a.dims2()?, params.trainable_count()), ((2, 3), 14));
/// params.set_trainable(Role::A, false); // the optimiser skips it
/// assert_eq!(params.trainable_count(), 8);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Params {
    entries: Arc<Mutex<BTreeMap<String, Param>>>,
    noise: Noise,
    dtype: DType,
    device: Device,
}

impl Params {
    /// The name of the file that [`Self::save`] writes.
    pub const FILE: &'static str = "parameters.safetensors";

    /// Creates an empty store of single-precision parameters on `device`.
    pub fn new(noise: Noise, device: &Device) -> Self {
        Self::with_dtype(noise, DType::F32, device)
    }

    /// Creates an empty store with another dtype, such as double precision for tests of laws and gradients.
    pub fn with_dtype(noise: Noise, dtype: DType, device: &Device) -> Self {
        Self { entries: Arc::default(), noise, dtype, device: device.clone() }
    }

    /// The noise that initial values, draws and dropout are made from.
    pub fn noise(&self) -> Noise {
        self.noise
    }

    /// The dtype of every parameter.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device of new parameters. Those created through a handle of [`Self::on`] may be on another one.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A handle to the same store that creates parameters on another device, for layers that are there.
    pub fn on(&self, device: &Device) -> Self {
        Self { device: device.clone(), ..self.clone() }
    }

    // A panic while the lock is held leaves the map whole: each change is a single insertion.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Param>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a parameter whose initial values depend on the seed and `name` only, not on which other
    /// parameters exist.
    ///
    /// # Errors
    /// If the name is taken, or an initial value is not finite.
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
        self.insert(name, role, &Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    /// Creates a parameter from `values`, copied and cast to the store's dtype and this handle's device.
    ///
    /// # Errors
    /// If the name is taken, or a value is not finite in that dtype.
    pub fn insert(&self, name: &str, role: Role, values: &Tensor) -> Result<Tensor> {
        // Detached, because `Var::from_tensor` of a variable returns that variable instead of a copy.
        let var = Var::from_tensor(&self.finite(name, values, &self.device)?.detach())?;
        let tensor = var.as_tensor().clone();
        let mut entries = self.lock();
        if entries.contains_key(name) {
            return Err(Error::tensor(name, "a parameter of this name exists already"));
        }
        entries.insert(name.to_string(), Param { var, role, trainable: true });
        Ok(tensor)
    }

    /// Casts `values` to the store's dtype and moves them to `device`; an error if one is not finite.
    fn finite(&self, name: &str, values: &Tensor, device: &Device) -> Result<Tensor> {
        let values = to_dtype_device(values, self.dtype, device)?;
        if is_finite(&values)? {
            Ok(values)
        } else {
            Err(Error::tensor(name, NOT_FINITE))
        }
    }

    /// Checks that all parameters are finite, with one small copy from the device.
    ///
    /// # Errors
    /// If a parameter contains NaN or infinity; the error names the first one.
    pub fn check_finite(&self) -> Result<()> {
        let (names, zeros): (Vec<_>, Vec<_>) =
            self.all().into_iter().map(|(name, p)| (name, zero_if_finite(p.var.as_tensor()))).unzip();
        if names.is_empty() {
            return Ok(());
        }
        let zeros = zeros.into_iter().collect::<candle_core::Result<Vec<_>>>()?;
        let zeros = ops::stacked(&zeros)?.to_vec1::<f32>()?;
        match names.into_iter().zip(zeros).find(|(_, zero)| *zero != 0.0) {
            Some((name, _)) => Err(Error::tensor(name, NOT_FINITE)),
            None => Ok(()),
        }
    }

    /// Runs `create`, which creates parameters whose names start with `prefix`. If it fails, the parameters
    /// that it created are removed.
    pub(crate) fn all_or_none<T>(&self, prefix: &str, create: impl FnOnce() -> Result<T>) -> Result<T> {
        let known: BTreeSet<String> =
            self.lock().keys().filter(|name| name.starts_with(prefix)).cloned().collect();
        create().inspect_err(|_| {
            self.lock().retain(|name, _| !name.starts_with(prefix) || known.contains(name));
        })
    }

    /// Returns the parameter `name`, if it exists.
    pub fn get(&self, name: &str) -> Option<Param> {
        self.lock().get(name).cloned()
    }

    /// Returns the parameter `name`.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn require(&self, name: &str) -> Result<Param> {
        self.get(name).ok_or_else(|| Error::tensor(name, "there is no parameter of this name"))
    }

    /// Removes the parameter `name`. Layers that hold its tensor keep it.
    pub fn remove(&self, name: &str) -> Option<Param> {
        self.lock().remove(name)
    }

    /// All parameters, ordered by name.
    pub fn all(&self) -> Vec<(String, Param)> {
        self.lock().iter().map(|(name, param)| (name.clone(), param.clone())).collect()
    }

    /// The parameters of this role, ordered by name.
    pub fn of_role(&self, role: Role) -> Vec<(String, Param)> {
        self.all().into_iter().filter(|(_, param)| param.role == role).collect()
    }

    /// The parameters that the optimiser updates, ordered by name.
    pub fn trainable(&self) -> Vec<(String, Param)> {
        self.all().into_iter().filter(|(_, param)| param.trainable).collect()
    }

    /// The number of trainable scalars.
    pub fn trainable_count(&self) -> usize {
        self.trainable().iter().map(|(_, param)| param.var.elem_count()).sum()
    }

    /// Freezes or unfreezes all parameters of a role; returns their number.
    pub fn set_trainable(&self, role: Role, trainable: bool) -> usize {
        self.set_trainable_where(trainable, |_, param| param.role == role)
    }

    /// Freezes or unfreezes all parameters for which `chosen` returns true; returns their number.
    pub fn set_trainable_where(&self, trainable: bool, chosen: impl Fn(&str, &Param) -> bool) -> usize {
        // Evaluated before taking the lock, because `chosen` may use the store.
        let picked = self.all().into_iter().filter(|(name, param)| chosen(name, param));
        let names: BTreeSet<String> = picked.map(|(name, _)| name).collect();
        let mut entries = self.lock();
        let chosen = entries.iter_mut().filter(|(name, _)| names.contains(*name));
        chosen.map(|(_, param)| param.trainable = trainable).count()
    }

    /// Overwrites the values of the parameter `name` in place, so that every layer sees them.
    ///
    /// # Errors
    /// If there is no such parameter, the shapes differ, or a value is not finite in the store's dtype. The
    /// parameter then keeps its values.
    pub fn set(&self, name: &str, values: &Tensor) -> Result<()> {
        let (var, values) = self.fitting(name, values)?;
        Ok(var.set(&values)?)
    }

    /// Checks and casts `values` for [`Self::set`]; returns them with the variable.
    fn fitting(&self, name: &str, values: &Tensor) -> Result<(Var, Tensor)> {
        let param = self.require(name)?;
        if param.var.shape() != values.shape() {
            return Err(Error::tensor(
                name,
                format!("expected shape {:?}, got {:?}", param.var.shape(), values.shape()),
            ));
        }
        let values = self.finite(name, values, param.var.device())?;
        Ok((param.var, values))
    }

    /// Copies the current values of all parameters, for [`Self::restore`].
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn snapshot(&self) -> Result<BTreeMap<String, Tensor>> {
        self.all().into_iter().map(|(name, p)| Ok((name, p.var.as_detached_tensor().copy()?))).collect()
    }

    /// Restores the values of a [`Self::snapshot`].
    ///
    /// # Errors
    /// If a name is unknown, a shape differs or a value is not finite. Nothing is then written.
    pub fn restore(&self, snapshot: &BTreeMap<String, Tensor>) -> Result<()> {
        let fitting: Vec<_> =
            snapshot.iter().map(|(name, values)| self.fitting(name, values)).collect::<Result<_>>()?;
        fitting.iter().try_for_each(|(var, values)| Ok(var.set(values)?))
    }

    /// Writes all parameters under their names to `parameters.safetensors` in the folder `dir`, which is
    /// created if it is missing.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let all = self.all();
        let named = all.iter().map(|(name, param)| (name.clone(), param.var.as_tensor()));
        files::write_safetensors(&dir.join(Self::FILE), named)
    }

    /// Reads the values that [`Self::save`] wrote, into a store with the same parameters.
    ///
    /// # Errors
    /// If `dir` has no valid `parameters.safetensors`, the file lacks a parameter of the store or contains
    /// another one, a shape differs, or a value is not finite. The store is then unchanged.
    pub fn load(&self, dir: &Path) -> Result<()> {
        let path = dir.join(Self::FILE);
        let bytes = std::fs::read(&path).map_err(Error::io(&*path))?;
        let read = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu);
        let values: BTreeMap<String, Tensor> =
            read.map_err(|error| Error::format(&path, error.to_string()))?.into_iter().collect();
        let lacking = self.all().into_iter().find(|(name, _)| !values.contains_key(name));
        if let Some((name, _)) = lacking {
            return Err(Error::tensor(name, format!("{} does not hold this parameter", path.display())));
        }
        if let Some(name) = values.keys().find(|name| self.get(name).is_none()) {
            let reason = format!("{} holds this parameter, the model does not", path.display());
            return Err(Error::tensor(name, reason));
        }
        self.restore(&values)
    }

    /// Returns a `VarBuilder` whose tensors become trainable parameters of this store with the given role,
    /// for full fine-tuning, pre-training and task heads.
    ///
    /// Values come from `source` if it has the tensor, otherwise from the initialisation that the layer asks
    /// for. Under [`Role::Base`] a source must have all tensors: a tensor that a checkpoint lacks would
    /// otherwise be trained from random values unnoticed. A name that is requested twice is the same
    /// parameter (tied weights).
    pub fn var_builder(&self, source: Option<VarBuilder<'static>>, role: Role) -> VarBuilder<'static> {
        let backend = Trainable { params: self.clone(), source, role };
        VarBuilder::from_backend(Box::new(backend), self.dtype, self.device.clone())
    }
}

const NOT_FINITE: &str = "it holds NaN or infinity";

/// The `VarBuilder` backend that creates parameters in a store.
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
        device: &Device,
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
        // A head may start from new values. A weight of the model may not: the source reports what it lacks.
        let given = |source: &&VarBuilder| self.role == Role::Base || source.contains_tensor(name);
        if let Some(source) = self.source.as_ref().filter(given) {
            let values = source.get_with_hints_dtype(shape, name, hint, self.params.dtype)?;
            return Ok(self.params.on(device).insert(name, self.role, &values)?);
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
        Ok(self.params.on(device).create(name, self.role, shape, &init)?)
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
mod tests;
