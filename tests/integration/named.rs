//! Several adapters on one model: which is active, which is trained, and which names are allowed.

use crate::merge::{bayes, logits};
use crate::support::decoders::{frozen, toy_config};
use crate::support::{scatter, Outcome};
use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{AdaptableModel, Role};
use monteclora::adapters::{Lora, LoraConfig};
use monteclora::inject::{self, activate, TargetLayer, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::DecoderForCausalLM;
use monteclora::optim::{check_gradients, AdamW, AdamWConfig};
use monteclora::peft::{AdapterFile, AdapterMetadata, AdapterMethod};
use monteclora::{Params, Pass, Regularizer};

fn lora() -> LoraConfig {
    LoraConfig { rank: 2, alpha: 5.0, ..LoraConfig::default() }
}

/// The file of a LoRA adapter on q, k and v, and the logits of its model.
fn second() -> Outcome<(AdapterFile, Vec<f32>)> {
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    inject::lora(&mut model, &Targets::default(), &lora(), &params)?;
    scatter(&params)?;
    let method = AdapterMethod::Lora(lora());
    let file = AdapterFile::from_model(
        &model,
        inject::DEFAULT_ADAPTER,
        &params,
        &method,
        &AdapterMetadata::default(),
    )?;
    Ok((file, logits(&model, &Pass::Mean.into())?))
}

#[test]
fn the_adapter_that_is_applied_is_the_only_one_active() -> Outcome {
    let (file, expected) = second()?;
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    inject::lora_named(&mut model, "first", &Targets::parse("all-linear")?, &lora(), &params)?;
    scatter(&params)?;
    file.apply(&mut model, "second", &params)?;
    assert_eq!(logits(&model, &Pass::Mean.into())?, expected);
    model.visit_linears(&mut |layer| {
        assert!(layer.active().is_none_or(|(name, _)| name == "second"), "{}", layer.path());
        Ok(())
    })?;
    assert!(params.trainable().iter().all(|(name, _)| name.contains(".second.")));
    Ok(())
}

fn loss(model: &DecoderForCausalLM, bayesian: bool) -> Outcome<Tensor> {
    let pass = Pass::Train { draw: 0 };
    let ids = Tensor::new(&[[1u32, 17, 4, 33, 8]], &Device::Cpu)?;
    let task = model
        .logits(&ids, &Tensor::ones((1, 5), DType::U8, &Device::Cpu)?, &pass.into())?
        .sqr()?
        .mean_all()?;
    Ok(if bayesian { (task + Regularizer::new(&bayes()).for_model(model, pass)?.total)? } else { task })
}

/// Takes a step; returns the names of the parameters that it changes.
fn moved(params: &Params, loss: &Tensor) -> Outcome<Vec<String>> {
    let before = params.snapshot()?;
    AdamW::new(params, AdamWConfig::default())?.backward_step(loss)?;
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let mut moved = Vec::new();
    for (name, param) in params.all() {
        if values(param.var.as_tensor())? != values(&before[&name])? {
            moved.push(name);
        }
    }
    Ok(moved)
}

#[test]
fn adapters_of_one_store_are_trained_in_turn() -> Outcome {
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    inject::lora_named(&mut model, "first", &Targets::parse("all-linear")?, &lora(), &params)?;
    inject::monteclora_named(&mut model, "second", &Targets::parse("v_proj")?, &bayes(), &params)?;
    scatter(&params)?;
    // The adapter that was added last is trained without a further call.
    for (turn, name) in ["second", "first", "second"].into_iter().enumerate() {
        if turn > 0 {
            activate::activate(&mut model, Some(name), &params)?;
        }
        let report = check_gradients(&params, &loss(&model, name == "second")?)?;
        assert!(report.is_exact(), "{name}: {report:?}");
        let own = |param: &String| param.contains(&format!(".{name}."));
        let expected: Vec<String> = params.all().into_iter().map(|(name, _)| name).filter(own).collect();
        assert_eq!(moved(&params, &loss(&model, name == "second")?)?, expected);
    }
    // Parts of the active adapter can be frozen.
    for role in [Role::A, Role::B] {
        params.set_trainable(role, false);
    }
    let names = moved(&params, &loss(&model, true)?)?;
    assert!(names.len() == 4 && names.iter().all(|name| name.ends_with("_prior")), "{names:?}");
    activate::activate(&mut model, None, &params)?;
    assert_eq!(params.trainable_count(), 0);
    Ok(())
}

#[test]
fn a_name_that_comes_in_two_calls_is_active_and_trained_as_one() -> Outcome {
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    inject::lora_named(&mut model, "one", &Targets::parse("q_proj")?, &lora(), &params)?;
    inject::lora_named(&mut model, "two", &Targets::parse("k_proj")?, &lora(), &params)?;
    inject::lora_named(&mut model, "one", &Targets::parse("v_proj")?, &lora(), &params)?;
    scatter(&params)?;
    model.visit_linears(&mut |layer| {
        let last = layer.path().rsplit('.').next().unwrap_or_default();
        let expected = ["q_proj", "v_proj"].contains(&last).then_some("one");
        assert_eq!(layer.active().map(|(name, _)| name), expected, "{}", layer.path());
        Ok(())
    })?;
    let trained = params.trainable();
    assert_eq!(trained.len(), 2 * 2 * 2);
    assert!(trained.iter().all(|(name, _)| name.contains(".one.")));
    assert!(check_gradients(&params, &loss(&model, false)?)?.is_exact());
    Ok(())
}

#[test]
fn names_that_files_and_parameters_cannot_have_are_refused() -> Outcome {
    let (file, _) = second()?;
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    for name in ["", "a.b", "..", "a/b", "a\\b"] {
        let said = [
            inject::lora_named(&mut model, name, &Targets::default(), &lora(), &params).map(drop),
            file.apply(&mut model, name, &params),
            model.visit_linears_mut(&mut |layer| {
                let scratch = Params::new(params.noise(), &Device::Cpu);
                layer.add(name, Box::new(Lora::new(&scratch, "x", "x", layer.dims()?, &lora())?))
            }),
        ];
        for error in said.map(|result| result.unwrap_err().to_string()) {
            assert!(error.contains(&format!("an adapter cannot be called {name:?}")), "{error}");
        }
    }
    assert!(params.all().is_empty() && activate::names(&model)?.is_empty());
    Ok(())
}

#[test]
fn a_name_comes_once_and_goes_if_it_is_there() -> Outcome {
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    inject::lora_named(&mut model, "first", &Targets::default(), &lora(), &params)?;
    let count = params.all().len();
    let twice = inject::monteclora_named(&mut model, "first", &Targets::default(), &bayes(), &params);
    let error = twice.unwrap_err().to_string();
    assert!(error.contains("self_attn.q_proj has an adapter \"first\" already"), "{error}");
    let added = model.visit_linears_mut(&mut |layer| {
        let scratch = Params::new(params.noise(), &Device::Cpu);
        layer.add("first", Box::new(Lora::new(&scratch, "x", "x", layer.dims()?, &lora())?))
    });
    let error = added.unwrap_err().to_string();
    assert!(error.contains("self_attn.q_proj has an adapter \"first\" already"), "{error}");
    let error = activate::remove(&mut model, "third", &params).unwrap_err().to_string();
    assert!(error.contains("there is no \"third\"; the model has: first"), "{error}");
    assert_eq!((params.all().len(), activate::names(&model)?), (count, vec!["first".to_string()]));
    Ok(())
}

#[test]
fn targets_that_are_no_layers_or_come_twice_are_refused_by_path() -> Outcome {
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    let target = |path: &str| TargetLayer { path: path.to_string(), rank: 2, alpha: 5.0 };
    let (q, absent) = ("model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj");
    for (paths, words) in [
        ([q, absent], format!("no layer matches {absent}; the model has: ")),
        ([q, q], format!("{q} comes twice")),
    ] {
        let made = inject::inject(&mut model, "a", &paths.map(target), &params, &mut |layer, _, params| {
            Ok(Box::new(Lora::new(params, layer.path(), "a", layer.dims()?, &lora())?))
        });
        let error = made.unwrap_err().to_string();
        assert!(error.contains(&words), "{error}");
        assert!(params.all().is_empty() && activate::names(&model)?.is_empty());
    }
    Ok(())
}
