//! IVON (Shen et al. 2024, "Variational learning is effective for large deep networks", algorithm 1): Newton
//! steps on a Gaussian posterior N(m, diag(sigma^2)) over the parameters, at the cost of Adam.
//!
//! ```text
//! theta = m + sigma z,   sigma = 1 / sqrt(lambda (h + delta))          before a loss
//! g_hat = d loss / d theta,   h_hat = g_hat (theta - m) / sigma^2      after its backward pass
//! g <- beta1 g + (1 - beta1) g_hat
//! h <- beta2 h + (1 - beta2) h_hat + 1/2 (1 - beta2)^2 (h - h_hat)^2 / (h + delta)
//! m <- m - lr clip((g / (1 - beta1^t) + delta m) / (h + delta))
//! ```
//!
//! All operations are elementwise. The parameters of the store are m between losses and theta during one. If
//! a step has several micro-batches, each with its own draw, both estimates are averaged. The authors'
//! package multiplies lr by h0 + delta by default; here lr is that of the algorithm.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::gradients::Gradients;
use super::moments::{self, Moments, Owners};
use crate::adapter::{Params, Pass};
use crate::error::{Error, Result};
use crate::noise::{Noise, Purpose};
use crate::util::check::{not_negative, positive, share};
use crate::util::dtype::to_dtype_device;

/// The hyperparameters of [`Ivon`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IvonConfig {
    /// lambda, the effective sample size. The number of training rows gives Bayes' rule; larger values give a
    /// colder posterior.
    pub ess: f64,
    /// h0, the initial value of the Hessian's diagonal.
    pub initial_hessian: f64,
    /// delta, the weight decay: the prior's precision over lambda.
    pub weight_decay: f64,
    /// Decay rate of the running mean of gradients.
    pub beta1: f64,
    /// Decay rate of the running mean of the Hessian.
    pub beta2: f64,
    /// The largest absolute value of an element of the update direction.
    pub clip_radius: f64,
}

impl Default for IvonConfig {
    /// The values of the authors' script for LoRA (Cong et al. 2024, "Variational low-rank adaptation using
    /// IVON"), a cold posterior, except for the clip radius: theirs is 1e-3, at a learning rate of 0.03. With
    /// 1, the largest step is the learning rate, as it nearly is with AdamW.
    fn default() -> Self {
        Self {
            ess: 1e7,
            initial_hessian: 3e-4,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 1.0 - 1e-5,
            clip_radius: 1.0,
        }
    }
}

impl IvonConfig {
    /// Checks every hyperparameter.
    ///
    /// # Errors
    /// If a hyperparameter is outside its domain; the error names it.
    pub fn validate(&self) -> Result<()> {
        positive("ess", self.ess)?;
        positive("initial_hessian", self.initial_hessian)?;
        not_negative("weight_decay", self.weight_decay)?;
        positive("clip_radius", self.clip_radius)?;
        share("beta1", self.beta1)?;
        share("beta2", self.beta2)
    }

    /// Returns sigma for a Hessian's diagonal.
    fn std(&self, hessian: &Tensor) -> candle_core::Result<Tensor> {
        ((hessian + self.weight_decay)? * self.ess)?.sqrt()?.recip()
    }
}

/// The IVON optimiser. The [`Moments`] of each parameter are g and h.
#[derive(Debug)]
pub struct Ivon {
    params: Params,
    config: IvonConfig,
    moments: BTreeMap<String, Moments>,
    owners: Owners,
    /// While the store holds a draw: the mean of each parameter and the draw's offset from it.
    drawn: BTreeMap<String, (Tensor, Tensor)>,
    /// The sum of h_hat over the step's micro-batches so far.
    curvature: BTreeMap<String, Tensor>,
}

impl Ivon {
    /// Creates an optimiser of the trainable parameters of a store.
    ///
    /// # Errors
    /// If a hyperparameter is outside its domain.
    pub fn new(params: &Params, config: IvonConfig) -> Result<Self> {
        config.validate()?;
        let (owners, drawn, curvature) = Default::default();
        Ok(Self { params: params.clone(), config, moments: BTreeMap::new(), owners, drawn, curvature })
    }

    /// Replaces the trainable parameters by draw number `draw` of the posterior, for one micro-batch.
    ///
    /// # Errors
    /// If a draw is not finite.
    pub fn perturb(&mut self, draw: u64) -> Result<()> {
        let noise = self.params.noise();
        self.perturb_by(|name, like| normal(noise, name, draw, like))
    }

    /// [`Self::perturb`] with given standard normal numbers.
    fn perturb_by(&mut self, z: impl Fn(&str, &Tensor) -> candle_core::Result<Tensor>) -> Result<()> {
        self.settle()?;
        self.owners.forget_others(&self.params, &mut self.moments);
        for (name, param) in self.params.trainable() {
            let mean = param.var.as_detached_tensor().copy()?;
            if !self.moments.contains_key(&name) {
                let first = mean.zeros_like()?;
                let second = (&first + self.config.initial_hessian)?;
                self.moments.insert(name.clone(), Moments { first, second, steps: 0 });
            }
            let std = self.config.std(&self.moments[&name].second)?;
            let offset = (std * z(&name, &mean)?)?;
            self.params.set(&name, &(&mean + &offset)?)?;
            self.drawn.insert(name, (mean, offset));
        }
        Ok(())
    }

    /// Adds the curvature estimate of the present draw from the gradients at it, and restores the means.
    ///
    /// # Errors
    /// If candle fails.
    pub fn observe(&mut self, gradients: &GradStore) -> Result<()> {
        for (name, (_, offset)) in &self.drawn {
            let Some(gradient) = self.params.get(name).and_then(|param| gradients.get(&param.var)) else {
                continue; // `step` reports it
            };
            // (theta - m) / sigma^2 = lambda (h + delta) (theta - m)
            let precision = ((&self.moments[name].second + self.config.weight_decay)? * self.config.ess)?;
            let estimate = ((gradient.detach() * offset)? * precision)?;
            let sum = match self.curvature.get(name) {
                Some(earlier) => (earlier + estimate)?,
                None => estimate,
            };
            self.curvature.insert(name.clone(), sum);
        }
        self.settle()
    }

    /// Restores the means in place of a draw.
    ///
    /// # Errors
    /// If candle fails.
    pub fn settle(&mut self) -> Result<()> {
        std::mem::take(&mut self.drawn).iter().try_for_each(|(name, (mean, _))| self.params.set(name, mean))
    }

    /// Drops the observations since the last step, for a step that is skipped.
    ///
    /// # Errors
    /// As [`Self::settle`].
    pub fn skip(&mut self) -> Result<()> {
        self.curvature.clear();
        self.settle()
    }

    /// Takes one step at learning rate `lr`, with the gradients of the observed micro-batches.
    ///
    /// # Errors
    /// If `lr` is negative or not finite, or a trainable parameter has no gradient, one of another shape, or was
    /// not drawn since the last step; no parameter is changed then.
    pub fn step(&mut self, grads: &Gradients, lr: f64) -> Result<()> {
        not_negative("lr", lr)?;
        let IvonConfig { weight_decay: delta, beta1, beta2, clip_radius, .. } = self.config;
        let (mut steps, curvature) = (Vec::new(), std::mem::take(&mut self.curvature));
        for (name, param) in self.params.trainable() {
            let Some(grad) = grads.get(&name)? else {
                return Err(Error::tensor(name, "this trainable parameter has no gradient"));
            };
            let (Some(found), Some(moments)) = (curvature.get(&name), self.moments.get(&name)) else {
                let reason = "no draw was observed: call perturb before the loss and observe after backward";
                return Err(Error::tensor(name, reason));
            };
            let (h, mean) = (&moments.second, param.var.as_detached_tensor());
            let first = ((&moments.first * beta1)? + (grad * (1.0 - beta1))?)?;
            let old = (h + delta)?;
            let correction = ((h - found)?.sqr()? / &old)?;
            let second = ((h * beta2)? + (found * (1.0 - beta2))?)?;
            let second = (second + (correction * (0.5 * (1.0 - beta2).powi(2)))?)?;
            let t = i32::try_from(moments.steps + 1).unwrap_or(i32::MAX); // beyond i32::MAX the power is 0
            let debiased = (&first / (1.0 - beta1.powi(t)))?;
            let direction = ((debiased + (&mean * delta)?)? / (&second + delta)?)?;
            let moved = (&mean - (direction.clamp(-clip_radius, clip_radius)? * lr)?)?;
            steps.push((name, moved, Moments { first, second, steps: moments.steps + 1 }));
        }
        for (name, moved, moments) in steps {
            self.params.set(&name, &moved)?;
            self.moments.insert(name, moments);
        }
        Ok(())
    }

    /// Returns the state of every parameter that was drawn: g as the first moment, h as the second.
    pub fn remembered(&self) -> &BTreeMap<String, Moments> {
        &self.moments
    }

    /// Continues from the state of another optimiser of the same parameters.
    ///
    /// # Errors
    /// As [`super::AdamW::restore`], except that h may be negative as long as h + delta is not.
    pub fn restore(&mut self, moments: &BTreeMap<String, Moments>) -> Result<()> {
        self.moments = moments::restored(&self.params, moments, -self.config.weight_decay)?;
        self.owners = Owners::of(&self.params);
        Ok(())
    }
}

/// The posterior at the end of a training with [`Ivon`].
#[derive(Debug, Clone)]
pub struct IvonPosterior {
    /// The mean m and standard deviation sigma of every parameter.
    layers: BTreeMap<String, (Tensor, Tensor)>,
    noise: Noise,
}

impl IvonPosterior {
    /// Creates the posterior from the means in `params` and the optimiser's state.
    ///
    /// # Errors
    /// If a name is unknown to the store, or candle cannot copy.
    pub fn new(params: &Params, moments: &BTreeMap<String, Moments>, config: &IvonConfig) -> Result<Self> {
        let of = |(name, moments): (&String, &Moments)| {
            let mean = params.require(name)?.var.as_detached_tensor().copy()?;
            Ok((name.clone(), (mean, config.std(&moments.second)?)))
        };
        Ok(Self { layers: moments.iter().map(of).collect::<Result<_>>()?, noise: params.noise() })
    }

    /// Returns draw number `draw` of the parameters, for [`Params::restore`]. Its noise is independent of
    /// training's, and opposite to that of the other draw of its pair ([`Pass::sign`]).
    ///
    /// # Errors
    /// If `draw` is 2^62 or more.
    pub fn draw(&self, draw: u64) -> Result<BTreeMap<String, Tensor>> {
        let (index, sign) = Pass::predictive(draw)?;
        let of = |(name, (mean, std)): (&String, &(Tensor, Tensor))| {
            let z = (normal(self.noise, name, index, mean)? * sign)?;
            Ok((name.clone(), (mean + (std * z)?)?))
        };
        self.layers.iter().map(of).collect()
    }
}

/// Returns the standard normal numbers of a parameter's draw, in the shape and dtype of `like`.
fn normal(noise: Noise, name: &str, draw: u64, like: &Tensor) -> candle_core::Result<Tensor> {
    let mut z = vec![0f64; like.elem_count()];
    noise.stream(name, Purpose::Gaussian).fill_normal(draw, &mut z);
    to_dtype_device(&Tensor::from_vec(z, like.shape(), &Device::Cpu)?, like.dtype(), like.device())
}

#[cfg(test)]
mod tests;
