//! The distribution of the perturbation with collapsed, explicit and sparse mixtures.

use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{Context, Pass};
use monteclora::dist::{Covariance, Dirichlet, Estimator};
use monteclora::noise::Noise;
use monteclora::ops::OpPath;
use monteclora::{DrawNoise, DrawSpec, Mixture, MonteCLoRA, MonteCLoRAConfig, NoiseStreams, Posterior};
use rayon::prelude::*;

use crate::{assert_close, assert_mean, normals, shake, store, Result};

const DRAWS: u64 = 100_000;
const MIXTURES: [Mixture; 3] = [Mixture::Collapsed, Mixture::Explicit, Mixture::Sparse];
const RHO: [f64; 3] = [0.3, -0.4, 0.1];
const CONCENTRATION: [f64; 3] = [0.6, 1.5, 3.0];

fn config(mixture: Mixture) -> MonteCLoRAConfig {
    let base = MonteCLoRAConfig { rank: 3, num_components: 3, df: Some(4.5), ..Default::default() };
    MonteCLoRAConfig { mixture, sample_scaler: 0.2, estimator: Estimator::Exact, ..base }
}

fn posterior(config: &MonteCLoRAConfig, in_dim: usize) -> Result<Posterior> {
    let rho = Tensor::new(&RHO, &Device::Cpu)?;
    let c = Tensor::new(&CONCENTRATION, &Device::Cpu)?.log()?;
    let spec = DrawSpec::new(config, in_dim, DType::F64, &Device::Cpu);
    Ok(Posterior::new(&rho, &c, spec, NoiseStreams::new(Noise::new(8), "mixture"))?)
}

/// A + Delta on a path, and the gradients of A, rho and c, zeros if there is none.
fn draw_of(config: &MonteCLoRAConfig, path: OpPath) -> Result<[Tensor; 4]> {
    let params = store(1);
    let layer = MonteCLoRA::new(&params, "layer", "default", (7, 5), config)?;
    shake(&params)?;
    let cx = Context::from(Pass::Train { draw: 6 }).with_path(path);
    let a = layer.effective_a(&cx)?.into_owned();
    let grads = (&a * normals("weight", a.dims())?)?.sum_all()?.backward()?;
    let of = |name: &str| -> Result<Tensor> {
        let param = params.get(&format!("layer.default.{name}")).ok_or("no such parameter")?.var;
        Ok(grads.get(&param).cloned().map_or_else(|| param.zeros_like(), Ok)?)
    };
    Ok([a, of("a")?, of("std_prior")?, of("expert_weights_prior")?])
}

#[test]
fn a_fast_draw_is_the_one_that_is_defined_and_so_are_its_gradients() -> Result<()> {
    let estimators = [Estimator::Exact, Estimator::Exponential, Estimator::LogisticNormal];
    let mut configs = vec![MonteCLoRAConfig { rank: 3, sample_scaler: 0.2, ..MonteCLoRAConfig::peft() }];
    for (mixture, estimator) in MIXTURES.into_iter().flat_map(|m| estimators.map(|e| (m, e))) {
        for (covariance, num_components) in [(Covariance::Full, 3), (Covariance::Diagonal, 1)] {
            configs.push(MonteCLoRAConfig { covariance, estimator, num_components, ..config(mixture) });
        }
    }
    for config in configs {
        let defined = draw_of(&config, OpPath::Reference)?;
        for path in [OpPath::Fused, OpPath::Composed] {
            let got = draw_of(&config, path)?;
            for (what, (got, defined)) in
                ["A + Delta", "dA", "drho", "dc"].into_iter().zip(got.iter().zip(&defined))
            {
                assert_close(&format!("{what} of {config:?} on {path:?}"), got, defined, 1e-12)?;
            }
        }
    }
    Ok(())
}

#[test]
fn mixtures_have_the_moments_of_the_model() -> Result<()> {
    for (mixture, covariance) in
        MIXTURES.map(|m| (m, Covariance::Full)).into_iter().chain([(Mixture::Explicit, Covariance::Diagonal)])
    {
        let config = MonteCLoRAConfig { covariance, ..config(mixture) };
        let posterior = posterior(&config, 1)?;
        let zero = Tensor::zeros((3, 1), DType::F64, &Device::Cpu)?;
        let draw = |i| -> candle_core::Result<Vec<f64>> {
            let noise = posterior.spec().generate(posterior.streams(), i)?;
            posterior.perturbed(&zero, &noise)?.flatten_all()?.to_vec1()
        };
        let draws = (0..DRAWS).into_par_iter().map(draw).collect::<candle_core::Result<Vec<_>>>()?;
        // E ||pi||^2 of a Dirichlet; the sparse mixture has weight one.
        let squares = match mixture {
            Mixture::Sparse => 1.0,
            _ => Dirichlet::new(posterior.expert_weights_prior())?
                .expected_cooperative()?
                .to_scalar::<f64>()?,
        };
        for i in 0..3 {
            let variance = 0.04 * squares * 4.5 * (2.0 * RHO[i]).exp();
            let what = format!("{mixture:?} {covariance:?} Delta[{i}]");
            assert_mean(&format!("E {what}"), 0.0, draws.iter().map(|d| d[i]));
            assert_mean(&format!("Var {what}"), variance, draws.iter().map(|d| d[i] * d[i]));
            for j in 0..i {
                assert_mean(&format!("Cov {what}, [{j}]"), 0.0, draws.iter().map(|d| d[i] * d[j]));
            }
        }
    }
    Ok(())
}

#[test]
fn a_relative_scale_is_the_deviation_in_units_of_the_width() -> Result<()> {
    for (mixture, in_dim) in MIXTURES.into_iter().flat_map(|m| [1, 6].map(|in_dim| (m, in_dim))) {
        let config = MonteCLoRAConfig { relative_scaler: Some(1.5), ..config(mixture) };
        let spec = DrawSpec::new(&config, in_dim, DType::F64, &Device::Cpu);
        let one = Tensor::zeros(3, DType::F64, &Device::Cpu)?;
        let posterior = Posterior::new(&one, &one, spec, NoiseStreams::new(Noise::new(9), "relative"))?;
        let zero = Tensor::zeros((3, in_dim), DType::F64, &Device::Cpu)?;
        let draw = |i| -> candle_core::Result<f64> {
            let noise = posterior.spec().generate(posterior.streams(), i)?;
            posterior.perturbed(&zero, &noise)?.sqr()?.mean_all()?.to_scalar()
        };
        let draws = (0..DRAWS).into_par_iter().map(draw).collect::<candle_core::Result<Vec<_>>>()?;
        let what = format!("E Delta^2 of {mixture:?}, {in_dim} wide");
        assert_mean(&what, 1.5 * 1.5 / in_dim as f64, draws);
    }
    Ok(())
}

/// Noise with T and u fixed, Z of many columns: the columns are independent draws.
fn fixed(posterior: &Posterior, columns: usize) -> Result<DrawNoise> {
    let t = Tensor::new(&[[1.4, 0.0, 0.0], [-0.8, 0.9, 0.0], [0.5, 1.1, 1.7]], &Device::Cpu)?;
    let u = Tensor::new(&[0.7, 0.2, 0.4], &Device::Cpu)?;
    let z = match posterior.spec().config.mixture {
        Mixture::Explicit => normals("explicit", &[3, 3, columns])?,
        _ => normals("collapsed", &[3, columns])?,
    };
    Ok(DrawNoise::new(posterior.spec(), &t, &u, &z)?)
}

#[test]
fn given_weights_and_covariance_the_mixtures_have_its_full_covariance() -> Result<()> {
    for mixture in MIXTURES {
        let columns = DRAWS as usize;
        let posterior = posterior(&config(mixture), columns)?;
        let drawn = posterior.draw(&fixed(&posterior, columns)?)?;
        let f = drawn.scale_tril.to_vec2::<f64>()?;
        let pi = drawn.weights.to_vec1::<f64>()?;
        let squares = if mixture == Mixture::Sparse { 1.0 } else { pi.iter().map(|p| p * p).sum() };
        let delta = drawn.delta.to_vec2::<f64>()?;
        for i in 0..3 {
            for j in 0..=i {
                let sigma: f64 = (0..3).map(|k| f[i][k] * f[j][k]).sum();
                assert!(sigma.abs() > 0.1);
                let products = (0..columns).map(|k| delta[i][k] * delta[j][k]);
                assert_mean(&format!("{mixture:?} Cov[{i}][{j}]"), 0.04 * squares * sigma, products);
            }
        }
    }
    Ok(())
}

#[test]
fn the_collapsed_gradient_has_the_explicit_ones_mean_and_no_more_variance() -> Result<()> {
    // Per draw, the derivative of sum (0.3 Delta + Delta^2) of one column in the first c, by autograd.
    let columns = 20_000;
    let mut moments = Vec::new();
    for mixture in [Mixture::Explicit, Mixture::Collapsed] {
        let config = config(mixture);
        let spec = DrawSpec::new(&config, 1, DType::F64, &Device::Cpu);
        let rho = Tensor::new(&RHO, &Device::Cpu)?;
        let c = candle_core::Var::from_tensor(&Tensor::new(&CONCENTRATION, &Device::Cpu)?.log()?)?;
        let posterior = Posterior::new(&rho, &c, spec, NoiseStreams::new(Noise::new(8), "mixture"))?;
        let t = Tensor::new(&[[1.4, 0.0, 0.0], [-0.8, 0.9, 0.0], [0.5, 1.1, 1.7]], &Device::Cpu)?;
        let u = Tensor::new(&[0.7, 0.2, 0.4], &Device::Cpu)?;
        let z = match mixture {
            Mixture::Explicit => normals("gradient explicit", &[columns, 3, 3, 1])?,
            _ => normals("gradient collapsed", &[columns, 3, 1])?,
        };
        let zero = Tensor::zeros((3, 1), DType::F64, &Device::Cpu)?;
        let gradient = |i: usize| -> candle_core::Result<f64> {
            let noise = DrawNoise::new(posterior.spec(), &t, &u, &z.get(i)?)?;
            let delta = posterior.perturbed(&zero, &noise)?;
            let loss = ((&delta * 0.3)? + delta.sqr()?)?.sum_all()?;
            loss.backward()?.get(&c).ok_or(candle_core::Error::msg("no gradient"))?.get(0)?.to_scalar()
        };
        let all = (0..columns).into_par_iter().map(gradient).collect::<candle_core::Result<Vec<_>>>()?;
        let mean = all.iter().sum::<f64>() / columns as f64;
        let variance = all.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / columns as f64;
        moments.push((mean, variance));
    }
    let [(explicit, wide), (collapsed, narrow)] = moments[..] else { unreachable!() };
    let z = (explicit - collapsed) / ((wide + narrow) / columns as f64).sqrt();
    println!("explicit {explicit:.6} +- {wide:.6}, collapsed {collapsed:.6} +- {narrow:.6}, z {z:+.2}");
    assert!(z.abs() < 5.0 && narrow < wide, "{explicit} {wide}, {collapsed} {narrow}");
    assert!(collapsed.abs() > 10.0 * (narrow / columns as f64).sqrt());
    Ok(())
}
