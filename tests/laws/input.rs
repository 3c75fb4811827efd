//! Bad input is an error that says what was expected and what was given.

use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{Init, Params, Pass, Role};
use monteclora::adapters::{Lora, LoraConfig};
use monteclora::dist::{Dirichlet, Estimator};
use monteclora::noise::Noise;
use monteclora::{
    DrawNoise, DrawSpec, Mixture, MonteCLoRA, MonteCLoRAConfig, NoiseStreams, Posterior, Regularizer,
    SampleBuffer,
};

use crate::{normals, store, Result};

fn config() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, num_components: 4, ..Default::default() }
}

fn spec(config: &MonteCLoRAConfig) -> DrawSpec {
    DrawSpec::new(config, 6, DType::F64, &Device::Cpu)
}

fn posterior(spec: DrawSpec, dtype: DType) -> monteclora::Result<Posterior> {
    let zeros = |n: usize| Tensor::zeros(n, dtype, &Device::Cpu);
    let streams = NoiseStreams::new(Noise::new(0), "input");
    Posterior::new(&zeros(3)?, &zeros(4)?, spec, streams)
}

/// Asserts that a result is an error whose message contains every part.
fn says<T>(result: std::result::Result<T, impl std::fmt::Display>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    assert!(parts.iter().all(|part| message.contains(part)), "{message} has not all of {parts:?}");
}

#[test]
fn a_scaler_of_the_perturbation_that_is_not_positive_is_refused_and_not_kept() -> Result<()> {
    let mut layer = MonteCLoRA::new(&store(1), "proj", "default", (6, 4), &config())?;
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let refused = layer.posterior_mut().set_sample_scaler(bad);
        says(refused, &["invalid sample_scaler: expected a positive number", &bad.to_string()]);
        assert_eq!(layer.posterior().sample_scaler(), 5e-3);
    }
    layer.posterior_mut().set_sample_scaler(0.2)?;
    assert_eq!(layer.posterior().sample_scaler(), 0.2);
    Ok(())
}

#[test]
fn a_posterior_fits_its_parameters_and_its_configuration_is_valid() -> Result<()> {
    let good = config();
    posterior(spec(&good), DType::F64)?;
    let bad = MonteCLoRAConfig { sample_scaler: f64::NAN, ..config() };
    says(posterior(spec(&bad), DType::F64), &["invalid sample_scaler"]);
    says(posterior(spec(&good), DType::F32), &["tensor std_prior: expected [3] of F64", "got [3] of F32"]);
    // Sizes that agree with each other but not with the tensors.
    let wide = MonteCLoRAConfig { rank: 2, ..config() };
    says(posterior(spec(&wide), DType::F64), &["tensor std_prior: expected [2]", "got [3]"]);
    let many = MonteCLoRAConfig { num_components: 5, ..config() };
    says(posterior(spec(&many), DType::F64), &["tensor expert_weights_prior: expected [5]", "got [4]"]);
    Ok(())
}

#[test]
fn noise_of_size_zero_or_of_other_shapes_is_an_error() -> Result<()> {
    let streams = NoiseStreams::new(Noise::new(0), "input");
    for empty in [
        spec(&MonteCLoRAConfig { rank: 0, ..config() }),
        spec(&MonteCLoRAConfig { num_components: 0, ..config() }),
        DrawSpec { in_dim: 0, ..spec(&config()) },
        spec(&MonteCLoRAConfig { rank: 0, num_components: 0, ..config() }),
    ] {
        says(empty.generate(&streams, 0), &["each is 1 or more"]);
        for cap in [None, Some(0), Some(1000)] {
            let buffer = SampleBuffer::new(empty.clone(), streams.clone(), 15, cap);
            says(buffer.get(0), &["each is 1 or more"]);
        }
    }
    says(spec(&MonteCLoRAConfig { df: Some(1.0), ..config() }).generate(&streams, 0), &["df > 2"]);
    let explicit = spec(&MonteCLoRAConfig { mixture: Mixture::Explicit, ..config() });
    let t = |shape: &[usize]| normals("t", shape);
    for (spec, bartlett, weights, z) in [
        (spec(&config()), t(&[3, 2])?, t(&[4])?, t(&[3, 6])?),
        (spec(&config()), t(&[3, 3])?, t(&[3])?, t(&[3, 6])?),
        (spec(&config()), t(&[3, 3])?, t(&[4])?, t(&[6, 3])?),
        (explicit, t(&[3, 3])?, t(&[4])?, t(&[3, 6])?),
    ] {
        let shapes = [&bartlett, &weights, &z].map(|t| format!("{:?}", t.shape()));
        let parts = ["rank 3, width 6, 4 components", &shapes[0], &shapes[1], &shapes[2]];
        says(DrawNoise::new(&spec, &bartlett, &weights, &z), &parts);
    }
    Ok(())
}

#[test]
fn a_posterior_takes_noise_of_its_own_shapes_alone() -> Result<()> {
    let good = config();
    let posterior = posterior(spec(&good), DType::F64)?;
    let streams = NoiseStreams::new(Noise::new(0), "input");
    for other in [
        spec(&MonteCLoRAConfig { rank: 2, ..config() }),
        DrawSpec { in_dim: 1, ..spec(&good) }, // it would broadcast
        spec(&MonteCLoRAConfig { num_components: 5, ..config() }),
        spec(&MonteCLoRAConfig { mixture: Mixture::Explicit, ..config() }),
    ] {
        let noise = other.generate(&streams, 0)?;
        says(posterior.draw(&noise), &["rank 3, width 6, 4 components: got"]);
        let a = Tensor::zeros((3, 6), DType::F64, &Device::Cpu)?;
        says(posterior.perturbed(&a, &noise), &["rank 3, width 6, 4 components: got"]);
        // The regulariser would read beyond the end of a factor that is smaller than it expects.
        let draws = (std::slice::from_ref(&posterior), std::slice::from_ref(&noise));
        let terms = Regularizer::new(&good).of_draws(draws.0, draws.1);
        says(terms.map(|_| ()), &["rank 3, width 6, 4 components: got"]);
    }
    let noise = posterior.spec().generate(&streams, 0)?;
    let (one, two) = ([posterior.clone()], [noise.clone(), noise.clone()]);
    let regularizer = Regularizer::new(&good);
    regularizer.of_draws(&one, &[noise])?;
    says(regularizer.of_draws(&one, &two).map(|_| ()), &["draws: expected 1, one for each layer, got 2"]);
    says(regularizer.of_draws(&one, &[]).map(|_| ()), &["draws: expected 1, one for each layer, got 0"]);
    says(regularizer.of_draws(&[], &[]).map(|_| ()), &["no layer has an active MonteCLoRA adapter"]);
    Ok(())
}

#[test]
fn a_regulariser_with_a_weight_or_a_mode_out_of_place_is_refused_at_use() -> Result<()> {
    let params = store(1);
    let layer = MonteCLoRA::new(&params, "proj", "default", (6, 4), &config())?;
    let pass = Pass::Train { draw: 0 };
    for bad in [f64::NAN, -1.0, f64::INFINITY] {
        for (option, config) in [
            ("kl_weight", MonteCLoRAConfig { kl_weight: bad, ..config() }),
            ("cooperative_weight", MonteCLoRAConfig { cooperative_weight: bad, ..config() }),
        ] {
            let terms = Regularizer::new(&config).for_layers(&[&layer], pass).map(|_| ());
            says(terms, &[&format!("invalid {option}:"), &bad.to_string()]);
        }
    }
    let peft = MonteCLoRAConfig { rank: 3, ..MonteCLoRAConfig::peft() };
    let layer = MonteCLoRA::new(&params, "peft", "default", (6, 4), &peft)?;
    Regularizer::new(&peft).for_layers(&[&layer], pass)?;
    let terms = Regularizer::new(&config()).for_layers(&[&layer], pass).map(|_| ());
    says(terms, &["invalid mode: PEFT only supports sampled"]);
    Ok(())
}

#[test]
fn a_dirichlet_takes_vectors_and_noise_of_their_shape() -> Result<()> {
    says(Dirichlet::new(&Tensor::new(0.5, &Device::Cpu)?).map(|_| ()), &["dim", "[]"]);
    let dirichlet = Dirichlet::new(&Tensor::new(&[0.5, 0.1, 0.2], &Device::Cpu)?)?;
    for estimator in [Estimator::Exact, Estimator::Exponential, Estimator::LogisticNormal] {
        let noise = Tensor::new(&[0.5, 0.5], &Device::Cpu)?;
        says(dirichlet.rsample(estimator, &noise), &["noise of shape [2] for concentrations [3]"]);
    }
    Ok(())
}

#[test]
fn an_adapter_that_cannot_be_made_leaves_the_store_as_it_was() -> Result<()> {
    for taken in ["a", "b", "std_prior", "expert_weights_prior"] {
        let (params, taken) = (store(1), format!("proj.default.{taken}"));
        params.create(&taken, Role::Base, 2, &Init::Constant(1.0))?;
        let layer = MonteCLoRA::new(&params, "proj", "default", (6, 4), &config());
        says(layer.map(|_| ()), &[&format!("tensor {taken}:"), "exists already"]);
        assert_eq!(params.all().into_iter().map(|(name, _)| name).collect::<Vec<_>>(), [taken]);
    }
    let params = store(1);
    params.create("proj.default.b", Role::Base, 2, &Init::Constant(1.0))?;
    let lora = Lora::new(&params, "proj", "default", (6, 4), &LoraConfig { rank: 3, ..Default::default() });
    says(lora, &["tensor proj.default.b:", "exists already"]);
    assert_eq!(params.all().len(), 1);
    Ok(())
}

#[test]
fn a_parameter_that_is_not_finite_is_named() -> Result<()> {
    let params = store(1);
    params.check_finite()?;
    let layer = MonteCLoRA::new(&params, "proj", "default", (6, 4), &config())?;
    params.check_finite()?;
    for name in ["a", "b", "std_prior", "expert_weights_prior"] {
        let full = format!("proj.default.{name}");
        let var = params.get(&full).ok_or("none")?.var;
        let kept = var.as_detached_tensor().copy()?;
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut values = kept.flatten_all()?.to_vec1::<f64>()?;
            *values.last_mut().ok_or("empty")? = bad;
            let spoilt = Tensor::from_vec(values, kept.dims(), &Device::Cpu)?;
            says(params.set(&full, &spoilt), &[&format!("tensor {full}: it holds NaN or infinity")]);
            assert!(params.check_finite().is_ok(), "the parameter keeps its values");
            // As an optimiser does, without asking the store.
            var.set(&spoilt)?;
            says(params.check_finite(), &[&format!("tensor {full}: it holds NaN or infinity")]);
            var.set(&kept)?;
        }
    }
    assert!(layer.draw(&Pass::Train { draw: 0 }.into())?.is_some());
    Ok(())
}

#[test]
fn the_store_refuses_values_that_single_precision_cannot_hold() -> Result<()> {
    let params = Params::new(Noise::new(0), &Device::Cpu);
    let large = Tensor::new(&[1.0, 1e300], &Device::Cpu)?;
    says(params.insert("x", Role::Base, &large), &["tensor x: it holds NaN or infinity"]);
    assert!(params.all().is_empty());
    params.insert("x", Role::Base, &Tensor::new(&[1.0, 2.0], &Device::Cpu)?)?;
    says(params.set("x", &large), &["tensor x: it holds NaN or infinity"]);
    Ok(())
}
