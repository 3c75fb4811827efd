//! Several adapters on one model, and adapters merged into a model that stays in use.

use crate::support::checkpoints::{checkpoint, rows, Log};
use crate::support::decoders::{frozen, toy_config};
use crate::support::{scatter, Outcome};
use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{AdaptableModel, Adapter, Context, Role};
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::Batcher;
use monteclora::inject::merge::{merge, unmerge};
use monteclora::inject::{self, activate, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::DecoderForCausalLM;
use monteclora::train::{fit, Classification, Classifier, Method, MethodInit, TrainConfig};
use monteclora::{BaseLinear, MonteCLoRAConfig, Noise, Params, Pass};

pub fn logits(model: &DecoderForCausalLM, cx: &Context) -> Outcome<Vec<f32>> {
    let ids = Tensor::new(&[[1u32, 17, 4, 33, 8]], &Device::Cpu)?;
    let mask = Tensor::ones((1, 5), DType::U8, &Device::Cpu)?;
    Ok(model.logits(&ids, &mask, cx)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn close(one: &[f32], other: &[f32], tolerance: f32) -> bool {
    one.iter().zip(other).all(|(a, b)| (a - b).abs() <= tolerance)
}

pub fn bayes() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, alpha: 7.0, sample_scaler: 0.3, ..Default::default() }
}

/// A frozen toy with MonteCLoRA on all layers, in general position.
fn adapted(dtype: DType) -> Outcome<(DecoderForCausalLM, Params)> {
    let (mut model, params) = frozen(&toy_config(true)?, dtype)?;
    inject::monteclora(&mut model, &Targets::parse("all-linear")?, &bayes(), &params)?;
    scatter(&params)?;
    Ok((model, params))
}

/// The values of every base weight.
fn bases(model: &DecoderForCausalLM) -> Outcome<Vec<Vec<f32>>> {
    let mut all = Vec::new();
    model.visit_linears(&mut |layer| {
        all.push(layer.base().dequantize()?.weight().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    })?;
    Ok(all)
}

#[test]
fn merged_is_unmerged_and_unmerging_restores_every_bit() -> Outcome {
    // bf16 rounds every merged weight to eight bits.
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-6), (DType::BF16, 0.3)] {
        let (mut model, params) = adapted(dtype)?;
        let (before, base) = (logits(&model, &Pass::Mean.into())?, bases(&model)?);
        let drawn = logits(&model, &Pass::Posterior { draw: 1 }.into())?;
        assert_eq!(merge(&mut model)?, 14);
        let merged = logits(&model, &Pass::Mean.into())?;
        assert!(close(&merged, &before, tolerance), "{dtype:?}");
        // The original base weights are kept beside the merged ones.
        assert_eq!(bases(&model)?, base);
        assert_eq!((unmerge(&mut model)?, unmerge(&mut model)?), (14, 0));
        assert_eq!(logits(&model, &Pass::Mean.into())?, before);
        assert_eq!(logits(&model, &Pass::Posterior { draw: 1 }.into())?, drawn);
        activate::activate(&mut model, None, &params)?;
        let (plain, _) = frozen(&toy_config(true)?, dtype)?;
        assert_eq!(logits(&model, &Pass::Mean.into())?, logits(&plain, &Pass::Mean.into())?);
    }
    Ok(())
}

#[test]
fn a_merge_that_fails_changes_nothing() -> Outcome {
    let (mut model, params) = adapted(DType::F32)?;
    let name = "model.layers.1.mlp.up_proj.default.b";
    let kept = params.get(name).ok_or("none")?.var.as_detached_tensor().copy()?;
    params.get(name).ok_or("a parameter")?.var.set(&(&kept * f64::INFINITY)?)?;
    let error = merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.mlp.up_proj.weight: merged with \"default\""), "{error}");
    model.visit_linears(&mut |layer| {
        assert!(!layer.is_merged());
        Ok(())
    })?;
    params.set(name, &kept)?;
    merge(&mut model)?;
    let error = merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("unmerge it first"), "{error}");
    // The adapters of merged layers cannot be changed.
    for result in [
        activate::activate(&mut model, None, &params),
        activate::remove(&mut model, "default", &params),
        inject::lora_named(&mut model, "b", &Targets::default(), &LoraConfig::default(), &params).map(drop),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("unmerge it first"), "{error}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_merged_says_why() -> Outcome {
    #[derive(Debug)]
    struct Opaque;
    impl Adapter for Opaque {
        fn forward(&self, xs: &Tensor, _: &BaseLinear, _: &Context) -> candle_core::Result<Tensor> {
            Ok(xs.clone())
        }
        fn parameters(&self) -> Vec<(Role, Tensor)> {
            Vec::new()
        }
        fn delta(&self, _: &BaseLinear, _: &Context) -> candle_core::Result<Option<Tensor>> {
            Ok(None)
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    }
    let (mut model, _) = frozen(&toy_config(true)?, DType::F32)?;
    let error = merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("no layer has an active adapter"), "{error}");
    model.visit_linears_mut(&mut |layer| layer.add("opaque", Box::new(Opaque)))?;
    let error = merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("\"opaque\" cannot be merged: its effect is not a change"), "{error}");
    Ok(())
}

#[test]
fn several_adapters_take_turns_and_leave() -> Outcome {
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    let base = logits(&model, &Pass::Mean.into())?;
    let lora = LoraConfig { rank: 2, alpha: 4.0, ..LoraConfig::default() };
    inject::lora_named(&mut model, "first", &Targets::parse("all-linear")?, &lora, &params)?;
    let alone = params.trainable_count();
    inject::monteclora_named(&mut model, "second", &Targets::parse("v_proj")?, &bayes(), &params)?;
    scatter(&params)?;
    assert_eq!(activate::names(&model)?, ["first", "second"]);
    // The adapter that was added last is active, on its own layers only.
    let second = logits(&model, &Pass::Mean.into())?;
    activate::activate(&mut model, Some("first"), &params)?;
    let first = logits(&model, &Pass::Mean.into())?;
    activate::activate(&mut model, None, &params)?;
    assert_eq!(logits(&model, &Pass::Mean.into())?, base);
    assert!(!close(&first, &base, 1e-3) && !close(&second, &base, 1e-3) && !close(&first, &second, 1e-3));
    activate::activate(&mut model, Some("second"), &params)?;
    assert_eq!(logits(&model, &Pass::Mean.into())?, second);
    merge(&mut model)?;
    assert!(close(&logits(&model, &Pass::Mean.into())?, &second, 1e-5));
    unmerge(&mut model)?;

    let error = activate::activate(&mut model, Some("third"), &params).unwrap_err().to_string();
    assert!(error.contains("there is no \"third\"; the model has: first, second"), "{error}");
    assert_eq!(logits(&model, &Pass::Mean.into())?, second);
    activate::remove(&mut model, "second", &params)?;
    assert_eq!(logits(&model, &Pass::Mean.into())?, base);
    activate::activate(&mut model, Some("first"), &params)?;
    assert_eq!((activate::names(&model)?, params.trainable_count()), (vec!["first".to_string()], alone));
    // The name of a removed adapter is free again, and two calls may use one name for different layers.
    inject::monteclora_named(&mut model, "second", &Targets::parse("q_proj")?, &bayes(), &params)?;
    inject::lora_named(&mut model, "second", &Targets::parse("v_proj")?, &lora, &params)?;
    let mut active = 0;
    model.visit_linears(&mut |layer| {
        active += usize::from(layer.active().is_some());
        Ok(())
    })?;
    assert_eq!(active, 4);
    Ok(())
}

#[test]
fn a_merged_model_neither_draws_nor_trains() -> Outcome {
    let (mut model, _) = adapted(DType::F32)?;
    merge(&mut model)?;
    for pass in [Pass::Posterior { draw: 1 }, Pass::Train { draw: 0 }] {
        let error = logits(&model, &pass.into()).unwrap_err().to_string();
        assert!(error.contains("model.layers.0.self_attn.q_proj is merged"), "{error}");
    }
    logits(&model, &Pass::Mean.into())?;
    // Not even where two layers are fused into one operation; and training ends at once.
    let dir = tempfile::tempdir()?;
    let start =
        MethodInit::Fresh(Method::MonteCLoRA(bayes()), Targets::parse("intermediate.dense,output.dense")?);
    let files = checkpoint(dir.path())?;
    let mut classifier = Classifier::load(&files, 2, &start, Noise::new(4), DType::F32, &Device::Cpu)?;
    merge(classifier.model.as_mut())?;
    let (rows, batcher) = (rows(8, false), Batcher::new(4, true, Noise::new(4))?);
    let objective = Classification::new(&classifier, &rows, batcher);
    let ended = fit(&objective, &classifier.params, &TrainConfig::default(), &mut Log::default());
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("roberta.encoder.layer.0.") && error.contains("dense is merged"), "{error}");
    Ok(())
}
