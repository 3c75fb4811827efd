//! Bad input is an error that says what was expected and what was given.

use candle_core::{DType, Device, Tensor};
use monteclora::adapters::{Lora, LoraConfig};
use monteclora::dist::{Covariance, Estimator};
use monteclora::monteclora::{
    Compat, DrawNoise, Mixture, MonteCLoRA, MonteCLoRAConfig, NoiseSpec, NoiseStreams, Posterior,
    SampleBuffer,
};
use monteclora::noise::Noise;
use monteclora::params::{Params, Role};
use monteclora::slot::Pass;

use crate::{normals, store, Result};

fn config() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, num_components: 4, ..Default::default() }
}

fn spec(config: &MonteCLoRAConfig) -> NoiseSpec {
    NoiseSpec::new(config, 6, DType::F64, &Device::Cpu)
}

fn posterior(config: &MonteCLoRAConfig, spec: NoiseSpec, dtype: DType) -> monteclora::Result<Posterior> {
    let zeros = |n: usize| Tensor::zeros(n, dtype, &Device::Cpu);
    let streams = NoiseStreams::new(Noise::new(0), "input");
    Posterior::new(&zeros(3)?, &zeros(4)?, config, spec, streams)
}

/// The message of an error contains every part.
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
fn a_posterior_agrees_with_its_configuration_and_its_noise() -> Result<()> {
    let good = config();
    posterior(&good, spec(&good), DType::F64)?;
    for (option, other) in [
        ("rank", MonteCLoRAConfig { rank: 2, ..config() }),
        ("num_components", MonteCLoRAConfig { num_components: 5, ..config() }),
        ("df", MonteCLoRAConfig { df: Some(3.5), ..config() }),
        ("covariance", MonteCLoRAConfig { covariance: Covariance::Diagonal, ..config() }),
        ("estimator", MonteCLoRAConfig { estimator: Estimator::Exponential, ..config() }),
        ("mixture", MonteCLoRAConfig { mixture: Mixture::Sparse, ..config() }),
    ] {
        let parts = [&format!("invalid {option}:"), "the configuration and the noise's spec differ"];
        says(posterior(&good, spec(&other), DType::F64), &parts);
    }
    let other = NoiseSpec { compat: Compat::Peft, ..spec(&good) };
    says(posterior(&good, other, DType::F64), &["invalid compat:", "differ"]);
    let bad = MonteCLoRAConfig { sample_scaler: f64::NAN, ..config() };
    says(posterior(&bad, spec(&bad), DType::F64), &["invalid sample_scaler"]);
    says(
        posterior(&good, spec(&good), DType::F32),
        &["tensor std_prior: expected [3] of F64", "got [3] of F32"],
    );
    // Sizes that agree with each other and not with the tensors.
    let wide = MonteCLoRAConfig { rank: 2, ..config() };
    says(posterior(&wide, spec(&wide), DType::F64), &["tensor std_prior: expected [2]", "got [3]"]);
    let many = MonteCLoRAConfig { num_components: 5, ..config() };
    says(
        posterior(&many, spec(&many), DType::F64),
        &["tensor expert_weights_prior: expected [5]", "got [4]"],
    );
    Ok(())
}

#[test]
fn noise_of_size_zero_or_of_other_shapes_is_an_error() -> Result<()> {
    let streams = NoiseStreams::new(Noise::new(0), "input");
    for empty in [
        NoiseSpec { rank: 0, ..spec(&config()) },
        NoiseSpec { num_components: 0, ..spec(&config()) },
        NoiseSpec { in_dim: 0, ..spec(&config()) },
        NoiseSpec { rank: 0, num_components: 0, ..spec(&config()) },
    ] {
        says(empty.generate(&streams, 0), &["each is 1 or more"]);
        for cap in [None, Some(0), Some(1000)] {
            let buffer = SampleBuffer::new(empty.clone(), streams.clone(), 15, cap);
            says(buffer.get(0), &["each is 1 or more"]);
        }
    }
    says(NoiseSpec { df: 1.0, ..spec(&config()) }.generate(&streams, 0), &["df > 2"]);
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
fn a_rank_above_the_width_alone_is_an_error() {
    let wide = MonteCLoRAConfig { rank: 5, ..config() };
    says(MonteCLoRA::new(&store(1), "proj", "default", (4, 6), &wide), &["rank", "proj", "1 to 4, got 5"]);
    let wide = LoraConfig { rank: 5, ..Default::default() };
    says(Lora::new(&store(1), "proj", "default", (4, 6), &wide), &["rank", "proj", "1 to 4, got 5"]);
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
    assert!(layer.draw(&Pass::Train { draw: 0 })?.is_some());
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
