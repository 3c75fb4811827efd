//! Several adapters on one model, and adapters merged into it, on the model in use.

use crate::finetune::{bare_checkpoint, checkpoint, llama_checkpoint, logits_of, rows};
use crate::llama::{frozen, toy_config};
use crate::support::{scatter, Outcome};
use candle_core::{DType, Device, Tensor};
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::Batch;
use monteclora::inject::{self, Targets};
use monteclora::merge::{merge, unmerge};
use monteclora::models::causal::CausalLm;
use monteclora::models::hub::ModelFiles;
use monteclora::models::llama::{LlamaConfig, LlamaForCausalLM};
use monteclora::models::save::{save_merged, MAX_SHARD_BYTES};
use monteclora::models::sequence::SequenceConfig;
use monteclora::named;
use monteclora::params::{Init, Role};
use monteclora::slot::{Adapter, Linears, Slot};
use monteclora::{MonteCLoRAConfig, Noise, Params, Pass};

fn logits(model: &LlamaForCausalLM, pass: &Pass) -> Outcome<Vec<f32>> {
    let ids = Tensor::new(&[[1u32, 17, 4, 33, 8]], &Device::Cpu)?;
    let mask = Tensor::ones((1, 5), DType::U8, &Device::Cpu)?;
    Ok(model.logits(&ids, &mask, pass)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn close(one: &[f32], other: &[f32], tolerance: f32) -> bool {
    one.iter().zip(other).all(|(a, b)| (a - b).abs() <= tolerance)
}

fn bayes() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, alpha: 7.0, sample_scaler: 0.3, ..Default::default() }
}

/// A frozen toy with MonteCLoRA on all layers, in general position.
fn adapted(dtype: DType) -> Outcome<(LlamaForCausalLM, Params)> {
    let (mut model, params) = frozen(&toy_config(true)?, dtype)?;
    inject::monteclora(&mut model, &Targets::parse("all-linear")?, &bayes(), &params)?;
    scatter(&params)?;
    Ok((model, params))
}

/// The bits of every base weight.
fn bases(model: &LlamaForCausalLM) -> Outcome<Vec<Vec<f32>>> {
    let mut all = Vec::new();
    model.visit_linears(&mut |slot| {
        all.push(slot.base().weight().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    })?;
    Ok(all)
}

#[test]
fn merged_is_unmerged_and_unmerging_restores_every_bit() -> Outcome {
    // bf16 rounds every merged weight to eight bits.
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-6), (DType::BF16, 0.3)] {
        let (mut model, _) = adapted(dtype)?;
        let (before, base) = (logits(&model, &Pass::Mean)?, bases(&model)?);
        let drawn = logits(&model, &Pass::Posterior { draw: 1 })?;
        assert_eq!(merge(&mut model)?, 14);
        let merged = logits(&model, &Pass::Mean)?;
        assert!(close(&merged, &before, tolerance), "{dtype:?}");
        // Every pass is the mean now; what the base was stays beside it.
        assert_eq!(logits(&model, &Pass::Posterior { draw: 1 })?, merged);
        assert_eq!(bases(&model)?, base);
        assert_eq!((unmerge(&mut model)?, unmerge(&mut model)?), (14, 0));
        assert_eq!(logits(&model, &Pass::Mean)?, before);
        assert_eq!(logits(&model, &Pass::Posterior { draw: 1 })?, drawn);
        named::activate(&mut model, None)?;
        let (plain, _) = frozen(&toy_config(true)?, dtype)?;
        assert_eq!(logits(&model, &Pass::Mean)?, logits(&plain, &Pass::Mean)?);
    }
    Ok(())
}

#[test]
fn a_merge_that_fails_changes_nothing() -> Outcome {
    let (mut model, params) = adapted(DType::F32)?;
    let name = "model.layers.1.mlp.up_proj.default.b";
    let kept = params.get(name).ok_or("none")?.var.as_detached_tensor().copy()?;
    params.set(name, &(&kept * f64::INFINITY)?)?;
    let error = merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.mlp.up_proj.weight: merged with \"default\""), "{error}");
    model.visit_linears(&mut |slot| {
        assert!(!slot.is_merged());
        Ok(())
    })?;
    params.set(name, &kept)?;
    merge(&mut model)?;
    let error = merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("unmerge it first"), "{error}");
    // Merged layers keep their adapters as they are.
    for result in [
        named::activate(&mut model, None),
        named::remove(&mut model, "default", &params),
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
        fn forward(&self, xs: &Tensor, _: &candle_nn::Linear, _: &Pass) -> candle_core::Result<Tensor> {
            Ok(xs.clone())
        }
        fn parameters(&self) -> Vec<(Role, Tensor)> {
            Vec::new()
        }
        fn delta(&self) -> candle_core::Result<Option<Tensor>> {
            Ok(None)
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
        fn as_any_mut(&mut self) -> &mut dyn std::any::Any {
            self
        }
    }
    let (mut model, _) = frozen(&toy_config(true)?, DType::F32)?;
    let error = merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("no layer has an active adapter"), "{error}");
    model.visit_linears_mut(&mut |slot| slot.add("opaque", Box::new(Opaque)))?;
    let error = merge(&mut model).unwrap_err().to_string();
    assert!(error.contains("\"opaque\" is no change of its weight"), "{error}");
    // A base that is trained itself would keep the graph of the merge.
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let weight = params.create("w", Role::Base, (2, 2), &Init::Constant(1.0))?;
    let mut slot = Slot::new("layer", candle_nn::Linear::new(weight, None));
    slot.add("opaque", Box::new(Opaque))?;
    let error = slot.merged_layer().map(drop).unwrap_err().to_string();
    assert!(error.contains("only a frozen base"), "{error}");
    Ok(())
}

#[test]
fn several_adapters_take_turns_and_leave() -> Outcome {
    let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
    let base = logits(&model, &Pass::Mean)?;
    let lora = LoraConfig { rank: 2, alpha: 4.0, ..LoraConfig::default() };
    inject::lora_named(&mut model, "first", &Targets::parse("all-linear")?, &lora, &params)?;
    let alone = params.trainable_count();
    inject::monteclora_named(&mut model, "second", &Targets::parse("v_proj")?, &bayes(), &params)?;
    scatter(&params)?;
    assert_eq!(named::names(&model)?, ["first", "second"]);
    // The last one is active, on its own layers and no others.
    let second = logits(&model, &Pass::Mean)?;
    named::activate(&mut model, Some("first"))?;
    let first = logits(&model, &Pass::Mean)?;
    named::activate(&mut model, None)?;
    assert_eq!(logits(&model, &Pass::Mean)?, base);
    assert!(!close(&first, &base, 1e-3) && !close(&second, &base, 1e-3) && !close(&first, &second, 1e-3));
    named::activate(&mut model, Some("second"))?;
    assert_eq!(logits(&model, &Pass::Mean)?, second);
    merge(&mut model)?;
    assert!(close(&logits(&model, &Pass::Mean)?, &second, 1e-5));
    unmerge(&mut model)?;

    let error = named::activate(&mut model, Some("third")).unwrap_err().to_string();
    assert!(error.contains("there is no \"third\"; the model has: first, second"), "{error}");
    assert_eq!(logits(&model, &Pass::Mean)?, second);
    named::remove(&mut model, "second", &params)?;
    assert_eq!(logits(&model, &Pass::Mean)?, base);
    assert_eq!((named::names(&model)?, params.trainable_count()), (vec!["first".to_string()], alone));
    // The name is free again, and one name may come in two calls.
    inject::monteclora_named(&mut model, "second", &Targets::parse("q_proj")?, &bayes(), &params)?;
    inject::lora_named(&mut model, "second", &Targets::parse("v_proj")?, &lora, &params)?;
    let mut active = 0;
    model.visit_linears(&mut |slot| {
        active += usize::from(slot.active().is_some());
        Ok(())
    })?;
    assert_eq!(active, 4);
    Ok(())
}

#[test]
fn a_merged_model_is_a_folder_that_loads_without_its_adapter() -> Outcome {
    let dirs = [tempfile::tempdir()?, tempfile::tempdir()?, tempfile::tempdir()?];
    let (encoder, decoder) = (checkpoint(dirs[0].path())?, llama_checkpoint(dirs[1].path())?);
    let bare = bare_checkpoint(&encoder, dirs[2].path())?;
    std::fs::write(dirs[1].path().join("tokenizer_config.json"), "{}")?;
    let rows = rows(5, false);
    for (files, shards) in [(&encoder, 1), (&decoder, 7), (&bare, 1)] {
        let config = SequenceConfig::from_file(files.config_path(), 2)?;
        let params = Params::new(Noise::new(9), &Device::Cpu);
        let vb = files.var_builder(DType::F32, &Device::Cpu)?;
        let head = params.var_builder(Some(vb.clone()), Role::Head);
        let mut model = config.load(vb, head, Noise::new(9))?;
        inject::monteclora(model.as_mut(), &Targets::default(), &bayes(), &params)?;
        scatter(&params)?;
        let out = files.config_path().with_file_name("merged");
        let limit = if shards == 1 { MAX_SHARD_BYTES } else { 12_000 };
        // From the adapter beside its base, and from the merged layers.
        save_merged(model.as_ref(), &params, files, Some(&config.to_json()), &out, limit)?;
        let saved = ModelFiles::locate(out.to_str().ok_or("a path")?, None)?;
        assert!(saved.weights().len() >= shards, "{:?}", saved.weights());
        assert_eq!(saved.file("tokenizer_config.json")?.is_some(), shards > 1);
        let once = logits_of(&saved, None, &rows)?;
        merge(model.as_mut())?;
        let batch = Batch::collate(&rows.iter().collect::<Vec<_>>(), model.pad_id(), &Device::Cpu)?;
        let (ids, types, mask) = (&batch.input_ids, &batch.token_type_ids, &batch.attention_mask);
        assert_eq!(once, model.logits(ids, types, mask, &Pass::Mean)?.to_vec2::<f32>()?);
        let again = out.with_file_name("again");
        save_merged(model.as_ref(), &params, files, Some(&config.to_json()), &again, limit)?;
        for file in saved.weights() {
            let name = file.file_name().ok_or("a name")?;
            assert_eq!(std::fs::read(file)?, std::fs::read(again.join(name))?);
        }
        let error = save_merged(model.as_ref(), &params, files, None, &out, limit).unwrap_err().to_string();
        assert!(error.contains("merged: it exists"), "{error}");
    }
    Ok(())
}

#[test]
fn a_folder_that_cannot_be_written_whole_is_not_there() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let (decoder, encoder) = (llama_checkpoint(dir.path())?, checkpoint(other.path())?);
    let config = LlamaConfig::from_file(decoder.config_path())?;
    let mut model =
        LlamaForCausalLM::load(decoder.var_builder(DType::F32, &Device::Cpu)?, &config, Noise::new(0))?;
    let params = Params::new(Noise::new(1), &Device::Cpu);
    inject::monteclora(&mut model, &Targets::default(), &bayes(), &params)?;
    scatter(&params)?;
    let out = dir.path().join("out");
    let save = |model: &LlamaForCausalLM, files: &ModelFiles| {
        save_merged(model, &params, files, None, &out, MAX_SHARD_BYTES).unwrap_err().to_string()
    };
    let error = save(&model, &encoder);
    assert!(error.contains("self_attn.k_proj.weight: the checkpoint has no such tensor"), "{error}");
    let name = "model.layers.1.self_attn.v_proj.default.b";
    let kept = params.get(name).ok_or("none")?.var.as_detached_tensor().copy()?;
    params.set(name, &(&kept * f64::NAN)?)?;
    let error = save(&model, &decoder);
    assert!(error.contains("model.layers.1.self_attn.v_proj.weight: merged with"), "{error}");
    assert!(!out.exists());
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 2, "nothing is left behind");
    // The checkpoint's dtype stays: what was loaded in single precision is written in half.
    params.set(name, &kept)?;
    let half = candle_core::safetensors::load(&decoder.weights()[0], &Device::Cpu)?;
    let half = half.into_iter().map(|(name, t)| Ok((name, t.to_dtype(DType::BF16)?)));
    let half = half.collect::<candle_core::Result<std::collections::HashMap<_, _>>>()?;
    candle_core::safetensors::save(&half, &decoder.weights()[0])?;
    save_merged(&model, &params, &decoder, None, &out, MAX_SHARD_BYTES)?;
    let saved = candle_core::safetensors::load(out.join("model.safetensors"), &Device::Cpu)?;
    assert_eq!(saved.len(), half.len());
    assert!(saved.values().all(|tensor| tensor.dtype() == DType::BF16));
    Ok(())
}
