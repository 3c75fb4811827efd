//! AdamW (Loshchilov and Hutter 2019), with its state keyed by parameter name.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::gradients::Gradients;
use super::moments::{self, Moments, Owners};
use super::update::{Constants, Steps};
use crate::adapter::{Params, Role};
use crate::error::{Error, Result};
use crate::ops::Tape;
use crate::util::check::{not_negative, positive, share};

/// The hyperparameters of [`AdamW`].
#[derive(Debug, Clone, PartialEq)]
pub struct AdamWConfig {
    /// The learning rate of [`AdamW::backward_step`]; [`AdamW::step`] takes its own.
    pub lr: f64,
    /// Decay rate of the running mean of gradients.
    pub beta1: f64,
    /// Decay rate of the running mean of squared gradients.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Roles without weight decay: by default the posterior's parameters, for which zero has no special
    /// meaning.
    pub no_decay: Vec<Role>,
    /// Learning rates of roles as multiples of the step's learning rate: LoRA+ (Hayou et al. 2024) raises
    /// that of [`Role::B`]. Difference: PEFT's LoRA+ also raises that of every vector, biases included.
    pub lr_ratios: Vec<(Role, f64)>,
    /// Whether one-dimensional parameters (biases, scales of norms) are decayed. PyTorch's optimiser decays
    /// every parameter; the trainer of transformers leaves these out.
    pub decay_vectors: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            no_decay: vec![Role::LogStd, Role::Concentration, Role::RootStd],
            lr_ratios: Vec::new(),
            decay_vectors: true,
        }
    }
}

/// The AdamW optimiser. Moments have the parameters' dtype, which is single precision by default, whatever
/// the base weights' dtype.
#[derive(Debug)]
pub struct AdamW {
    params: Params,
    config: AdamWConfig,
    moments: BTreeMap<String, Moments>,
    owners: Owners,
}

impl AdamW {
    /// Creates an optimiser of the trainable parameters of a store.
    ///
    /// # Errors
    /// If a hyperparameter is outside its domain.
    pub fn new(params: &Params, config: AdamWConfig) -> Result<Self> {
        for (role, ratio) in &config.lr_ratios {
            positive(&format!("lr_ratios of {role:?}"), *ratio)?;
        }
        not_negative("lr", config.lr)?;
        share("beta1", config.beta1)?;
        share("beta2", config.beta2)?;
        positive("eps", config.eps)?;
        not_negative("weight_decay", config.weight_decay)?;
        Ok(Self { params: params.clone(), config, moments: BTreeMap::new(), owners: Owners::default() })
    }

    /// Differentiates `loss` and takes one step at the configured learning rate.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        let mut grads = Gradients::new();
        grads.backward(&self.params, loss, &Tape::default())?;
        self.step(&grads, self.config.lr)
    }

    /// Takes one step at learning rate `lr`, with PyTorch's order of operations:
    ///
    /// ```text
    /// w <- w (1 - lr decay)
    /// m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
    /// w <- w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
    /// ```
    ///
    /// where t counts the steps of each parameter. A parameter that is created or unfrozen later, or that
    /// takes the name of a removed one, starts at t = 1.
    ///
    /// # Errors
    /// If `lr` is negative or not finite, or a trainable parameter has no gradient, or one of another shape;
    /// nothing is changed then.
    pub fn step(&mut self, grads: &Gradients, lr: f64) -> Result<()> {
        not_negative("lr", lr)?;
        let mut pairs = Vec::new();
        for (name, param) in self.params.trainable() {
            let Some(grad) = grads.unscaled(&name) else {
                return Err(Error::tensor(name, "this trainable parameter has no gradient"));
            };
            if grad.shape() != param.var.shape() {
                let reason = format!("shape {:?}, its gradient {:?}", param.var.shape(), grad.shape());
                return Err(Error::tensor(name, reason));
            }
            pairs.push((name, param, grad));
        }
        self.owners.forget_others(&self.params, &mut self.moments);
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let mut steps = Steps::default();
        for (name, param, grad) in pairs {
            let ratio = self.config.lr_ratios.iter().find(|(role, _)| *role == param.role);
            let lr = lr * ratio.map_or(1.0, |(_, ratio)| *ratio);
            let decays = !self.config.no_decay.contains(&param.role)
                && (self.config.decay_vectors || param.var.rank() > 1);
            let keep = if decays { 1.0 - lr * weight_decay } else { 1.0 };
            if !self.moments.contains_key(&name) {
                let zero = || param.var.as_detached_tensor().zeros_like();
                self.moments.insert(name.clone(), Moments { first: zero()?, second: zero()?, steps: 0 });
            }
            if let Some(moments) = self.moments.get_mut(&name) {
                moments.steps += 1;
                let t = i32::try_from(moments.steps).unwrap_or(i32::MAX); // beyond i32::MAX both powers are 0
                let (rate, correction2) = (lr / (1.0 - beta1.powi(t)), 1.0 - beta2.powi(t));
                let factor = grads.factor();
                let constants = Constants { factor, beta1, beta2, eps, keep, rate, correction2 };
                steps.take(&param.var, moments, grad, &constants)?;
            }
        }
        Ok(steps.finish(grads.factor(), [beta1, beta2], eps)?)
    }

    /// Returns the optimiser state of every parameter that has taken a step. Clones share their tensors,
    /// which the next step may overwrite.
    pub fn remembered(&self) -> &BTreeMap<String, Moments> {
        &self.moments
    }

    /// Returns a copy of the optimiser state of a parameter, for a checkpoint; `None` before its first step.
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn moments(&self, name: &str) -> Result<Option<Moments>> {
        let copy =
            |m: &Moments| Ok(Moments { first: m.first.copy()?, second: m.second.copy()?, steps: m.steps });
        self.moments.get(name).map(copy).transpose()
    }

    /// Continues from the state of another optimiser of the same parameters.
    ///
    /// # Errors
    /// If a name is unknown to the store, a trainable parameter is missing, a shape differs, or moments hold
    /// NaN, infinity or a negative second moment; nothing is changed then.
    pub fn restore(&mut self, moments: &BTreeMap<String, Moments>) -> Result<()> {
        self.moments = moments::restored(&self.params, moments, 0.0)?;
        self.owners = Owners::of(&self.params);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
