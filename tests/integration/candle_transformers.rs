//! The models of candle-transformers run merged weights of this crate, at the mean or at a posterior draw,
//! from a saved folder and in memory; and a test shows why they cannot be trained themselves.

use crate::encoders::xlm_config;
use crate::support::checkpoints::{checkpoint, llama_checkpoint};
use crate::support::decoders::one_row;
use crate::support::{assert_close, padded_batch, scatter, toy_config, Outcome};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::{llama, xlm_roberta};
use monteclora::inject::{self, Targets};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::hub::ModelFiles;
use monteclora::models::roberta::{Family, RobertaForSequenceClassification};
use monteclora::models::save::{merged_tensors, save_merged, MAX_SHARD_BYTES};
use monteclora::models::sequence::SequenceConfig;
use monteclora::{AdaptableLinear, Context, MonteCLoRA, MonteCLoRAConfig, Noise, Params, Pass, Role};

const PASSES: [Pass; 3] = [Pass::Mean, Pass::Posterior { draw: 0 }, Pass::Posterior { draw: 4 }];

fn bayes() -> MonteCLoRAConfig {
    MonteCLoRAConfig { rank: 3, alpha: 7.0, num_components: 3, sample_scaler: 0.3, ..Default::default() }
}

/// A decoder with adapters in general position.
fn decoder(files: &ModelFiles, config: &DecoderConfig) -> Outcome<(DecoderForCausalLM, Params)> {
    let vb = files.var_builder(DType::F32, &Device::Cpu)?;
    let mut model = DecoderForCausalLM::load(vb, config, Noise::new(0))?;
    let params = Params::new(Noise::new(1), &Device::Cpu);
    inject::monteclora(&mut model, &Targets::parse("all-linear")?, &bayes(), &params)?;
    scatter(&params)?;
    Ok((model, params))
}

/// The logits after the last token, computed by candle-transformers.
fn theirs(vb: VarBuilder, config: &DecoderConfig, ids: &Tensor) -> Outcome<Tensor> {
    let model = llama::Llama::load(vb, &config.to_candle_llama()?)?;
    let mut cache = llama::Cache::new(false, DType::F32, &config.to_candle_llama()?, &Device::Cpu)?;
    Ok(model.forward(ids, 0, &mut cache)?) // (1, vocab)
}

#[test]
fn its_llama_says_what_ours_says_at_the_mean_and_at_a_draw() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = llama_checkpoint(dir.path())?;
    let config = DecoderConfig::from_file(files.config_path())?;
    let (model, params) = decoder(&files, &config)?;
    let (ids, mask) = one_row(&[1, 17, 4, 33, 8, 21, 9])?;
    let ours = |pass: Pass| -> Outcome<Tensor> {
        Ok(model.logits(&ids, &mask, &Context::from(pass))?.narrow(1, 6, 1)?.squeeze(1)?)
    };
    for pass in PASSES {
        let tensors = merged_tensors(&model, &params, &files, &pass)?;
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        assert_close(&theirs(vb, &config, &ids)?, &ours(pass)?, 2e-4)?;
    }
    let apart = (ours(PASSES[1])? - ours(PASSES[0])?)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    assert!(apart > 1e-2, "the draw is the mean: {apart}");

    let out = dir.path().join("merged");
    save_merged(&model, &params, &files, None, &out, MAX_SHARD_BYTES)?;
    let saved = ModelFiles::locate(out.to_str().ok_or("a path")?, None)?;
    let vb = saved.var_builder(DType::F32, &Device::Cpu)?;
    assert_close(&theirs(vb, &config, &ids)?, &ours(Pass::Mean)?, 2e-4)?;

    let error = merged_tensors(&model, &params, &files, &Pass::Train { draw: 0 }).unwrap_err().to_string();
    assert!(error.contains("drops inputs"), "{error}");
    Ok(())
}

#[test]
fn its_roberta_says_what_ours_says_with_the_trained_head() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let config = toy_config(Family::Roberta);
    let params = Params::new(Noise::new(9), &Device::Cpu);
    let vb = files.var_builder(DType::F32, &Device::Cpu)?;
    let head = params.var_builder(Some(vb.clone()), Role::Head);
    let mut model = RobertaForSequenceClassification::load(vb, head, &config, Noise::new(9))?;
    inject::monteclora(&mut model, &Targets::default(), &bayes(), &params)?;
    scatter(&params)?;
    let (ids, types, mask) = padded_batch(&config)?;
    let load = |vb| xlm_roberta::XLMRobertaForSequenceClassification::new(3, &xlm_config(&config), vb);
    for pass in PASSES {
        let tensors = merged_tensors(&model, &params, &files, &pass)?;
        let theirs = load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))?;
        let ours = model.forward(&ids, Some(&types), &mask, &pass.into())?;
        assert_close(&theirs.forward(&ids, &mask, &types)?, &ours, 2e-4)?;
    }
    let (out, json) =
        (dir.path().join("merged"), SequenceConfig::from_file(files.config_path(), 3)?.to_json());
    save_merged(&model, &params, &files, Some(&json), &out, MAX_SHARD_BYTES)?;
    let saved = ModelFiles::locate(out.to_str().ok_or("a path")?, None)?;
    let theirs = load(saved.var_builder(DType::F32, &Device::Cpu)?)?;
    let ours = model.forward(&ids, Some(&types), &mask, &Pass::Mean.into())?;
    assert_close(&theirs.forward(&ids, &mask, &types)?, &ours, 2e-4)
}

/// Why this crate has its own models: the linear layers of candle-transformers are private, so adapters
/// cannot be added; and even if all weights are variables, those before a norm or a rotation get no gradient.
#[test]
fn its_models_give_the_weights_below_a_norm_no_gradient() -> Outcome {
    let dir = tempfile::tempdir()?;
    let config = DecoderConfig::from_file(llama_checkpoint(dir.path())?.config_path())?;
    let (map, (ids, _)) = (VarMap::new(), one_row(&[1, 17, 4])?);
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let store = theirs(vb, &config, &ids)?.sqr()?.sum_all()?.backward()?;
    let vars = map.data().lock().map_err(|_| "a lock")?;
    let with: Vec<&String> =
        vars.iter().filter(|(_, var)| store.get(var).is_some()).map(|(name, _)| name).collect();
    // The embedding is tied to the head, and gets the gradient of the head only.
    assert_eq!(with, ["model.embed_tokens.weight"], "of {}", vars.len());
    Ok(())
}

#[test]
fn a_layer_at_a_draw_is_the_layer_that_the_draw_runs() -> Outcome {
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let weight = params.create("w", Role::Base, (6, 5), &monteclora::Init::Normal(0.4))?.detach();
    let mut layer = AdaptableLinear::new("layer", candle_nn::Linear::new(weight, None));
    assert!(layer.merged_layer_at(&PASSES[1])?.is_none(), "no adapter is active");
    layer.add("default", Box::new(MonteCLoRA::new(&params, "layer", "default", (5, 6), &bayes())?))?;
    scatter(&params)?;
    let xs = Tensor::arange(0f32, 20., &Device::Cpu)?.cos()?.reshape((4, 5))?;
    for pass in PASSES {
        let merged = layer.merged_layer_at(&pass)?.ok_or("a layer")?;
        assert_close(&candle_nn::Module::forward(&merged, &xs)?, &layer.forward(&xs, &pass.into())?, 1e-5)?;
    }
    assert!(layer.merged_layer_at(&Pass::Train { draw: 1 }).is_err());
    Ok(())
}
