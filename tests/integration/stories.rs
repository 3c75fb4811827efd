//! The bundled stories260K: it reproduces the text that its authors published, and it can be fine-tuned.

use std::path::Path;

use candle_core::{DType, Device};
use monteclora::adapter::AdaptableModel;
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::Batcher;
use monteclora::data::causal::{PromptEncoder, Tokens};
use monteclora::data::instruct::{self, Format};
use monteclora::eval::Generator;
use monteclora::inject::{Targets, DEFAULT_ADAPTER};
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::generate::{generate, GenerateConfig};
use monteclora::models::hub::ModelFiles;
use monteclora::models::Quantization;
use monteclora::train::{fit, held_out_loss, CausalTuning, Method, MethodInit, TrainConfig};
use monteclora::{MonteCLoRAConfig, Noise, Params, Pass};
use tokenizers::Tokenizer;

use crate::support::checkpoints::Log;
use crate::support::{asset, Outcome};

fn load(
    dir: &Path,
    quantize: Option<Quantization>,
) -> Outcome<(DecoderForCausalLM, DecoderConfig, Tokenizer)> {
    let files = ModelFiles::locate(&dir.display().to_string(), None)?.quantized(quantize);
    let config = DecoderConfig::from_file(files.config_path())?;
    let tokenizer = Tokenizer::from_file(dir.join("tokenizer.json")).map_err(|e| e.to_string())?;
    let weights = files.open_weights(DType::F32, &Device::Cpu)?;
    Ok((DecoderForCausalLM::load(weights, &config, Noise::new(0))?, config, tokenizer))
}

/// The text that the model generates greedily from the begin token.
fn tell(model: &DecoderForCausalLM, tokenizer: &Tokenizer) -> Outcome<String> {
    let config = GenerateConfig { max_new_tokens: 256, ..Default::default() };
    let ids = generate(model, &[vec![1]], &config, &mut |_, _| true)?;
    Ok(tokenizer.decode(&ids[0], true).map_err(|e| e.to_string())?)
}

/// Runs a short fine-tune; returns the held-out loss before and after, and the texts with the adapter
/// switched on and off.
fn tune(
    dir: &Path,
    quantize: Option<Quantization>,
    method: Method,
    data: &Path,
    rows: usize,
) -> Outcome<(f64, f64, String, String)> {
    let (mut model, config, tokenizer) = load(dir, quantize)?;
    let encoder = PromptEncoder::new(tokenizer.clone(), 192, 512, config.eos_token_ids.clone(), false)?;
    let read = |name: &str, most: usize| -> Outcome<Vec<Tokens>> {
        let mut rows = instruct::read(&data.join(name), Format::Gsm8k)?;
        rows.truncate(most);
        Ok(encoder.encode(&rows)?.rows)
    };
    let (seen, unseen) = (read("train.jsonl", rows)?, read("test.jsonl", 16)?);
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let hooks = MethodInit::Fresh(method, Targets::default()).inject(&mut model, &params)?;
    let before = held_out_loss(&model, &unseen, 16, &[Pass::Mean])?;
    let batcher = Batcher::new(8, false, Noise::new(1))?;
    let objective = CausalTuning::new(&model, hooks, &seen, batcher, config.pad_id());
    let config = TrainConfig { epochs: 2, lr: 5e-3, keep_best: false, ..TrainConfig::default() };
    fit(&objective, &params, &config, &mut Log::default())?;
    let after = held_out_loss(&model, &unseen, 16, &[Pass::Mean])?;
    let adapted = tell(&model, &tokenizer)?;
    model.visit_linears_mut(&mut |layer| layer.activate(None))?;
    let off = tell(&model, &tokenizer)?;
    model.visit_linears_mut(&mut |layer| {
        let name = layer.adapter(DEFAULT_ADAPTER).map(|_| DEFAULT_ADAPTER);
        layer.activate(name)
    })?;
    assert_eq!(tell(&model, &tokenizer)?, adapted);
    Ok((before, after, adapted, off))
}

#[test]
fn the_story_is_that_of_its_authors_word_for_word_also_with_a_trained_adapter_switched_off() -> Outcome {
    let (dir, data) = (asset("stories260k"), asset("gsm8k"));
    let story = std::fs::read_to_string(dir.join("story.txt"))?;
    let (model, _, tokenizer) = load(&dir, None)?;
    assert_eq!(tell(&model, &tokenizer)?, story.trim_end());

    let lora = LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() };
    let bayes = MonteCLoRAConfig { rank: 4, alpha: 8.0, ..MonteCLoRAConfig::default() };
    for method in [Method::Lora(lora), Method::MonteCLoRA(bayes)] {
        let name = method.name();
        let (before, after, adapted, off) = tune(&dir, None, method, &data, 96)?;
        assert!(after < before - 1.0, "{name}: held-out loss {before}, then {after}");
        assert_ne!(adapted, story.trim_end(), "{name}");
        assert_eq!(off, story.trim_end(), "{name}");
    }
    Ok(())
}

#[test]
fn a_fine_tune_in_8_bits_ends_where_that_in_single_precision_does() -> Outcome {
    let (dir, data) = (asset("stories260k"), asset("gsm8k"));
    let lora = Method::Lora(LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() });
    let (before, after, ..) = tune(&dir, None, lora.clone(), &data, 32)?;
    let (rounded_before, rounded_after, ..) = tune(&dir, Some("q8_0".parse()?), lora, &data, 32)?;
    assert_ne!(before, rounded_before, "nothing was rounded");
    let off = (rounded_after - after).abs() / after;
    assert!(after < before && off < 0.01, "{before} and {rounded_before}, then {after} and {rounded_after}");
    Ok(())
}

#[test]
fn a_text_keeps_the_blanks_that_it_begins_with() -> Outcome {
    let dir = asset("stories260k");
    let (model, _, tokenizer) = load(&dir, None)?;
    let encoder = PromptEncoder::new(tokenizer, 64, 512, None, false)?;
    let config = GenerateConfig { max_new_tokens: 8, ..Default::default() };
    let generator = Generator { model: &model, encoder: &encoder, config, batch_size: 1 };
    let story = std::fs::read_to_string(dir.join("story.txt"))?;
    let prompt = story.split_inclusive(' ').take(6).collect::<String>();
    let prompt = prompt.trim_end();
    let text = generator.texts(&[prompt], &[])?.swap_remove(0);
    assert!(text.starts_with(' '), "{text:?}");
    assert!(story.starts_with(&format!("{prompt}{text}")), "{prompt:?} {text:?}");
    Ok(())
}

#[test]
fn a_text_ends_at_the_end_tokens_of_either_file() -> Outcome {
    let bundled = asset("stories260k");
    let dir = tempfile::tempdir()?;
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(bundled.join(name), dir.path().join(name))?;
    }
    const PERIOD: u32 = 426;
    let continued = || -> Outcome<Vec<u32>> {
        let files = ModelFiles::locate(&dir.path().display().to_string(), None)?;
        let config = DecoderConfig::from_files(&files)?;
        let vb = files.var_builder(DType::F32, &Device::Cpu)?;
        let model = DecoderForCausalLM::load(vb, &config, Noise::new(0))?;
        let stop = config.eos_token_ids.clone();
        let config = GenerateConfig { max_new_tokens: 64, stop, ..GenerateConfig::default() };
        Ok(generate(&model, &[vec![1]], &config, &mut |_, _| true)?.swap_remove(0))
    };
    let long = continued()?;
    let first = long.iter().position(|token| *token == PERIOD).ok_or("no sentence ends")?;
    std::fs::write(
        dir.path().join("generation_config.json"),
        format!("{{\"eos_token_id\": [2, {PERIOD}]}}"),
    )?;
    assert_eq!(continued()?, long[..first]);
    Ok(())
}
