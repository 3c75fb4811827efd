//! Saves whole model folders: with merged adapters, or with weights that were trained themselves.

use crate::gguf;
use crate::merge::{bayes, logits};
use crate::support::checkpoints::{bare_checkpoint, checkpoint, llama_checkpoint, logits_of, rows};
use crate::support::{scatter, Outcome};
use candle_core::{DType, Device, Tensor};
use monteclora::adapter::Role;
use monteclora::adapters::{BottleneckConfig, PromptConfig};
use monteclora::data::batch::Batch;
use monteclora::inject::merge::merge;
use monteclora::inject::{self, activate, Targets};
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::{check_merged, check_merged_gguf, save_merged, MAX_SHARD_BYTES};
use monteclora::models::sequence::SequenceConfig;
use monteclora::train::{Method, MethodInit};
use monteclora::{Noise, Params, Pass};
use std::collections::HashMap;
use std::path::Path;

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
        // Saved from an unmerged adapter here, and from merged layers below.
        save_merged(model.as_ref(), &params, files, Some(&config.to_json()), &out, limit)?;
        let saved = ModelFiles::locate(out.to_str().ok_or("a path")?, None)?;
        assert!(saved.weights().len() >= shards, "{:?}", saved.weights());
        assert_eq!(saved.file("tokenizer_config.json")?.is_some(), shards > 1);
        let once = logits_of(&saved, None, &rows)?;
        merge(model.as_mut())?;
        let batch = Batch::collate(&rows.iter().collect::<Vec<_>>(), model.pad_id(), &Device::Cpu)?;
        let (ids, types, mask) = (&batch.input_ids, &batch.token_type_ids, &batch.attention_mask);
        assert_eq!(once, model.logits(ids, types, mask, &Pass::Mean.into())?.to_vec2::<f32>()?);
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
fn what_is_no_weight_is_refused_before_it_is_trained() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = llama_checkpoint(dir.path())?;
    let config = DecoderConfig::from_file(files.config_path())?;
    for (method, reason) in [
        (
            Method::Bottleneck(BottleneckConfig { width: 2 }),
            "cannot be merged: its effect is not a change of the weight",
        ),
        (Method::Prompt(PromptConfig { virtual_tokens: 2 }), "virtual tokens cannot be merged"),
    ] {
        let base = files.var_builder(DType::F32, &Device::Cpu)?;
        let mut model = DecoderForCausalLM::load(base, &config, Noise::new(0))?;
        let params = Params::new(Noise::new(1), &Device::Cpu);
        MethodInit::Fresh(method, Targets::default()).inject(&mut model, &params)?;
        let error = check_merged(&model, &params, &files, &dir.path().join("out")).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    // The same for a base in GGUF.
    let source = gguf::locate(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf_golden.gguf"))?;
    let (mut model, params) = (gguf::load(&source)?, Params::new(Noise::new(1), &Device::Cpu));
    let method = Method::Bottleneck(BottleneckConfig { width: 2 });
    MethodInit::Fresh(method, Targets::default()).inject(&mut model, &params)?;
    let out = dir.path().join("out.gguf");
    let error = check_merged_gguf(&model, &params, &source, &out).unwrap_err().to_string();
    assert!(error.contains("cannot be merged: its effect is not a change of the weight"), "{error}");
    Ok(())
}

#[test]
fn a_folder_that_cannot_be_written_whole_is_not_there() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let (decoder, encoder) = (llama_checkpoint(dir.path())?, checkpoint(other.path())?);
    let config = DecoderConfig::from_file(decoder.config_path())?;
    let mut model =
        DecoderForCausalLM::load(decoder.var_builder(DType::F32, &Device::Cpu)?, &config, Noise::new(0))?;
    let params = Params::new(Noise::new(1), &Device::Cpu);
    inject::monteclora(&mut model, &Targets::default(), &bayes(), &params)?;
    scatter(&params)?;
    let out = dir.path().join("out");
    check_merged(&model, &params, &decoder, &out)?;
    let error = check_merged(&model, &params, &encoder, &out).unwrap_err().to_string();
    assert!(error.contains("self_attn.k_proj.weight: the checkpoint has no such tensor"), "{error}");
    assert!(check_merged(&model, &params, &decoder, dir.path())
        .unwrap_err()
        .to_string()
        .contains("it exists"));
    let save = |model: &DecoderForCausalLM, files: &ModelFiles| {
        save_merged(model, &params, files, None, &out, MAX_SHARD_BYTES).unwrap_err().to_string()
    };
    let error = save(&model, &encoder);
    assert!(error.contains("self_attn.k_proj.weight: the checkpoint has no such tensor"), "{error}");
    let name = "model.layers.1.self_attn.v_proj.default.b";
    let kept = params.get(name).ok_or("none")?.var.as_detached_tensor().copy()?;
    params.get(name).ok_or("a parameter")?.var.set(&(&kept * f64::NAN)?)?;
    let error = save(&model, &decoder);
    assert!(error.contains("model.layers.1.self_attn.v_proj.weight: merged with"), "{error}");
    assert!(!out.exists());
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 2, "nothing is left behind");
    // The checkpoint's dtype is kept: a model that was loaded in single precision is written in bf16.
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

/// A decoder from its files, with adapters in general position.
fn adapted(files: &ModelFiles, dtype: DType) -> Outcome<(DecoderForCausalLM, Params)> {
    let config = DecoderConfig::from_file(files.config_path())?;
    let vb = files.var_builder(dtype, &Device::Cpu)?;
    let mut model = DecoderForCausalLM::load(vb, &config, Noise::new(0))?;
    let params = Params::new(Noise::new(1), &Device::Cpu);
    inject::monteclora(&mut model, &Targets::default(), &bayes(), &params)?;
    scatter(&params)?;
    Ok((model, params))
}

#[test]
fn weights_that_were_trained_themselves_are_written() -> Outcome {
    let dirs = [tempfile::tempdir()?, tempfile::tempdir()?, tempfile::tempdir()?];
    let decoder = llama_checkpoint(dirs[0].path())?;
    let config = DecoderConfig::from_file(decoder.config_path())?;
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let vb = params.var_builder(Some(decoder.var_builder(DType::F32, &Device::Cpu)?), Role::Base);
    let model = DecoderForCausalLM::load(vb, &config, Noise::new(0))?;
    scatter(&params)?;
    let out = dirs[0].path().join("out");
    save_merged(&model, &params, &decoder, None, &out, 12_000)?;
    let saved = ModelFiles::locate(out.to_str().ok_or("a path")?, None)?;
    let again =
        DecoderForCausalLM::load(saved.var_builder(DType::F32, &Device::Cpu)?, &config, Noise::new(0))?;
    assert_eq!(logits(&again, &Pass::Mean.into())?, logits(&model, &Pass::Mean.into())?);

    // A checkpoint of a bare body is trained and saved under its own names.
    let bare = bare_checkpoint(&checkpoint(dirs[1].path())?, dirs[2].path())?;
    let config = SequenceConfig::from_file(bare.config_path(), 2)?;
    let params = Params::new(Noise::new(9), &Device::Cpu);
    let vb = bare.var_builder(DType::F32, &Device::Cpu)?;
    let head = params.var_builder(Some(vb.clone()), Role::Head);
    let model = config.load(params.var_builder(Some(vb), Role::Base), head, Noise::new(9))?;
    scatter(&params)?;
    let out = dirs[2].path().join("out");
    save_merged(model.as_ref(), &params, &bare, Some(&config.to_json()), &out, MAX_SHARD_BYTES)?;
    let rows = rows(5, false);
    let batch = Batch::collate(&rows.iter().collect::<Vec<_>>(), model.pad_id(), &Device::Cpu)?;
    let (ids, types, mask) = (&batch.input_ids, &batch.token_type_ids, &batch.attention_mask);
    let saved = ModelFiles::locate(out.to_str().ok_or("a path")?, None)?;
    let expected = model.logits(ids, types, mask, &Pass::Mean.into())?.to_vec2::<f32>()?;
    assert_eq!(logits_of(&saved, None, &rows)?, expected);
    Ok(())
}

#[test]
fn a_trained_head_replaces_heads_and_nothing_else() -> Outcome {
    let dirs = [tempfile::tempdir()?, tempfile::tempdir()?];
    let text = llama_checkpoint(dirs[0].path())?;
    let at = |name: &str| dirs[1].path().join(name);
    // Names as in older files of Gemma 3, with a task's head and the pre-training head beside the body.
    let weights = candle_core::safetensors::load(&text.weights()[0], &Device::Cpu)?;
    let mut weights: HashMap<String, Tensor> =
        weights.into_iter().map(|(name, tensor)| (format!("language_model.{name}"), tensor)).collect();
    let kept = ["vision_tower.layer.weight", "multi_modal_projector.soft.weight"];
    for name in kept.into_iter().chain(["score.weight", "lm_head.weight"]) {
        weights.insert(name.to_string(), Tensor::ones((5, 3), DType::F32, &Device::Cpu)?);
    }
    candle_core::safetensors::save(&weights, at("model.safetensors"))?;
    std::fs::copy(text.config_path(), at("config.json"))?;
    let files = ModelFiles::locate(dirs[1].path().to_str().ok_or("a path")?, None)?;

    let config = SequenceConfig::from_file(files.config_path(), 2)?;
    let params = Params::new(Noise::new(9), &Device::Cpu);
    let head = params.var_builder(None, Role::Head);
    let mut model = config.load(files.var_builder(DType::F32, &Device::Cpu)?, head, Noise::new(9))?;
    inject::monteclora(model.as_mut(), &Targets::default(), &bayes(), &params)?;
    save_merged(model.as_ref(), &params, &files, None, &at("out"), MAX_SHARD_BYTES)?;
    let saved = candle_core::safetensors::load(at("out").join("model.safetensors"), &Device::Cpu)?;
    for name in kept {
        assert_eq!(saved[name].to_vec2::<f32>()?, weights[name].to_vec2::<f32>()?);
    }
    assert_eq!(saved["score.weight"].dims()[0], 2);
    assert!(!saved.contains_key("lm_head.weight"));
    Ok(())
}

#[test]
fn a_checkpoint_is_not_copied_as_if_it_were_trained() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = llama_checkpoint(dir.path())?;
    let (mut model, params) = adapted(&files, DType::F32)?;
    activate::activate(&mut model, None, &params)?;
    let out = dir.path().join("out");
    let error = save_merged(&model, &params, &files, None, &out, MAX_SHARD_BYTES).unwrap_err().to_string();
    assert!(error.contains("invalid adapter: no layer has an active adapter"), "{error}");
    assert!(!out.exists());
    Ok(())
}

#[test]
fn an_adapter_is_added_to_the_weight_that_the_checkpoint_has() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = llama_checkpoint(dir.path())?;
    let mut saved = Vec::new();
    for (name, dtype) in [("single", DType::F32), ("half", DType::BF16)] {
        let (model, params) = adapted(&files, dtype)?;
        let out = dir.path().join(name);
        save_merged(&model, &params, &files, None, &out, MAX_SHARD_BYTES)?;
        saved.push(std::fs::read(out.join("model.safetensors"))?);
    }
    assert!(saved[0] == saved[1], "what the model was loaded in shows in what is written");
    Ok(())
}

#[test]
fn the_tokenizer_s_files_come_before_the_weights() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = llama_checkpoint(dir.path())?;
    let (model, params) = adapted(&files, DType::F32)?;
    // NaN in the adapter, which would make writing the weights fail.
    let name = "model.layers.1.self_attn.v_proj.default.b";
    let b = params.get(name).ok_or("none")?.var.as_detached_tensor().copy()?;
    params.get(name).ok_or("a parameter")?.var.set(&(&b * f64::NAN)?)?;
    std::fs::write(dir.path().join("vocab.json"), "{}")?;
    let out = dir.path().join("out");
    let save = || save_merged(&model, &params, &files, None, &out, MAX_SHARD_BYTES);
    let error = save().unwrap_err().to_string();
    assert!(error.contains("merges.txt") && error.contains("its tokenizer is incomplete"), "{error}");
    assert!(!out.exists());
    params.set(name, &b)?;
    for name in ["merges.txt", "generation_config.json", "chat_template.jinja"] {
        std::fs::write(dir.path().join(name), name)?;
    }
    save()?;
    for name in ["vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja"] {
        assert_eq!(std::fs::read(out.join(name))?, std::fs::read(dir.path().join(name))?);
    }
    Ok(())
}
