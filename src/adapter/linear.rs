//! A model's linear layer: its frozen base and its named adapters.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use candle_nn::Linear;

use super::base::BaseLinear;
use super::context::Context;
use super::interface::Adapter;
use super::pass::Pass;
use crate::error::{Error, Result};
use crate::ops;
use crate::util::finite::is_finite;

/// A linear layer of a model: its base layer and its adapters, of which at most one is active.
///
/// # Example
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Linear;
/// use monteclora::adapters::{Lora, LoraConfig};
/// use monteclora::{AdaptableLinear, Noise, Params, Pass};
///
/// let (device, params) = (Device::Cpu, Params::new(Noise::new(1), &Device::Cpu));
/// let base = Linear::new(Tensor::ones((6, 4), DType::F32, &device)?, None);
/// let mut layer = AdaptableLinear::new("block.proj", base);
/// let config = LoraConfig { rank: 2, ..Default::default() };
/// layer.add("task", Box::new(Lora::new(&params, layer.path(), "task", layer.dims()?, &config)?))?;
/// assert_eq!(layer.active().map(|(name, _)| name), Some("task"));
///
/// layer.activate(None)?; // the base alone
/// let ys = layer.forward(&Tensor::ones((1, 4), DType::F32, &device)?, &Pass::Mean.into())?;
/// assert_eq!(ys.to_vec2::<f32>()?, [[4.0; 6]]);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug)]
pub struct AdaptableLinear {
    path: String,
    base: BaseLinear,
    adapters: BTreeMap<String, Box<dyn Adapter>>,
    active: Option<String>,
    /// The base with the active adapter's mean added. The base itself is kept: unmerging drops this copy.
    merged: Option<Linear>,
}

impl AdaptableLinear {
    /// Creates a layer without adapters. `path` is the layer's Hugging Face name.
    pub fn new(path: impl Into<String>, base: impl Into<BaseLinear>) -> Self {
        Self { path: path.into(), base: base.into(), adapters: BTreeMap::new(), active: None, merged: None }
    }

    /// The layer's Hugging Face name, such as `roberta.encoder.layer.0.attention.self.query`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The base layer, without any adapter, whether or not the layer is merged.
    pub fn base(&self) -> &BaseLinear {
        &self.base
    }

    /// `(in_dim, out_dim)` of the base layer.
    ///
    /// # Errors
    /// If the base weight is not a matrix.
    pub fn dims(&self) -> Result<(usize, usize)> {
        self.base.dims()
    }

    /// Adds an adapter and makes it active. From then on the base is frozen: a base weight that is a variable
    /// is detached and gets no gradient through this layer, even after all adapters are removed.
    ///
    /// # Errors
    /// If the name is not valid, the layer already has an adapter of this name, or the layer is merged.
    pub fn add(&mut self, name: &str, adapter: Box<dyn Adapter>) -> Result<()> {
        check_adapter_name(name)?;
        self.check_unmerged()?;
        if self.adapters.contains_key(name) {
            return Err(Error::config("adapter", format!("{} has an adapter {name:?} already", self.path)));
        }
        self.base = self.base.frozen();
        self.adapters.insert(name.to_string(), adapter);
        self.active = Some(name.to_string());
        Ok(())
    }

    /// Removes and returns the adapter of this name, if there is one.
    ///
    /// # Errors
    /// If the layer is merged.
    pub fn remove(&mut self, name: &str) -> Result<Option<Box<dyn Adapter>>> {
        self.check_unmerged()?;
        if self.active.as_deref() == Some(name) {
            self.active = None;
        }
        Ok(self.adapters.remove(name))
    }

    /// Makes the adapter of this name active; `None` deactivates all adapters.
    ///
    /// # Errors
    /// If the layer has no adapter of this name, or is merged.
    pub fn activate(&mut self, name: Option<&str>) -> Result<()> {
        self.check_unmerged()?;
        if let Some(name) = name.filter(|name| !self.adapters.contains_key(*name)) {
            return Err(Error::config("adapter", format!("{} has no adapter {name:?}", self.path)));
        }
        self.active = name.map(str::to_string);
        Ok(())
    }

    /// The adapter of this name.
    pub fn adapter(&self, name: &str) -> Option<&dyn Adapter> {
        self.adapters.get(name).map(AsRef::as_ref)
    }

    /// Adapters can only be added, removed or switched while the layer is not merged.
    pub(crate) fn check_unmerged(&self) -> Result<()> {
        match &self.merged {
            Some(_) => Err(Error::config("adapter", format!("{} is merged: unmerge it first", self.path))),
            None => Ok(()),
        }
    }

    /// The names of the adapters.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// Whether the active adapter is merged.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Returns the base with the mean of the active adapter added, in the base's dtype; the sum is computed
    /// in single precision or wider. Returns `None` without an active adapter.
    ///
    /// # Errors
    /// If the adapter cannot be merged, a weight would not be finite, or the base is quantised.
    pub fn merged_layer(&self) -> Result<Option<Linear>> {
        if let Some(merged) = &self.merged {
            return Ok(Some(merged.clone()));
        }
        self.merged_layer_at(&Pass::Mean)
    }

    /// Returns the base with the active adapter added as it is in `pass`. [`Pass::Posterior`] gives one draw
    /// of the posterior as a plain layer. Draw s is the same in every layer and every process that has the
    /// same parameters and seed. A method without a posterior gives its mean for every draw.
    ///
    /// # Errors
    /// As [`Self::merged_layer`]; and for [`Pass::Train`], whose dropout is not a change of the weight.
    pub fn merged_layer_at(&self, pass: &Pass) -> Result<Option<Linear>> {
        if self.active.is_none() {
            return Ok(None);
        }
        let weight = self.merged_weight(self.base.require_dense("merging")?, pass)?;
        Ok(weight.map(|weight| Linear::new(weight, self.base.bias().cloned())))
    }

    /// [`Self::merged_layer`] as a dense layer even if the base is quantised. The base's quantisation error
    /// remains; the sum is not quantised again.
    ///
    /// # Errors
    /// As [`Self::merged_layer`], except that the base may be quantised.
    pub fn merged_dequantized(&self) -> Result<Option<Linear>> {
        if self.merged.is_some() || self.base.dense().is_some() || self.active.is_none() {
            return self.merged_layer();
        }
        let weight = self.merged_weight(&self.base.weight().dequantize()?, &Pass::Mean)?;
        Ok(weight.map(|weight| Linear::new(weight, self.base.bias().cloned())))
    }

    /// Adds the active adapter's change in this pass to `weight`, in its dtype and on its device. `weight` is
    /// the base's own or the one that a checkpoint has before quantisation.
    ///
    /// # Errors
    /// As [`Self::merged_layer_at`].
    pub(crate) fn merged_weight(&self, weight: &Tensor, pass: &Pass) -> Result<Option<Tensor>> {
        if matches!(pass, Pass::Train { .. }) {
            let reason =
                format!("{pass:?} drops inputs, which no weight can do: merge the mean or a posterior draw");
            return Err(Error::config("pass", reason));
        }
        let Some((name, adapter)) = self.active() else { return Ok(None) };
        let key = format!("{}.weight", self.path);
        // A weight from a checkpoint is on the host, whatever device the adapter is on.
        let there = weight.to_device(self.base.device())?;
        let base = BaseLinear::new(there, self.base.bias().cloned());
        let Some(delta) = adapter.delta(&base, &pass.into())? else {
            let reason =
                format!("adapter {name:?} cannot be merged: its effect is not a change of the weight");
            return Err(Error::tensor(key, reason));
        };
        let delta = delta.detach().to_device(weight.device())?;
        let wide = if weight.dtype() == DType::F64 { DType::F64 } else { delta.dtype() };
        let sum = (weight.to_dtype(wide)? + delta.to_dtype(wide)?)?.to_dtype(weight.dtype())?;
        if !is_finite(&sum)? {
            return Err(Error::tensor(key, format!("merged with {name:?} it would not be finite")));
        }
        Ok(Some(sum))
    }

    /// Sets the layer of [`Self::merged_layer`], or removes it (`None`). A merged layer has only the mean.
    pub(crate) fn set_merged(&mut self, merged: Option<Linear>) {
        self.merged = merged;
    }

    /// The tensors that the output depends on: those of the base and of the active adapter.
    pub fn parameters(&self) -> Vec<Tensor> {
        let adapter = self.active().map(|(_, adapter)| adapter.parameters()).unwrap_or_default();
        let base = [self.base.dense(), self.base.bias()].into_iter().flatten().cloned();
        base.chain(adapter.into_iter().map(|(_, tensor)| tensor)).collect()
    }

    /// Returns the weight and the bias of a dense base if the layer computes just this base in every pass: no
    /// adapter is active, and no probe checks the outputs. Otherwise `None`.
    pub fn as_linear(&self, cx: &Context) -> Option<(&Tensor, Option<&Tensor>)> {
        let weight = self.base.dense().filter(|_| self.active.is_none() && cx.probe.is_none())?;
        Some((weight, self.base.bias()))
    }

    /// The active adapter with its name.
    pub fn active(&self) -> Option<(&str, &dyn Adapter)> {
        let name = self.active.as_deref()?;
        Some((name, self.adapter(name)?))
    }

    /// The active adapter, if it is of the method `T`, such as [`Lora`](crate::adapters::Lora).
    pub fn active_as<T: Adapter + 'static>(&self) -> Option<&T> {
        self.active()?.1.as_any().downcast_ref()
    }

    /// Computes the layer's output: the active adapter's, or the base's.
    ///
    /// # Shapes
    /// - `xs`: `(.., in_dim)`
    /// - output: `(.., out_dim)`
    ///
    /// # Errors
    /// If shapes or dtypes do not fit, or the layer is merged and the pass is not [`Pass::Mean`]: a merged
    /// layer cannot be trained or sampled, and its mean must not pass for a draw.
    pub fn forward(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        let output = match (&self.merged, self.active()) {
            (Some(_), _) if cx.pass != Pass::Mean => {
                let reason = format!("{} is merged and only computes the mean: unmerge it first", self.path);
                return Err(Error::config("pass", format!("{:?}: {reason}", cx.pass)).into());
            }
            (Some(merged), _) => ops::linear(xs, merged.weight(), merged.bias(), cx.path)?,
            (None, Some((_, adapter))) => adapter.forward(xs, &self.base, cx)?,
            (None, None) => self.base.forward_in(xs, cx)?,
        };
        if let Some(probe) = &cx.probe {
            probe.look(&self.path, &output);
        }
        Ok(output)
    }
}

/// Checks that `name` is valid for an adapter: it is part of parameter names (`{path}.{name}.a`), and PEFT
/// creates a folder of this name.
///
/// # Errors
/// If the name is empty, or contains a dot or a slash.
pub(crate) fn check_adapter_name(name: &str) -> Result<()> {
    if name.is_empty() || name.contains(['.', '/', '\\']) {
        let reason = format!("an adapter cannot be called {name:?}: give a name without dots and slashes");
        return Err(Error::config("adapter", reason));
    }
    Ok(())
}
