//! Gradient checkpointing changes what is stored, not losses or gradients.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{AdaptableModel, Context, Params, Role};
use monteclora::adapters::{prompt_tuning, LoraConfig, PromptConfig};
use monteclora::inject::{self, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::roberta::{Family, RobertaForSequenceClassification};
use monteclora::ops::{self, OpPath};
use monteclora::{MonteCLoRAConfig, Pass};

use crate::support::{assert_close, decoders, padded_batch, scatter, toy_classifier, toy_config, Outcome};

/// The value of a loss and the gradient of every trainable parameter.
fn gradients(params: &Params, loss: &Tensor) -> Outcome<(f64, BTreeMap<String, Tensor>)> {
    let store = loss.backward()?;
    let of = |(name, param): (String, monteclora::adapter::Param)| {
        let grad = store.get(&param.var).ok_or_else(|| format!("{name} has no gradient"))?;
        Ok((name, grad.detach()))
    };
    let grads = params.trainable().into_iter().map(of).collect::<Result<_, String>>()?;
    Ok((loss.to_dtype(DType::F64)?.to_scalar()?, grads))
}

/// Compares a model's gradients without and with checkpointing.
fn compare(params: &Params, mut loss: impl FnMut(bool, OpPath) -> Outcome<Tensor>) -> Outcome {
    for path in [OpPath::Fused, OpPath::Composed] {
        let (plain_loss, plain) = gradients(params, &loss(false, path)?)?;
        let (again_loss, again) = gradients(params, &loss(true, path)?)?;
        assert_eq!(plain_loss, again_loss, "{path:?}");
        assert_eq!(plain.len(), again.len());
        for (name, grad) in &plain {
            let size = grad.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            assert_close(&again[name], grad, 1e-12 * (1.0 + size)).map_err(|e| format!("{name}: {e}"))?;
        }
    }
    Ok(())
}

#[test]
fn an_encoder_s_gradients_are_the_same_under_every_method() -> Outcome {
    let pass = Pass::Train { draw: 4 };
    for method in ["full", "lora", "monteclora", "prompt"] {
        let role = if method == "full" { Role::Base } else { Role::Head };
        let (mut model, params) = toy_classifier(&toy_config(Family::Bert), role, DType::F64)?;
        let targets = Targets::parse("all-linear")?;
        match method {
            "lora" => {
                let config = LoraConfig { rank: 3, dropout: 0.2, ..LoraConfig::default() };
                inject::lora(&mut model, &targets, &config, &params)?;
            }
            "monteclora" => {
                // With only one component the task would give the concentration no gradient.
                let config = MonteCLoRAConfig { rank: 3, sample_scaler: 0.3, ..Default::default() };
                inject::monteclora(&mut model, &targets, &config, &params)?;
            }
            "prompt" => {
                let embedding = model.embedding_mut().ok_or("no place for a prompt")?;
                prompt_tuning(embedding, "default", &PromptConfig { virtual_tokens: 3 }, &params)?;
            }
            _ => {}
        }
        scatter(&params)?;
        let (ids, types, mask) = padded_batch(model.config())?;
        let labels = Tensor::new(&[2i64, 0, 1], &Device::Cpu)?;
        compare(&params, |on, path| {
            model.set_checkpoint_layers(on);
            let logits = model.forward(&ids, Some(&types), &mask, &Context::from(pass).with_path(path))?;
            Ok(ops::cross_entropy(&logits, &labels, -100, path)?)
        })?;
    }
    Ok(())
}

#[test]
fn a_decoder_s_gradients_are_the_same_and_prediction_is_left_alone() -> Outcome {
    let config = decoders::toy_config(true)?;
    let (mut model, params) = decoders::frozen(&config, DType::F64)?;
    let method = MonteCLoRAConfig { rank: 3, sample_scaler: 0.3, ..Default::default() };
    inject::monteclora(&mut model, &Targets::parse("all-linear")?, &method, &params)?;
    scatter(&params)?;
    let ids = Tensor::new(&[[1u32, 17, 4, 33, 8], [1, 40, 5, 2, 9]], &Device::Cpu)?;
    let mask = Tensor::ones((2, 5), DType::U8, &Device::Cpu)?;
    compare(&params, |on, path| {
        model.set_checkpoint_layers(on);
        let cx = Context::from(Pass::Train { draw: 3 }).with_path(path);
        Ok(model.logits(&ids, &mask, &cx)?.sqr()?.mean_all()?)
    })?;
    let (mut cache, pass) = (model.cache(8), Pass::Posterior { draw: 1 });
    let whole = model.hidden(&ids, &mask, None, &pass.into())?;
    assert_close(&model.hidden(&ids, &mask, Some(&mut cache), &pass.into())?, &whole, 1e-12)?;
    Ok(())
}

#[test]
fn virtual_tokens_get_their_gradient_through_a_checkpointed_decoder_whatever_the_base() -> Outcome {
    let (ids, mask) = decoders::padded(true)?;
    for base in [DType::F64, DType::F32, DType::BF16] {
        let (mut model, _) = decoders::frozen(&decoders::toy_config(true)?, base)?;
        let store = if base == DType::F64 { DType::F64 } else { DType::F32 };
        let params = decoders::prompted(&mut model, 2, store)?;
        compare(&params, |on, path| {
            model.set_checkpoint_layers(on);
            let cx = Context::from(Pass::Train { draw: 3 }).with_path(path);
            Ok(model.logits(&ids, &mask, &cx)?.to_dtype(store)?.sqr()?.mean_all()?)
        })?;
    }
    Ok(())
}

#[test]
fn a_model_whose_loss_is_alive_says_so_when_it_is_changed() -> Outcome {
    let (mut model, params) = toy_classifier(&toy_config(Family::Roberta), Role::Base, DType::F32)?;
    model.set_checkpoint_layers(true);
    let (ids, types, mask) = padded_batch(model.config())?;
    let loss = model.forward(&ids, Some(&types), &mask, &Pass::Train { draw: 0 }.into())?.sum_all()?;
    let change = |model: &mut RobertaForSequenceClassification| {
        inject::lora(model, &Targets::parse("query")?, &LoraConfig::default(), &params).map(|_| ())
    };
    let error = change(&mut model).expect_err("the graph holds the layers").to_string();
    assert!(error.contains("drop the loss first"), "{error}");
    drop(loss);
    Ok(change(&mut model)?)
}
