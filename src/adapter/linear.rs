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

/// A linear layer of a model: its base weight and its adapters, of which at most one is active.
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
    /// The active adapter's mean added to the base, which stays beside it: to unmerge is to forget.
    merged: Option<Linear>,
}

impl AdaptableLinear {
    /// A layer without adapters. `path` is the layer's Hugging Face name.
    pub fn new(path: impl Into<String>, base: impl Into<BaseLinear>) -> Self {
        Self { path: path.into(), base: base.into(), adapters: BTreeMap::new(), active: None, merged: None }
    }

    /// The layer's Hugging Face name, such as `roberta.encoder.layer.0.attention.self.query`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The base layer, without any adapter, merged or not.
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

    /// Adds an adapter and makes it the active one. From then on the base is frozen: one that is a variable is
    /// detached from it, and gets no gradient here, not even when all adapters are gone again.
    ///
    /// # Errors
    /// If the name cannot be one, the layer has an adapter of this name, or is merged.
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

    /// Takes the adapter of this name away, if there is one.
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

    /// Makes the adapter of this name active, or none of them.
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

    /// Adapters come, go and change places beside the base alone.
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

    /// The linear layer that the base and the mean of the active adapter amount to, in the base's
    /// dtype; the sum is made in single precision at least. None without an active adapter.
    ///
    /// # Errors
    /// If the method has no such layer, a weight would not be finite, or the base is quantised.
    pub fn merged_layer(&self) -> Result<Option<Linear>> {
        if let Some(merged) = &self.merged {
            return Ok(Some(merged.clone()));
        }
        self.merged_layer_at(&Pass::Mean)
    }

    /// The linear layer that the base and the active adapter amount to in a pass: of [`Pass::Posterior`] one draw of
    /// the posterior, for whoever runs plain layers. Draw s is the same draw in every layer and every process that
    /// has the parameters and the seed. A method without a posterior has its mean in every draw.
    ///
    /// # Errors
    /// As [`Self::merged_layer`]; and for [`Pass::Train`], whose dropout is no change of a weight.
    pub fn merged_layer_at(&self, pass: &Pass) -> Result<Option<Linear>> {
        if self.active.is_none() {
            return Ok(None);
        }
        let base = self.base.require_dense("merging")?;
        let weight = self.merged_weight(base.weight(), pass)?;
        Ok(weight.map(|weight| Linear::new(weight, base.bias().cloned())))
    }

    /// [`Self::merged_layer`] with the base's weight as numbers, where it is quantised too: what it lost when it was
    /// rounded stays lost, and nothing is rounded once more.
    ///
    /// # Errors
    /// As [`Self::merged_layer`], but for the quantised.
    pub fn merged_dequantized(&self) -> Result<Option<Linear>> {
        if self.merged.is_some() || self.base.dense().is_some() || self.active.is_none() {
            return self.merged_layer();
        }
        let base = self.base.dequantize()?;
        let weight = self.merged_weight(base.weight(), &Pass::Mean)?;
        Ok(weight.map(|weight| Linear::new(weight, base.bias().cloned())))
    }

    /// `weight`, the base's own or as a checkpoint has it before it was rounded, and the active adapter in this
    /// pass, in the dtype and on the device of `weight`.
    ///
    /// # Errors
    /// As [`Self::merged_layer_at`].
    pub(crate) fn merged_weight(&self, weight: &Tensor, pass: &Pass) -> Result<Option<Tensor>> {
        if matches!(pass, Pass::Train { .. }) {
            let reason =
                format!("{pass:?} drops inputs, which no weight does: merge the mean or a posterior draw");
            return Err(Error::config("pass", reason));
        }
        let Some((name, adapter)) = self.active() else { return Ok(None) };
        let key = format!("{}.weight", self.path);
        // A checkpoint's weight is read to the host, wherever the adapter is.
        let there = weight.to_device(self.base.device())?;
        let base = Linear::new(there, self.base.bias().cloned()).into();
        let Some(delta) = adapter.delta(&base, &pass.into())? else {
            let reason = format!("adapter {name:?} is no change of its weight and cannot be merged");
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

    /// Puts the layer of [`Self::merged_layer`] in place, or (None) forgets it. A merged layer
    /// computes the mean alone.
    pub(crate) fn set_merged(&mut self, merged: Option<Linear>) {
        self.merged = merged;
    }

    /// The tensors that its output depends on: the base's, and those of the active adapter.
    pub fn parameters(&self) -> Vec<Tensor> {
        let adapter = self.active().map(|(_, adapter)| adapter.parameters()).unwrap_or_default();
        let weight = self.base.dense().map(Linear::weight);
        let base = [weight, self.base.bias()].into_iter().flatten().cloned();
        base.chain(adapter.into_iter().map(|(_, tensor)| tensor)).collect()
    }

    /// The linear layer that this layer is under every pass: its base, where no adapter is active.
    /// None where a probe asks for each layer's own output, or the base is quantised.
    pub fn as_linear(&self, cx: &Context) -> Option<&Linear> {
        self.base.dense().filter(|_| self.active.is_none() && cx.probe.is_none())
    }

    /// The name and the adapter that is active.
    pub fn active(&self) -> Option<(&str, &dyn Adapter)> {
        let name = self.active.as_deref()?;
        Some((name, self.adapter(name)?))
    }

    /// The active adapter, if it is of the method `T`, such as [`Lora`](crate::adapters::Lora).
    pub fn active_as<T: Adapter + 'static>(&self) -> Option<&T> {
        self.active()?.1.as_any().downcast_ref()
    }

    /// The layer's output: the active adapter's, or the base's.
    ///
    /// # Shapes
    /// - `xs`: `(.., in_dim)`
    /// - output: `(.., out_dim)`
    ///
    /// # Errors
    /// If shapes or dtypes do not fit, or the layer is merged and the pass is not the mean: a merged
    /// layer can neither be trained nor draw, and its mean in place of a draw would look like one.
    pub fn forward(&self, xs: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        let output = match (&self.merged, self.active()) {
            (Some(_), _) if cx.pass != Pass::Mean => {
                let reason = format!("{} is merged and knows its mean alone: unmerge it first", self.path);
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

/// Checks that an adapter can be called `name`: parameters are `{path}.{name}.a`, and PEFT makes a
/// folder of the name.
///
/// # Errors
/// If it is empty, or holds a dot or a slash.
pub(crate) fn check_adapter_name(name: &str) -> Result<()> {
    if name.is_empty() || name.contains(['.', '/', '\\']) {
        let reason = format!("an adapter cannot be called {name:?}: give a name without dots and slashes");
        return Err(Error::config("adapter", reason));
    }
    Ok(())
}
