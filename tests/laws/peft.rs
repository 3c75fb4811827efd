//! `Compat::Peft` reproduces PEFT's results, given PEFT's random numbers.
//!
//! `tests/data/make_peft_golden.py` wrote the file and documents its keys.

use std::collections::HashMap;

use candle_core::{safetensors, DType, Device, Tensor};
use monteclora::adapter::{Params, Role};
use monteclora::ops::{self, OpPath};
use monteclora::{DrawNoise, DrawSpec, MonteCLoRAConfig, NoiseStreams, Posterior, Regularizer};

use crate::{assert_close, store, Result};

const TOLERANCE: f64 = 1e-5;

struct Golden {
    tensors: HashMap<String, Tensor>,
    case: &'static str,
}

impl Golden {
    fn get(&self, key: &str) -> Result<Tensor> {
        let key = format!("{}/{key}", self.case);
        let tensor = self.tensors.get(&key).ok_or_else(|| format!("{key} is missing"))?;
        Ok(tensor.to_dtype(DType::F64)?)
    }

    fn scalar(&self, key: &str) -> Result<Tensor> {
        Ok(self.get(key)?.squeeze(0)?)
    }

    /// PEFT's noise in this crate's form: T = diag(sqrt(W_ii)), Z transposed.
    fn noise(&self, at: &str, posterior: &Posterior) -> Result<DrawNoise> {
        let w = self.get(&format!("{at}/wishart"))?;
        let t = (&w * Tensor::eye(w.dim(0)?, DType::F64, &Device::Cpu)?)?.sqrt()?;
        let z = self.get(&format!("{at}/z_mvn"))?.transpose(1, 2)?.contiguous()?;
        Ok(DrawNoise::new(posterior.spec(), &t, &self.get(&format!("{at}/z_dirichlet"))?, &z)?)
    }

    /// Puts the layer's parameters into the store and returns its posterior.
    fn posterior(&self, layer: &str, params: &Params, config: &MonteCLoRAConfig) -> Result<Posterior> {
        let put = |name: &str, role: Role| -> Result<Tensor> {
            Ok(params.insert(&format!("{layer}.{name}"), role, &self.get(&format!("{layer}/{name}"))?)?)
        };
        let (a, _) = (put("A", Role::A)?, put("B", Role::B)?);
        let (rho, c) = (put("std_prior", Role::LogStd)?, put("expert_weights_prior", Role::Concentration)?);
        let spec = DrawSpec::new(config, a.dim(1)?, DType::F64, &Device::Cpu);
        Ok(Posterior::new(&rho, &c, spec, NoiseStreams::new(params.noise(), layer))?)
    }
}

fn check(case: &'static str, layers: &[&str], config: &MonteCLoRAConfig) -> Result<()> {
    config.validate()?;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/peft_monteclora_golden.safetensors");
    let golden = Golden { tensors: safetensors::load(path, &Device::Cpu)?, case };
    let params = store(0);
    let posteriors =
        layers.iter().map(|layer| golden.posterior(layer, &params, config)).collect::<Result<Vec<_>>>()?;
    let x = golden.get("x")?;
    for draw in 0..2 {
        let (mut noises, mut task) = (Vec::new(), Tensor::new(0f64, &Device::Cpu)?);
        for (layer, posterior) in layers.iter().zip(&posteriors) {
            let at = |key: &str| golden.get(&format!("{layer}/{draw}/{key}"));
            let param = |key: &str| Ok::<_, String>(params.get(&format!("{layer}.{key}")).ok_or(key)?.var);
            let noise = golden.noise(&format!("{layer}/{draw}"), posterior)?;
            let drawn = posterior.draw(&noise)?;
            assert_close("weights", &drawn.weights, &at("weights")?, TOLERANCE)?;
            assert_close("delta", &drawn.delta, &at("delta")?, TOLERANCE)?;
            let moved = posterior.perturbed(param("A")?.as_tensor(), &noise)?;
            let want = (param("A")?.as_detached_tensor() + at("delta")?)?;
            assert_close("A + delta", &moved, &want, TOLERANCE)?;
            let variance = drawn.scale_tril.sqr()?.sum(1)?;
            assert_close("variance", &variance, &at("var")?, TOLERANCE)?;
            let (w0, b0) = (golden.get(&format!("{layer}/W0"))?, golden.get(&format!("{layer}/b0"))?);
            let a = (param("A")?.as_tensor() + &drawn.delta)?;
            let y = ops::adapted_linear(
                &x,
                &w0,
                Some(&b0),
                &a,
                param("B")?.as_tensor(),
                config.scaling(),
                OpPath::Fused,
            )?;
            assert_close("output", &y, &at("y")?, TOLERANCE)?;
            task = (task + (y * golden.get(&format!("{layer}/target"))?)?.sum_all()?)?;
            let one = (std::slice::from_ref(posterior), std::slice::from_ref(&noise));
            let terms = Regularizer::new(config).of_draws(one.0, one.1)?;
            for (name, term) in [
                ("kl_gaussian", &terms.kl_gaussian),
                ("kl_wishart", &terms.kl_wishart),
                ("kl_dirichlet", &terms.kl_dirichlet),
                ("entropy", &terms.cooperative),
                ("layer_loss", &terms.total),
            ] {
                assert_close(name, term, &golden.scalar(&format!("{layer}/{draw}/{name}"))?, TOLERANCE)?;
            }
            noises.push(noise);
        }
        let total = Regularizer::new(config).of_draws(&posteriors, &noises)?.total;
        assert_close("regulariser", &total, &golden.scalar(&format!("{draw}/regulariser"))?, TOLERANCE)?;
        assert_close("task", &task, &golden.scalar(&format!("{draw}/task"))?, TOLERANCE)?;
        check_gradients(&golden, &params, layers, draw, "regulariser", &total)?;
        check_gradients(&golden, &params, layers, draw, "task", &task)?;
    }
    Ok(())
}

fn check_gradients(
    golden: &Golden,
    params: &Params,
    layers: &[&str],
    draw: usize,
    what: &str,
    loss: &Tensor,
) -> Result<()> {
    let grads = loss.backward()?;
    for layer in layers {
        let mut names = vec!["std_prior", "expert_weights_prior"];
        if what == "task" {
            names.extend(["A", "B"]);
        }
        for name in names {
            let param = params.get(&format!("{layer}.{name}")).ok_or("no parameter")?;
            let grad = grads.get(&param.var).ok_or("no gradient")?;
            let want = golden.get(&format!("{layer}/{draw}/{what}.grad.{name}"))?;
            assert_close(&format!("{what} gradient of {name}"), grad, &want, TOLERANCE)?;
        }
    }
    Ok(())
}

#[test]
fn two_layers_with_the_cooperative_loss_match_peft() -> Result<()> {
    let config = MonteCLoRAConfig {
        rank: 4,
        alpha: 6.0,
        num_components: 3,
        cooperative_weight: 1.0,
        dirichlet_prior: 0.7,
        sample_scaler: 0.05,
        kl_weight: 0.03,
        ..MonteCLoRAConfig::peft()
    };
    check("a", &["q", "v"], &config)
}

#[test]
fn one_layer_without_it_matches_peft() -> Result<()> {
    check("b", &["q"], &MonteCLoRAConfig { sample_scaler: 0.005, ..MonteCLoRAConfig::peft() })
}
