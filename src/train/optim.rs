//! AdamW (Loshchilov and Hutter 2019), its state keyed by parameter name.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::gradients::Gradients;
use crate::error::{Error, Result};
use crate::params::{Params, Role};

/// The constants of [`AdamW`].
#[derive(Debug, Clone, PartialEq)]
pub struct AdamWConfig {
    /// The learning rate of [`AdamW::backward_step`]; [`AdamW::step`] is told its own.
    pub lr: f64,
    /// Decay of the running mean of gradients.
    pub beta1: f64,
    /// Decay of the running mean of their squares.
    pub beta2: f64,
    /// Added to the root of the second mean.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Roles that are not decayed: by default the posterior's parameters, whose zero has no
    /// special meaning.
    pub no_decay: Vec<Role>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            no_decay: vec![Role::Scale, Role::Concentration],
        }
    }
}

/// The running means of one parameter.
#[derive(Debug, Clone)]
struct Moments {
    first: Tensor,
    second: Tensor,
}

/// The optimiser. Moments have the parameters' dtype, which is single precision whatever the
/// base's.
#[derive(Debug)]
pub struct AdamW {
    params: Params,
    config: AdamWConfig,
    moments: BTreeMap<String, Moments>,
    steps: i32,
}

impl AdamW {
    /// An optimiser of the trainable parameters of a store.
    ///
    /// # Errors
    /// If a constant is outside its domain.
    pub fn new(params: &Params, config: AdamWConfig) -> Result<Self> {
        let domain = [
            ("lr", config.lr, config.lr >= 0.0),
            ("beta1", config.beta1, (0.0..1.0).contains(&config.beta1)),
            ("beta2", config.beta2, (0.0..1.0).contains(&config.beta2)),
            ("eps", config.eps, config.eps > 0.0),
            ("weight_decay", config.weight_decay, config.weight_decay >= 0.0),
        ];
        match domain.iter().find(|(_, value, valid)| !valid || !value.is_finite()) {
            Some((name, value, _)) => Err(Error::config(*name, format!("{value} is outside its domain"))),
            None => Ok(Self { params: params.clone(), config, moments: BTreeMap::new(), steps: 0 }),
        }
    }

    /// Differentiates `loss` and takes one step at the configured learning rate.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        let mut grads = Gradients::new();
        grads.accumulate(&self.params, &loss.backward()?)?;
        self.step(&grads, self.config.lr)
    }

    /// One step at learning rate `lr`, with PyTorch's order of operations:
    ///
    /// ```text
    /// w <- w (1 - lr decay)
    /// m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
    /// w <- w - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
    /// ```
    ///
    /// # Errors
    /// If a trainable parameter has no gradient.
    pub fn step(&mut self, grads: &Gradients, lr: f64) -> Result<()> {
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        self.steps += 1;
        let correction1 = 1.0 - beta1.powi(self.steps);
        let correction2 = 1.0 - beta2.powi(self.steps);
        for (name, param) in self.params.trainable() {
            let Some(grad) = grads.get(&name) else {
                return Err(Error::tensor(name, "this trainable parameter has no gradient"));
            };
            let value = param.var.as_detached_tensor();
            let decay = if self.config.no_decay.contains(&param.role) { 0.0 } else { weight_decay };
            let (first, second) = match self.moments.get(&name) {
                Some(m) => (
                    ((&m.first * beta1)? + (grad * (1.0 - beta1))?)?,
                    ((&m.second * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?,
                ),
                None => ((grad * (1.0 - beta1))?, (grad.sqr()? * (1.0 - beta2))?),
            };
            let denominator = ((&second / correction2)?.sqrt()? + eps)?;
            let update = ((&first * (lr / correction1))? / denominator)?;
            param.var.set(&((value * (1.0 - lr * decay))? - update)?)?;
            self.moments.insert(name, Moments { first, second });
        }
        Ok(())
    }

    /// The number of steps taken.
    pub fn steps(&self) -> usize {
        self.steps as usize
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::noise::Noise;
    use crate::params::Init;

    fn store(role: Role) -> Result<(Params, Tensor)> {
        let params = Params::with_dtype(Noise::new(1), DType::F64, &Device::Cpu);
        let w = params.create("w", role, 3, &Init::Constant(0.0))?;
        params.set("w", &Tensor::new(&[1.0, -2.0, 0.5], &Device::Cpu)?)?;
        Ok((params, w))
    }

    fn step(optimizer: &mut AdamW, params: &Params, w: &Tensor, grad: [f64; 3], lr: f64) -> Result<()> {
        let loss = (w * Tensor::new(&grad, &Device::Cpu)?)?.sum_all()?;
        let mut grads = Gradients::new();
        grads.accumulate(params, &loss.backward()?)?;
        optimizer.step(&grads, lr)
    }

    #[test]
    fn three_steps_are_those_of_torch() -> Result<()> {
        // w = torch.tensor([1., -2., .5], dtype=torch.float64)
        // torch.optim.AdamW([w], lr=0.1, weight_decay=0.05) with the gradients below
        let (params, w) = store(Role::Base)?;
        let mut optimizer = AdamW::new(&params, AdamWConfig { weight_decay: 0.05, ..Default::default() })?;
        let grads = [[0.3, -0.2, 1.0], [0.1, 0.4, -0.5], [-0.7, 0.05, 0.2]];
        let expected = [
            [0.8950000033333332, -1.8900000049999996, 0.397500001],
            [0.8034186121405289, -1.9171603565210367, 0.3688787973659032],
            [0.8299285178080283, -1.9428011583709783, 0.33551004721602257],
        ];
        for (grad, expected) in grads.into_iter().zip(expected) {
            step(&mut optimizer, &params, &w, grad, 0.1)?;
            for (got, expected) in w.to_vec1::<f64>()?.into_iter().zip(expected) {
                assert!((got - expected).abs() < 1e-12, "{got} {expected}");
            }
        }
        assert_eq!(optimizer.steps(), 3);
        Ok(())
    }

    #[test]
    fn the_posterior_is_not_decayed() -> Result<()> {
        for (role, decayed) in [(Role::A, true), (Role::Scale, false), (Role::Concentration, false)] {
            let (params, w) = store(role)?;
            let mut optimizer = AdamW::new(&params, AdamWConfig { weight_decay: 0.5, ..Default::default() })?;
            step(&mut optimizer, &params, &w, [0.0; 3], 0.1)?;
            assert_eq!(w.to_vec1::<f64>()? != [1.0, -2.0, 0.5], decayed, "{role:?}");
        }
        Ok(())
    }

    #[test]
    fn missing_gradients_and_bad_constants_are_named() -> Result<()> {
        let (params, _) = store(Role::A)?;
        let mut optimizer = AdamW::new(&params, AdamWConfig::default())?;
        let error = optimizer.step(&Gradients::new(), 0.1).unwrap_err().to_string();
        assert!(error.contains("tensor w"), "{error}");
        let error = AdamW::new(&params, AdamWConfig { beta2: 1.0, ..Default::default() }).unwrap_err();
        assert!(error.to_string().contains("beta2"), "{error}");
        Ok(())
    }
}
