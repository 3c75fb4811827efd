//! The prior and the evidence bound: closed forms against Monte Carlo, invariance, gradients.

use candle_core::{Tensor, D};
use monteclora::adapter::{Context, Params, Pass, Prior, PriorForm, Role, ScalerFactors};
use monteclora::dist::{Covariance, Dirichlet, Estimator};
use monteclora::{EvidenceBound, KlEvaluation, Mixture, MonteCLoRA, MonteCLoRAConfig, Regularizer};
use rayon::prelude::*;

use crate::{assert_gradients, assert_mean, shake, store, Result};

const ROWS: usize = 7;

fn config(mixture: Mixture, covariance: Covariance) -> MonteCLoRAConfig {
    MonteCLoRAConfig {
        rank: 3,
        alpha: 5.0,
        num_components: 4,
        df: Some(3.7),
        sample_scaler: 0.3,
        dirichlet_prior: 0.6,
        mixture,
        covariance,
        ..Default::default()
    }
}

fn with_prior(form: PriorForm) -> MonteCLoRAConfig {
    let prior = Some(Prior { form, temperature: 0.3, shared: false, head_std: Some(0.8) });
    MonteCLoRAConfig { prior, ..config(Mixture::Collapsed, Covariance::Full) }
}

fn with_evidence(mixture: Mixture, covariance: Covariance, latents: bool) -> MonteCLoRAConfig {
    let evidence = Some(EvidenceBound { std: 0.7, temperature: 0.4, latents });
    MonteCLoRAConfig { evidence, ..config(mixture, covariance) }
}

fn layer(params: &Params, path: &str, config: &MonteCLoRAConfig) -> Result<MonteCLoRA> {
    Ok(MonteCLoRA::new(params, path, "default", (5, 4), config)?)
}

fn value(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_scalar()?)
}

fn squares(tensor: &Tensor) -> Result<f64> {
    value(&tensor.sqr()?.sum_all()?)
}

const FORMS: [PriorForm; 5] = [
    PriorForm::Mean { std: 0.6 },
    PriorForm::Start { std: 0.6 },
    PriorForm::Factors { std_a: 0.6, std_b: 0.9 },
    PriorForm::Update { std: 0.6 },
    PriorForm::ExpectedUpdate { std: 0.6 },
];

#[test]
fn every_form_is_the_energy_that_its_formula_says() -> Result<()> {
    for form in FORMS {
        let config = with_prior(form);
        let params = store(3);
        let layers = [layer(&params, "one", &config)?, layer(&params, "two", &config)?];
        let head = params.create("head", Role::Head, (2, 5), &monteclora::Init::Constant(0.25))?;
        let bias = params.create("bias", Role::Head, 2, &monteclora::Init::Constant(0.5))?;
        let starts = layers.each_ref().map(|layer| layer.low_rank().a().detach().copy());
        let regularizer = Regularizer::new(&config).for_training(&params, ROWS)?;
        // A shared width is narrower by sqrt(2) in each of two layers.
        let shared = Prior { shared: true, ..config.prior.ok_or("a prior")? };
        let shared = MonteCLoRAConfig { prior: Some(shared), ..config.clone() };
        let shared = Regularizer::new(&shared).for_training(&params, ROWS)?;
        let head_start = head.detach().copy()?;
        shake(&params)?;
        let of_head = 5.0 * squares(&(&head - head_start)?)? / (2.0 * 0.64);
        let mut want = of_head;
        for (layer, start) in layers.iter().zip(starts) {
            let pair = layer.low_rank();
            let (a, b) = (pair.a(), pair.b());
            let moved = squares(&(a - start?)?)?;
            let update = squares(&(b.matmul(a)? * pair.scale())?)? / 0.72;
            want += match form {
                PriorForm::Mean { .. } => squares(a)? / 0.72,
                PriorForm::Start { .. } => moved / 0.72,
                PriorForm::Factors { .. } => moved / 0.72 + squares(b)? / 1.62,
                PriorForm::Update { .. } => update,
                PriorForm::ExpectedUpdate { .. } => {
                    let dirichlet = Dirichlet::new(layer.posterior().expert_weights_prior())?;
                    let square = value(&dirichlet.expected_cooperative()?)?;
                    let v = (layer.posterior().std_prior() * 2.0)?.exp()?;
                    let columns = b.sqr()?.sum(0)?;
                    let trace = value(&(v * columns)?.sum_all()?)?;
                    update + pair.scale().powi(2) * 5.0 * 0.09 * square * 3.7 * trace / 0.72
                }
            };
        }
        let terms = regularizer.for_layers(&[&layers[0], &layers[1]], Pass::Mean)?;
        let got = value(&terms.prior.ok_or("no prior")?)?;
        assert!((got - want).abs() < 1e-12 * want, "{form:?}: {got} {want}");
        let got = shared.for_layers(&[&layers[0], &layers[1]], Pass::Mean)?.prior.ok_or("no prior")?;
        assert!((value(&got)? - (2.0 * want - of_head)).abs() < 1e-12 * want, "{form:?}, shared");
        // The prior is added to the paper's terms with weight tau / n. A bias has no prior.
        let without = MonteCLoRAConfig { prior: None, ..config };
        let plain = Regularizer::new(&without).for_layers(&[&layers[0], &layers[1]], Pass::Mean)?;
        let got = value(&(&terms.total - plain.total)?)?;
        assert!((got - 0.3 / ROWS as f64 * want).abs() < 1e-12 * want, "{form:?}");
        assert!(terms.total.backward()?.get(&bias).is_none());
    }
    Ok(())
}

#[test]
fn the_expected_form_is_the_mean_over_draws_whatever_their_mixture() -> Result<()> {
    for (mixture, covariance) in [
        (Mixture::Collapsed, Covariance::Full),
        (Mixture::Collapsed, Covariance::Diagonal),
        (Mixture::Explicit, Covariance::Full),
        (Mixture::Sparse, Covariance::Full),
    ] {
        let prior = Prior {
            form: PriorForm::ExpectedUpdate { std: 0.6 },
            temperature: 1.0,
            shared: false,
            head_std: None,
        };
        let config = MonteCLoRAConfig { prior: Some(prior), ..config(mixture, covariance) };
        let params = store(4);
        let layer = layer(&params, "one", &config)?;
        shake(&params)?;
        // A schedule's factor on eps applies where it applies to draws: in training.
        let factors = ScalerFactors::new(1.7, Default::default())?;
        let cx = |draw| Context::from(Pass::Train { draw }).with_scaler_factors(factors.clone());
        let regularizer = Regularizer::new(&config).for_training(&params, ROWS)?;
        let want = value(&regularizer.for_layers(&[&layer], cx(0))?.prior.ok_or("no prior")?)?;
        let draw = |draw| -> monteclora::Result<f64> {
            let update =
                (layer.low_rank().b().matmul(layer.effective_a(&cx(draw))?.as_ref())? * (5.0 / 3.0))?;
            Ok(update.sqr()?.sum_all()?.to_scalar::<f64>()? / 0.72)
        };
        let draws = (0..100_000u64).into_par_iter().map(draw).collect::<monteclora::Result<Vec<_>>>()?;
        assert_mean(&format!("{mixture:?} {covariance:?} E||s B (A + D)||^2"), want, draws);
    }
    Ok(())
}

#[test]
fn a_prior_on_the_update_does_not_see_which_pair_makes_it() -> Result<()> {
    for form in FORMS {
        let config = with_prior(form);
        let params = store(5);
        let layer = layer(&params, "one", &config)?;
        shake(&params)?;
        let regularizer = Regularizer::new(&config).for_training(&params, ROWS)?;
        let energy = || -> Result<f64> {
            let terms = regularizer.for_layers(&[&layer], Pass::Mean)?;
            value(&terms.prior.ok_or("no prior")?)
        };
        let before = energy()?;
        let (a, b) = (layer.low_rank().a().copy()?, layer.low_rank().b().copy()?);
        // (c A, B / c), with the perturbation scaled like A through V.
        params.set("one.default.a", &(a * 4.0)?)?;
        params.set("one.default.b", &(b / 4.0)?)?;
        let rho = layer.posterior().std_prior().copy()?;
        params.set("one.default.std_prior", &(rho + 4f64.ln())?)?;
        let invariant = matches!(form, PriorForm::Update { .. } | PriorForm::ExpectedUpdate { .. });
        let same = (energy()? - before).abs() < 1e-12 * before;
        assert_eq!(same, invariant, "{form:?}: {before} {}", energy()?);
    }
    Ok(())
}

#[test]
fn at_the_start_only_a_prior_on_a_itself_pulls_on_it() -> Result<()> {
    for form in FORMS {
        let config = with_prior(form);
        let params = store(6);
        let layer = layer(&params, "one", &config)?;
        let regularizer = Regularizer::new(&config).for_training(&params, ROWS)?;
        let grads = regularizer.for_layers(&[&layer], Pass::Mean)?.total.backward()?;
        let pull = match grads.get(layer.low_rank().a()) {
            Some(grad) => squares(grad)?,
            None => 0.0,
        };
        assert_eq!(pull > 0.0, matches!(form, PriorForm::Mean { .. }), "{form:?}: {pull}");
    }
    Ok(())
}

#[test]
fn gradients_are_differences_and_of_the_bound_too() -> Result<()> {
    let mut configs: Vec<MonteCLoRAConfig> = FORMS.map(with_prior).to_vec();
    for mode in [KlEvaluation::Expected, KlEvaluation::Sampled] {
        for mixture in [Mixture::Collapsed, Mixture::Sparse] {
            for (covariance, latents) in [(Covariance::Full, false), (Covariance::Diagonal, true)] {
                configs.push(MonteCLoRAConfig { mode, ..with_evidence(mixture, covariance, latents) });
            }
        }
    }
    for config in configs {
        let params = store(7);
        let layers = [layer(&params, "one", &config)?, layer(&params, "two", &config)?];
        params.create("head", Role::Head, (2, 3), &monteclora::Init::Constant(0.25))?;
        let regularizer = Regularizer::new(&config).for_training(&params, ROWS)?;
        shake(&params)?;
        let loss = || -> Result<Tensor> {
            Ok(regularizer.for_layers(&[&layers[0], &layers[1]], Pass::Train { draw: 3 })?.total)
        };
        assert_gradients(&format!("{:?} {:?}", config.prior, config.evidence), &params, &loss)?;
    }
    Ok(())
}

/// The log ratio of posterior and prior, `ln q(A + D) - ln p(A + D)`, at one draw given its Sigma and pi,
/// summed over the columns.
fn log_ratio(layer: &MonteCLoRA, pass: &Pass, eps: f64, std: f64, sparse: bool) -> monteclora::Result<f64> {
    let draw = layer.draw(&pass.into())?.ok_or_else(|| monteclora::Error::config("pass", "no draw"))?;
    let square = if sparse { 1.0 } else { draw.weights.sqr()?.sum_all()?.to_scalar::<f64>()? };
    let f = draw.scale_tril.to_vec2::<f64>()?;
    let scale = eps * square.sqrt();
    let (delta, a) = (draw.delta.t()?.to_vec2::<f64>()?, layer.low_rank().a().t()?.to_vec2::<f64>()?);
    let mut sum = 0.0;
    for (delta, a) in delta.iter().zip(&a) {
        // Forward substitution: u = (scale F)^-1 delta is standard normal.
        let mut u = vec![0.0; delta.len()];
        for i in 0..delta.len() {
            let below: f64 = (0..i).map(|j| f[i][j] * u[j]).sum();
            u[i] = (delta[i] / scale - below) / f[i][i];
            sum += -0.5 * u[i] * u[i] - (scale * f[i][i]).ln();
            sum += 0.5 * ((a[i] + delta[i]) / std).powi(2) + std.ln();
        }
    }
    Ok(sum)
}

#[test]
fn the_bound_s_divergence_is_the_mean_log_ratio_over_draws() -> Result<()> {
    for (mixture, covariance) in [
        (Mixture::Collapsed, Covariance::Full),
        (Mixture::Collapsed, Covariance::Diagonal),
        (Mixture::Sparse, Covariance::Full),
    ] {
        let config = MonteCLoRAConfig {
            mode: KlEvaluation::Sampled,
            estimator: Estimator::Exact,
            ..with_evidence(mixture, covariance, false)
        };
        let params = store(8);
        let layer = layer(&params, "one", &config)?;
        shake(&params)?;
        let sampled = Regularizer::new(&config).for_training(&params, ROWS)?;
        let expected = Regularizer::new(&MonteCLoRAConfig { mode: KlEvaluation::Expected, ..config.clone() })
            .for_training(&params, ROWS)?;
        let sparse = mixture == Mixture::Sparse;
        // Per draw: the log ratio, and its expectation over Z given the draw's Sigma and pi.
        let draws = (0..100_000u64).into_par_iter().map(|draw| -> monteclora::Result<(f64, f64)> {
            let pass = Pass::Train { draw };
            let kl = sampled.for_layers(&[&layer], pass)?.kl_mean;
            let kl = kl.ok_or_else(|| monteclora::Error::config("evidence", "none"))?.to_scalar::<f64>()?;
            Ok((log_ratio(&layer, &pass, 0.3, 0.7, sparse)?, kl))
        });
        let draws = draws.collect::<monteclora::Result<Vec<_>>>()?;
        let what = format!("{mixture:?} {covariance:?} KL_A");
        assert_mean(&format!("{what} at the draw"), 0.0, draws.iter().map(|(ratio, kl)| ratio - kl));
        let kl = value(&expected.for_layers(&[&layer], Pass::Mean)?.kl_mean.ok_or("no bound")?)?;
        if sparse {
            // Without the mixture the expectation is exact.
            assert_mean(&format!("{what} in expectation"), kl, draws.iter().map(|(ratio, _)| *ratio));
        } else {
            let mean = draws.iter().map(|(_, kl)| kl).sum::<f64>() / draws.len() as f64;
            // An upper bound, by in_dim r / 2 times the gap of Jensen's inequality.
            let dirichlet = Dirichlet::new(layer.posterior().expert_weights_prior())?;
            let bound = -value(&dirichlet.expected_entropy()?)?;
            let logs = (0..100_000u64).into_par_iter().map(|draw| -> monteclora::Result<f64> {
                let weights = layer.draw(&Pass::Train { draw }.into())?.map(|draw| draw.weights);
                let weights = weights.ok_or_else(|| monteclora::Error::config("pass", "no draw"))?;
                Ok(weights.sqr()?.sum(D::Minus1)?.log()?.to_scalar::<f64>()?)
            });
            let logs = logs.collect::<monteclora::Result<Vec<_>>>()?;
            let gaps = draws.iter().zip(&logs).map(|((_, at), ln)| at + 7.5 * ln);
            assert_mean(&format!("{what} but for the logarithm"), kl + 7.5 * bound, gaps);
            assert!(kl > mean, "no bound: {kl} {mean}");
        }
    }
    Ok(())
}

#[test]
fn the_expected_entropy_is_the_mean_over_draws() -> Result<()> {
    let params = store(9);
    let layer = layer(&params, "one", &config(Mixture::Collapsed, Covariance::Full))?;
    shake(&params)?;
    let dirichlet = Dirichlet::new(layer.posterior().expert_weights_prior())?;
    let draws = (0..100_000u64).into_par_iter().map(|draw| -> monteclora::Result<f64> {
        let weights = layer.draw(&Pass::Train { draw }.into())?.map(|draw| draw.weights);
        let weights = weights.ok_or_else(|| monteclora::Error::config("pass", "no draw"))?;
        Ok(weights.to_vec1::<f64>()?.iter().map(|p| if *p > 0.0 { -p * p.ln() } else { 0.0 }).sum())
    });
    let draws = draws.collect::<monteclora::Result<Vec<_>>>()?;
    assert_mean("E H(pi)", value(&dirichlet.expected_entropy()?)?, draws);
    Ok(())
}

#[test]
fn rows_and_starts_are_asked_for_and_not_guessed() -> Result<()> {
    let refused = |config: &MonteCLoRAConfig, prepared: bool, what: &str| -> Result<()> {
        let params = store(10);
        let layer = layer(&params, "one", config)?;
        let regularizer = Regularizer::new(config);
        let regularizer = if prepared { regularizer.for_training(&params, ROWS)? } else { regularizer };
        let posteriors = [layer.posterior().clone()];
        let terms = match what {
            "layers" => regularizer.of(&posteriors, Pass::Mean),
            _ => regularizer.for_layers(&[&layer], Pass::Mean),
        };
        let error = terms.err().ok_or(format!("{what}: {config:?}"))?.to_string();
        assert!(error.contains(what), "{error}");
        Ok(())
    };
    for form in FORMS {
        let alone = Prior { form, temperature: 0.3, shared: false, head_std: None };
        let config = MonteCLoRAConfig { prior: Some(alone), ..with_prior(form) };
        refused(&config, false, if alone.needs_start() { "start" } else { "rows" })?;
        refused(&config, true, "layers")?;
        refused(&with_prior(form), false, "start")?;
    }
    let evidence = with_evidence(Mixture::Collapsed, Covariance::Full, false);
    refused(&evidence, false, "rows")?;
    refused(&evidence, true, "layers")?;
    assert!(Regularizer::new(&evidence).for_training(&store(1), 0).is_err());
    // The paper's terms need neither rows nor starts.
    let params = store(10);
    let layer = layer(&params, "one", &config(Mixture::Collapsed, Covariance::Full))?;
    Regularizer::new(&config(Mixture::Collapsed, Covariance::Full)).for_layers(&[&layer], Pass::Mean)?;
    Ok(())
}
