//! The regulariser: its terms, its expectation, its batches.

use candle_core::{Device, Tensor};
use monteclora::adapter::{AdaptableLinear, Params, Pass};
use monteclora::dist::{Covariance, Estimator};
use monteclora::special::{digamma, ln_gamma};
use monteclora::{KlEvaluation, Mixture, MonteCLoRA, MonteCLoRAConfig, Regularizer, RegularizerTerms};
use rayon::prelude::*;

use crate::{assert_mean, base, normals, shake, store, Model, Result};

fn config(mode: KlEvaluation) -> MonteCLoRAConfig {
    MonteCLoRAConfig {
        rank: 3,
        num_components: 4,
        df: Some(3.7),
        kl_weight: 0.3,
        cooperative_weight: 0.7,
        dirichlet_prior: 0.6,
        mode,
        ..Default::default()
    }
}

fn layer(params: &Params, path: &str, config: &MonteCLoRAConfig) -> Result<MonteCLoRA> {
    Ok(MonteCLoRA::new(params, path, "default", (5, 4), config)?)
}

fn value(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_scalar()?)
}

fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_vec1()?)
}

#[test]
fn terms_are_the_formulas_of_the_method_and_the_total_their_weighted_sum() -> Result<()> {
    for covariance in [Covariance::Full, Covariance::Diagonal] {
        let config = MonteCLoRAConfig { covariance, ..config(KlEvaluation::Expected) };
        let params = store(2);
        let layers = [layer(&params, "one", &config)?, layer(&params, "two", &config)?];
        shake(&params)?;
        let terms = Regularizer::new(&config).for_layers(&[&layers[0], &layers[1]], Pass::Mean)?;
        let (mut n, mut w, mut d, mut l) = (0.0, 0.0, 0.0, 0.0);
        for layer in &layers {
            let rho = host(layer.posterior().std_prior())?;
            let a: Vec<f64> =
                host(layer.posterior().expert_weights_prior())?.iter().map(|c| c.exp()).collect();
            let (df, b, a0) = (3.7, 0.6, a.iter().sum::<f64>());
            let v: f64 = rho.iter().map(|rho| (2.0 * rho).exp()).sum();
            let ln_v: f64 = rho.iter().map(|rho| 2.0 * rho).sum();
            let psi: f64 = match covariance {
                Covariance::Full => (0..3).map(|i| digamma((df - f64::from(i)) / 2.0)).sum(),
                Covariance::Diagonal => 3.0 * digamma(df / 2.0),
            };
            n += 0.5 * (df * v - (psi + 3.0 * 2f64.ln() + ln_v) - 3.0) / 2.0;
            w += 0.5 * df * (v - ln_v - 3.0) / 2.0;
            d += (ln_gamma(a0) - ln_gamma(4.0 * b)) / 2.0;
            for a in &a {
                d += (ln_gamma(b) - ln_gamma(*a) + (a - b) * (digamma(*a) - digamma(a0))) / 2.0;
                l += a * (a + 1.0) / (a0 * (a0 + 1.0)) / 2.0;
            }
        }
        let got =
            [&terms.kl_gaussian, &terms.kl_wishart, &terms.kl_dirichlet, &terms.cooperative, &terms.total];
        for (got, want) in got.into_iter().zip([n, w, d, l, 0.3 * (n + w + d) + 0.7 * l]) {
            assert!((value(got)? - want).abs() < 1e-12 * want.abs().max(1.0), "{} {want}", value(got)?);
        }
    }
    Ok(())
}

#[test]
fn the_expectation_is_the_mean_of_the_sampled_terms() -> Result<()> {
    for covariance in [Covariance::Full, Covariance::Diagonal] {
        let config =
            MonteCLoRAConfig { covariance, estimator: Estimator::Exact, ..config(KlEvaluation::Sampled) };
        let params = store(2);
        let layer = layer(&params, "one", &config)?;
        shake(&params)?;
        let expected = Regularizer::new(&MonteCLoRAConfig { mode: KlEvaluation::Expected, ..config.clone() });
        let (expected, sampled) = (expected.for_layers(&[&layer], Pass::Mean)?, Regularizer::new(&config));
        let draw = |draw| -> monteclora::Result<RegularizerTerms> {
            sampled.for_layers(&[&layer], Pass::Train { draw })
        };
        let draws = (0..100_000u64).into_par_iter().map(draw);
        let pair = |terms: RegularizerTerms| -> monteclora::Result<(f64, f64)> {
            Ok((terms.kl_gaussian.to_scalar()?, terms.cooperative.to_scalar()?))
        };
        let draws = draws.map(|terms| pair(terms?)).collect::<monteclora::Result<Vec<_>>>()?;
        let what = format!("{covariance:?} regulariser");
        assert_mean(&format!("{what} E KL_N"), value(&expected.kl_gaussian)?, draws.iter().map(|d| d.0));
        assert_mean(&format!("{what} E L_C"), value(&expected.cooperative)?, draws.iter().map(|d| d.1));
    }
    Ok(())
}

#[test]
fn the_sampled_terms_are_those_of_the_draw_that_the_forward_pass_saw() -> Result<()> {
    for covariance in [Covariance::Full, Covariance::Diagonal] {
        let config = MonteCLoRAConfig { covariance, ..config(KlEvaluation::Sampled) };
        let params = store(2);
        let layer = layer(&params, "one", &config)?;
        shake(&params)?;
        for pass in [Pass::Train { draw: 5 }, Pass::Posterior { draw: 5 }] {
            let draw = layer.draw(&pass.into())?.ok_or("no draw")?;
            let want = monteclora::dist::Gaussian::new(&draw.scale_tril)?.kl_standard()?;
            let terms = Regularizer::new(&config).for_layers(&[&layer], pass)?;
            assert!((value(&terms.kl_gaussian)? - value(&want)?).abs() < 1e-12);
            let cooperative = draw.weights.sqr()?.sum_all()?;
            assert!((value(&terms.cooperative)? - value(&cooperative)?).abs() < 1e-12);
        }
        let error = Regularizer::new(&config).for_layers(&[&layer], Pass::Mean).unwrap_err();
        assert!(error.to_string().contains("mode"), "{error}");
    }
    Ok(())
}

#[test]
fn layers_of_several_shapes_in_a_model_average_to_the_same() -> Result<()> {
    for mode in [KlEvaluation::Expected, KlEvaluation::Sampled] {
        let params = store(2);
        let (mut model, mut sum, regularizer) = (Model(Vec::new()), 0.0, Regularizer::new(&config(mode)));
        let pass = Pass::Train { draw: 1 };
        assert!(regularizer.for_model(&model, pass).unwrap_err().to_string().contains("MonteCLoRA"));
        for (i, rank) in [3, 2, 3, 3].into_iter().enumerate() {
            let path = format!("layer.{i}");
            let config = MonteCLoRAConfig { rank, ..config(mode) };
            let adapter = layer(&params, &path, &config)?;
            shake_only(&params, &path)?;
            sum += value(&regularizer.for_layers(&[&adapter], pass)?.total)?;
            let mut linear = AdaptableLinear::new(path, base(5, 4)?);
            linear.add("default", Box::new(adapter))?;
            model.0.push(linear);
        }
        model.0.push(AdaptableLinear::new("bare", base(5, 4)?));
        let got = value(&regularizer.for_model(&model, pass)?.total)?;
        assert!((got - sum / 4.0).abs() < 1e-12, "{got} {}", sum / 4.0);
        assert_eq!(model.0[0].active().map(|(_, a)| a.parameters().len()), Some(4));
    }
    Ok(())
}

fn shake_only(params: &Params, path: &str) -> Result<()> {
    for (name, param) in params.all() {
        if name.starts_with(path) {
            params.set(&name, &(param.var.as_tensor() + (normals(&name, param.var.dims())? * 0.3)?)?)?;
        }
    }
    Ok(())
}

#[test]
fn weights_of_zero_leave_every_variational_parameter_a_gradient() -> Result<()> {
    // With a sparse mixture or a single component the task gives c no gradient.
    for mode in [KlEvaluation::Expected, KlEvaluation::Sampled] {
        for (mixture, num_components) in
            [(Mixture::Sparse, 4), (Mixture::Collapsed, 1), (Mixture::Collapsed, 4), (Mixture::Explicit, 1)]
        {
            let weights = MonteCLoRAConfig { kl_weight: 0.0, cooperative_weight: 0.0, ..config(mode) };
            let config = MonteCLoRAConfig { mixture, num_components, ..weights };
            let params = store(2);
            let layer = layer(&params, "one", &config)?;
            shake(&params)?;
            let terms = Regularizer::new(&config).for_layers(&[&layer], Pass::Train { draw: 1 })?;
            assert_eq!(value(&terms.total)?, 0.0);
            let grads = terms.total.backward()?;
            for tensor in [layer.posterior().std_prior(), layer.posterior().expert_weights_prior()] {
                let grad = grads.get(tensor).ok_or(format!("no gradient: {config:?}"))?;
                assert!(host(grad)?.iter().all(|g| *g == 0.0), "{grad}");
            }
        }
    }
    Ok(())
}

#[test]
fn large_concentrations_do_not_overflow_single_precision() -> Result<()> {
    // exp(lgamma(40)) is larger than the largest f32.
    let params = Params::new(monteclora::noise::Noise::new(0), &Device::Cpu);
    let config = config(KlEvaluation::Expected);
    let layer = layer(&params, "one", &config)?;
    params.set("one.default.expert_weights_prior", &Tensor::full(60f64.ln(), 4, &Device::Cpu)?)?;
    let kl = Regularizer::new(&config).for_layers(&[&layer], Pass::Mean)?.kl_dirichlet;
    let (a, b): (f64, f64) = (60.0, 0.6);
    let want = ln_gamma(4.0 * a) - ln_gamma(4.0 * b)
        + 4.0 * (ln_gamma(b) - ln_gamma(a) + (a - b) * (digamma(a) - digamma(4.0 * a)));
    assert!((f64::from(kl.to_scalar::<f32>()?) - want).abs() < 1e-3 * want, "{kl} {want}");
    Ok(())
}
