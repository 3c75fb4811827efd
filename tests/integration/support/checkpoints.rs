//! Toy checkpoints on disk, rows to fine-tune them on, and what they say of them.

use std::path::Path;

use candle_core::{DType, Device};
use monteclora::adapter::Role;
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::Batch;
use monteclora::data::encode::Encoded;
use monteclora::data::task::Label;
use monteclora::inject::Targets;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::hub::ModelFiles;
use monteclora::models::roberta::{Family, RobertaForSequenceClassification};
use monteclora::models::sequence::SequenceConfig;
use monteclora::peft::AdapterFile;
use monteclora::train::{Classifier, Method, MethodInit, Observer, StepRecord};
use monteclora::{MonteCLoRAConfig, Noise, Params, Pass};

use super::decoders::toy_json;
use super::{scatter, toy_config, toy_weights, Outcome};

/// Writes the toy encoder's configuration and weights, without a head, into a folder.
pub fn checkpoint(dir: &Path) -> Outcome<ModelFiles> {
    let config = toy_config(Family::Roberta);
    let weights = toy_weights(|vb, noise| {
        RobertaForSequenceClassification::load(vb.clone(), vb, &config, noise).map(drop)
    })?;
    let body = weights.into_iter().filter(|(name, _)| name.starts_with("roberta.")).collect();
    candle_core::safetensors::save(&body, dir.join("model.safetensors"))?;
    std::fs::write(dir.join("config.json"), serde_json::to_string(&config)?)?;
    Ok(ModelFiles::locate(dir.to_str().ok_or("a path")?, None)?)
}

/// Writes the weights of `files` under the names of a bare encoder.
pub fn bare_checkpoint(files: &ModelFiles, dir: &Path) -> Outcome<ModelFiles> {
    let weights = candle_core::safetensors::load(&files.weights()[0], &Device::Cpu)?;
    let bare = |(name, tensor): (String, _)| (name.trim_start_matches("roberta.").to_string(), tensor);
    let weights = weights.into_iter().map(bare).collect();
    candle_core::safetensors::save(&weights, dir.join("model.safetensors"))?;
    std::fs::copy(files.config_path(), dir.join("config.json"))?;
    Ok(ModelFiles::locate(dir.to_str().ok_or("a path")?, None)?)
}

/// Writes the toy decoder's configuration and weights, without a classification head, into a folder.
pub fn llama_checkpoint(dir: &Path) -> Outcome<ModelFiles> {
    let json = toy_json(true);
    let params = Params::new(Noise::new(5), &Device::Cpu);
    let config = DecoderConfig::from_value(json.clone())?;
    DecoderForCausalLM::load(params.var_builder(None, Role::Base), &config, Noise::new(0))?;
    scatter(&params)?;
    let body = params.all().into_iter().map(|(name, param)| (name, param.var.as_detached_tensor())).collect();
    candle_core::safetensors::save(&body, dir.join("model.safetensors"))?;
    std::fs::write(dir.join("config.json"), json.to_string())?;
    Ok(ModelFiles::locate(dir.to_str().ok_or("a path")?, None)?)
}

/// Rows of two kinds of tokens; the score is the share of one kind, the class whether it is above 0.34.
pub fn rows(count: usize, regression: bool) -> Vec<Encoded> {
    let row = |i: usize| {
        let length = 4 + i % 5;
        let mut ids = vec![0];
        ids.extend((0..length).map(|j| if (i * 7 + j * j).is_multiple_of(3) { 10 } else { 20 }));
        ids.push(2);
        let share = ids.iter().filter(|id| **id == 10).count() as f32 / length as f32;
        let label = if regression { Label::Score(share) } else { Label::Class(u32::from(share > 0.34)) };
        Encoded { type_ids: vec![0; ids.len()], ids, label, row: i }
    };
    (0..count).map(row).collect()
}

/// The records of a run's steps.
#[derive(Default)]
pub struct Log(pub Vec<StepRecord>);

impl Observer for Log {
    fn step(&mut self, record: &StepRecord) -> monteclora::Result<()> {
        self.0.push(record.clone());
        Ok(())
    }

    fn evaluate(&mut self, _: usize) -> monteclora::Result<Option<f64>> {
        Ok(None)
    }
}

/// LoRA, MonteCLoRA and full fine-tuning.
pub fn methods() -> [Method; 3] {
    let lora = LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() };
    let bayes = MonteCLoRAConfig { rank: 4, alpha: 8.0, ..MonteCLoRAConfig::default() };
    [Method::Lora(lora), Method::MonteCLoRA(bayes), Method::Full]
}

/// A classifier for fine-tuning a checkpoint.
pub fn load(files: &ModelFiles, method: &Method, labels: usize) -> Outcome<Classifier> {
    let start = MethodInit::Fresh(method.clone(), Targets::default());
    Ok(Classifier::load(files, labels, &start, Noise::new(4), DType::F32, &Device::Cpu)?)
}

/// The logits of some rows, computed by a checkpoint, with an adapter on it if one is given.
pub fn logits_of(files: &ModelFiles, adapter: Option<&Path>, rows: &[Encoded]) -> Outcome<Vec<Vec<f32>>> {
    let config = SequenceConfig::from_file(files.config_path(), 2)?;
    let params = Params::new(Noise::new(9), &Device::Cpu);
    let vb = files.var_builder(DType::F32, &Device::Cpu)?;
    let head = match adapter {
        Some(_) => params.var_builder(Some(vb.clone()), Role::Head),
        None => vb.clone(),
    };
    let mut model = config.load(vb, head, Noise::new(9))?;
    if let Some(dir) = adapter {
        AdapterFile::read(dir)?.apply(model.as_mut(), "default", &params)?;
    }
    let batch = Batch::collate(&rows.iter().collect::<Vec<_>>(), model.pad_id(), &Device::Cpu)?;
    let logits =
        model.logits(&batch.input_ids, &batch.token_type_ids, &batch.attention_mask, &Pass::Mean.into())?;
    Ok(logits.to_vec2()?)
}
