//! Gradients of whole models against central differences, in double precision with fixed noise.

use crate::support::{decoders, padded_batch, scatter, toy_classifier, toy_config, Outcome};
use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{Params, Role};
use monteclora::adapters::LoraConfig;
use monteclora::inject::{self, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::roberta::{Family, RobertaForSequenceClassification};
use monteclora::ops::{self, OpPath};
use monteclora::{Context, KlEvaluation, MonteCLoRAConfig, Pass, Regularizer};

/// Compares the gradient of `loss` with central differences at a few elements of each parameter.
pub fn check(params: &Params, loss: impl Fn() -> Outcome<Tensor>) -> Outcome {
    let grads = loss()?.backward()?;
    let value = || -> Outcome<f64> { Ok(loss()?.to_scalar::<f64>()?) };
    let step = 1e-5;
    for (name, param) in params.trainable() {
        let grad = grads.get(&param.var).unwrap_or_else(|| panic!("{name} has no gradient"));
        let grad: Vec<f64> = grad.flatten_all()?.to_vec1()?;
        let start = param.var.as_tensor().copy()?.detach();
        let values: Vec<f64> = start.flatten_all()?.to_vec1()?;
        let n = values.len();
        for i in [0, n / 3, n / 2, n - 1] {
            let at = |delta: f64| -> Outcome<f64> {
                let mut moved = values.clone();
                moved[i] += delta;
                params.set(&name, &Tensor::from_vec(moved, start.shape(), &Device::Cpu)?)?;
                value()
            };
            let numeric = (at(step)? - at(-step)?) / (2.0 * step);
            params.set(&name, &start)?;
            let error = (grad[i] - numeric).abs();
            assert!(
                error <= 1e-7 + 1e-5 * numeric.abs(),
                "{name}[{i}]: backward gives {}, differences {numeric}",
                grad[i]
            );
        }
    }
    Ok(())
}

fn classification_loss(model: &RobertaForSequenceClassification, pass: Pass) -> Outcome<Tensor> {
    let (ids, types, mask) = padded_batch(model.config())?;
    let logits = model.forward(&ids, Some(&types), &mask, &pass.into())?;
    Ok(ops::cross_entropy(&logits, &Tensor::new(&[2i64, 0, 1], &Device::Cpu)?, -100, OpPath::Fused)?)
}

#[test]
fn full_fine_tuning_differentiates_every_weight_of_the_encoder() -> Outcome {
    for family in [Family::Roberta, Family::Bert] {
        let (model, params) = toy_classifier(&toy_config(family), Role::Base, DType::F64)?;
        check(&params, || classification_loss(&model, Pass::Train { draw: 4 }))?;
    }
    Ok(())
}

#[test]
fn a_frozen_encoder_gives_gradients_to_its_head_alone() -> Outcome {
    let (model, params) = toy_classifier(&toy_config(Family::Roberta), Role::Head, DType::F64)?;
    check(&params, || classification_loss(&model, Pass::Train { draw: 4 }))?;
    let names: Vec<String> = params.all().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(names.iter().all(|name| name.starts_with("classifier.")), "{names:?}");
    Ok(())
}

#[test]
fn adapters_of_both_methods_are_differentiated_through_the_whole_model() -> Outcome {
    let targets = Targets::parse("all-linear")?;
    let pass = Pass::Train { draw: 4 };
    for family in [Family::Roberta, Family::Bert] {
        let (mut model, params) = toy_classifier(&toy_config(family), Role::Head, DType::F64)?;
        let config = LoraConfig { rank: 3, alpha: 7.0, dropout: 0.2, ..LoraConfig::default() };
        inject::lora(&mut model, &targets, &config, &params)?;
        scatter(&params)?;
        check(&params, || classification_loss(&model, pass))?;
    }
    for mode in [KlEvaluation::Expected, KlEvaluation::Sampled] {
        let (mut model, params) = toy_classifier(&toy_config(Family::Roberta), Role::Head, DType::F64)?;
        // A large scaler and large weights, so that every path carries visible gradient.
        let config = MonteCLoRAConfig {
            rank: 3,
            alpha: 7.0,
            num_components: 3,
            sample_scaler: 0.3,
            kl_weight: 0.1,
            mode,
            ..MonteCLoRAConfig::default()
        };
        inject::monteclora(&mut model, &targets, &config, &params)?;
        scatter(&params)?;
        let regularizer = Regularizer::new(&config);
        check(&params, || {
            Ok((classification_loss(&model, pass)? + regularizer.for_model(&model, pass)?.total)?)
        })?;
    }
    Ok(())
}

/// Checks that a pass without gradient has the same outputs and gives the layers' parameters no gradient.
fn check_untracked(params: &Params, outputs: impl Fn(&Context) -> Outcome<Tensor>) -> Outcome {
    let of_layers = |cx: Context| -> Outcome<(Vec<f64>, usize)> {
        let ys = outputs(&cx)?;
        let grads = ys.sum_all()?.backward()?;
        let tracked = params.trainable().into_iter().filter(|(name, param)| {
            (name.contains(".layer.") || name.contains(".layers.")) && grads.get(&param.var).is_some()
        });
        Ok((ys.flatten_all()?.to_vec1()?, tracked.count()))
    };
    let (values, tracked) = of_layers(Pass::Mean.into())?;
    assert!(tracked > 0);
    assert_eq!(of_layers(Context::from(Pass::Mean).without_gradient())?, (values, 0));
    Ok(())
}

#[test]
fn a_pass_without_gradient_keeps_no_layer_and_says_the_same() -> Outcome {
    let (targets, config) = (Targets::parse("all-linear")?, LoraConfig::default());
    let (mut encoder, params) = toy_classifier(&toy_config(Family::Roberta), Role::Head, DType::F64)?;
    inject::lora(&mut encoder, &targets, &config, &params)?;
    scatter(&params)?;
    let (ids, types, mask) = padded_batch(encoder.config())?;
    check_untracked(&params, |cx| Ok(encoder.forward(&ids, Some(&types), &mask, cx)?))?;

    let (mut decoder, params) = decoders::frozen(&decoders::toy_config(false)?, DType::F64)?;
    inject::lora(&mut decoder, &targets, &config, &params)?;
    scatter(&params)?;
    let (ids, mask) = decoders::padded(true)?;
    check_untracked(&params, |cx| Ok(decoder.logits(&ids, &mask, cx)?))
}
