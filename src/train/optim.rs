//! AdamW (Loshchilov and Hutter 2019), its state keyed by parameter name.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::gradients::Gradients;
use super::update::{update, Constants, Moments};
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
    /// Whether parameters of one dimension (biases, scales of norms) are decayed: PyTorch's
    /// optimiser decays all it is given, the trainer of transformers leaves these out.
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
            no_decay: vec![Role::Scale, Role::Concentration],
            decay_vectors: true,
        }
    }
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
    /// If a trainable parameter has no gradient, or one of another shape: then nothing is changed.
    pub fn step(&mut self, grads: &Gradients, lr: f64) -> Result<()> {
        let mut pairs = Vec::new();
        for (name, param) in self.params.trainable() {
            let Some(grad) = grads.get(&name) else {
                return Err(Error::tensor(name, "this trainable parameter has no gradient"));
            };
            if grad.shape() != param.var.shape() {
                let reason = format!("shape {:?}, its gradient {:?}", param.var.shape(), grad.shape());
                return Err(Error::tensor(name, reason));
            }
            pairs.push((name, param, grad));
        }
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        self.steps += 1;
        let rate = lr / (1.0 - beta1.powi(self.steps));
        let correction2 = 1.0 - beta2.powi(self.steps);
        for (name, param, grad) in pairs {
            let decays = !self.config.no_decay.contains(&param.role)
                && (self.config.decay_vectors || param.var.rank() > 1);
            let keep = if decays { 1.0 - lr * weight_decay } else { 1.0 };
            let constants = Constants { beta1, beta2, eps, keep, rate, correction2 };
            if !self.moments.contains_key(&name) {
                let zero = || param.var.as_detached_tensor().zeros_like();
                self.moments.insert(name.clone(), Moments { first: zero()?, second: zero()? });
            }
            if let Some(moments) = self.moments.get_mut(&name) {
                update(&param.var, moments, grad, &constants)?;
            }
        }
        Ok(())
    }

    /// Copies of the running means of a parameter's gradients and of their squares: what a
    /// checkpoint must keep besides [`Self::steps`]. None before its first step.
    ///
    /// # Errors
    /// If candle cannot copy.
    pub fn moments(&self, name: &str) -> Result<Option<(Tensor, Tensor)>> {
        let copies = self.moments.get(name).map(|m| Ok((m.first.copy()?, m.second.copy()?)));
        copies.transpose()
    }

    /// Continues where another optimiser of the same parameters stopped.
    ///
    /// # Errors
    /// If a name is unknown to the store, or a shape differs: then nothing is changed.
    pub fn restore(&mut self, steps: usize, moments: &BTreeMap<String, (Tensor, Tensor)>) -> Result<()> {
        let mut restored = BTreeMap::new();
        for (name, (first, second)) in moments {
            let Some(param) = self.params.get(name) else {
                return Err(Error::tensor(name, "there is no parameter of this name"));
            };
            let shape = param.var.shape();
            if let Some(other) = [first, second].into_iter().find(|moment| moment.shape() != shape) {
                let reason = format!("expected moments of shape {shape:?}, got {:?}", other.shape());
                return Err(Error::tensor(name, reason));
            }
            let copy = |moment: &Tensor| -> Result<Tensor> {
                Ok(moment.to_device(param.var.device())?.to_dtype(param.var.dtype())?.force_contiguous()?)
            };
            restored.insert(name.clone(), Moments { first: copy(first)?, second: copy(second)? });
        }
        self.steps = i32::try_from(steps)
            .map_err(|_| Error::config("steps", format!("{steps} is more than an optimiser counts")))?;
        self.moments = restored;
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

    #[test]
    fn single_precision_steps_are_those_of_torch_too() -> Result<()> {
        // As above in float32, the path that works in place.
        let params = Params::new(Noise::new(1), &Device::Cpu);
        let w = params.insert("w", Role::Base, &Tensor::new(&[1f32, -2.0, 0.5], &Device::Cpu)?)?;
        let mut optimizer = AdamW::new(&params, AdamWConfig { weight_decay: 0.05, ..Default::default() })?;
        for grad in [[0.3f32, -0.2, 1.0], [0.1, 0.4, -0.5], [-0.7, 0.05, 0.2]] {
            let loss = (&w * Tensor::new(&grad, &Device::Cpu)?)?.sum_all()?;
            let mut grads = Gradients::new();
            grads.accumulate(&params, &loss.backward()?)?;
            optimizer.step(&grads, 0.1)?;
        }
        let expected = [0.8299285178080283, -1.9428011583709783, 0.33551004721602257];
        for (got, expected) in w.to_vec1::<f32>()?.into_iter().zip(expected) {
            assert!((f64::from(got) - expected).abs() < 1e-6, "{got} {expected}");
        }
        Ok(())
    }

    #[test]
    fn an_optimiser_continues_from_another_bit_for_bit() -> Result<()> {
        let grads = [[0.3, -0.2, 1.0], [0.1, 0.4, -0.5], [-0.7, 0.05, 0.2], [0.2, 0.1, -0.3]];
        let (whole, w) = store(Role::Base)?;
        let mut optimizer = AdamW::new(&whole, AdamWConfig::default())?;
        for grad in grads {
            step(&mut optimizer, &whole, &w, grad, 0.1)?;
        }
        let (params, again) = store(Role::Base)?;
        let mut first = AdamW::new(&params, AdamWConfig::default())?;
        assert!(first.moments("w")?.is_none());
        for grad in &grads[..2] {
            step(&mut first, &params, &again, *grad, 0.1)?;
        }
        let moments = first.moments("w")?.unwrap();
        let mut second = AdamW::new(&params, AdamWConfig::default())?;
        second.restore(first.steps(), &[("w".to_string(), moments.clone())].into())?;
        for grad in &grads[2..] {
            step(&mut second, &params, &again, *grad, 0.1)?;
        }
        assert_eq!(w.to_vec1::<f64>()?, again.to_vec1::<f64>()?);
        let error = second.restore(1, &[("z".to_string(), moments.clone())].into()).unwrap_err();
        assert!(error.to_string().contains("tensor z"), "{error}");
        let short = (moments.0.narrow(0, 0, 2)?, moments.1);
        let error = second.restore(1, &[("w".to_string(), short)].into()).unwrap_err();
        assert!(error.to_string().contains("expected moments of shape [3], got [2]"), "{error}");
        Ok(())
    }

    #[test]
    fn vectors_are_decayed_unless_told_otherwise() -> Result<()> {
        for (decay_vectors, decayed) in [(true, true), (false, false)] {
            let (params, w) = store(Role::Base)?;
            let config = AdamWConfig { weight_decay: 0.5, decay_vectors, ..Default::default() };
            let mut optimizer = AdamW::new(&params, config)?;
            step(&mut optimizer, &params, &w, [0.0; 3], 0.1)?;
            assert_eq!(w.to_vec1::<f64>()? != [1.0, -2.0, 0.5], decayed);
        }
        Ok(())
    }

    #[test]
    fn a_step_that_fails_changes_nothing() -> Result<()> {
        let (params, w) = store(Role::A)?;
        params.create("x", Role::A, 1, &Init::Constant(1.0))?;
        let mut optimizer = AdamW::new(&params, AdamWConfig::default())?;
        let mut grads = Gradients::new();
        params.set_trainable(Role::A, false);
        params.create("v", Role::B, 1, &Init::Constant(1.0))?;
        grads.accumulate(&params, &params.get("v").unwrap().var.sqr()?.sum_all()?.backward()?)?;
        params.set_trainable(Role::A, true); // v has a gradient, w and x have none
        assert!(optimizer.step(&grads, 0.1).is_err());
        assert_eq!(params.get("v").unwrap().var.to_vec1::<f64>()?, [1.0]);
        assert_eq!((w.to_vec1::<f64>()?, optimizer.steps()), (vec![1.0, -2.0, 0.5], 0));
        Ok(())
    }
}
