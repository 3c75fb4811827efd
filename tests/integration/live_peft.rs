//! Exchanges adapters with the real PEFT in both directions, if Python has it.
//!
//! `MONTECLORA_PYTHON` names the interpreter; the default is `python3`. It runs `tests/data/live_peft.py`.

use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use monteclora::adapter::{AdaptableModel, Role};
use monteclora::adapters::LoraConfig;
use monteclora::inject::{self, Targets, DEFAULT_ADAPTER};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::save_merged;
use monteclora::models::sequence::SequenceConfig;
use monteclora::ops::{self, OpPath};
use monteclora::peft::{AdapterFile, AdapterMetadata, AdapterMethod, ExportFormat, TaskType};
use monteclora::{DrawNoise, MonteCLoRA, MonteCLoRAConfig, Noise, Params, Pass, Posterior, Regularizer};

use crate::families::{Golden, FAMILIES};
use crate::support::decoders::toy_json;
use crate::support::{assert_close, scatter, skipped, toy_config, toy_weights, Outcome};

/// An interpreter with all required packages, or the reason why there is none.
pub fn python() -> Result<PathBuf, String> {
    let python = std::env::var_os("MONTECLORA_PYTHON").map_or("python3".into(), PathBuf::from);
    let needs = "import torch, transformers, safetensors, peft; peft.MontecloraConfig";
    match Command::new(&python).args(["-c", needs]).output() {
        Ok(output) if output.status.success() => Ok(python),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            Err(text.lines().last().unwrap_or("it failed").to_string())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// A model of either kind with its forward pass.
enum Model {
    Causal(Box<DecoderForCausalLM>),
    Sequence(Box<dyn monteclora::models::sequence::SequenceClassifier>),
}

impl Model {
    fn load(files: &ModelFiles, causal: bool, params: &Params) -> Outcome<Self> {
        let vb = files.var_builder(DType::F32, &Device::Cpu)?;
        if causal {
            let config = DecoderConfig::from_file(files.config_path())?;
            return Ok(Self::Causal(Box::new(DecoderForCausalLM::load(vb, &config, Noise::new(0))?)));
        }
        let head = params.var_builder(Some(vb.clone()), Role::Head);
        let config = SequenceConfig::from_file(files.config_path(), 3)?;
        Ok(Self::Sequence(config.load(vb, head, Noise::new(0))?))
    }

    fn adaptable(&mut self) -> &mut dyn AdaptableModel {
        match self {
            Self::Causal(model) => model.as_mut(),
            Self::Sequence(model) => model.as_mut(),
        }
    }

    fn logits(&self) -> Outcome<Tensor> {
        let (ids, mask) = inputs()?;
        let (ids, mask) = (ids.to_dtype(DType::U32)?, mask.to_dtype(DType::U8)?);
        Ok(match self {
            Self::Causal(model) => model.logits(&ids, &mask, &Pass::Mean.into())?,
            Self::Sequence(model) => model.logits(&ids, &ids.zeros_like()?, &mask, &Pass::Mean.into())?,
        })
    }
}

/// Two rows, the second padded with RoBERTa's padding id.
fn inputs() -> Outcome<(Tensor, Tensor)> {
    let ids = Tensor::new(&[[0i64, 5, 17, 33, 8, 2], [0, 40, 6, 2, 1, 1]], &Device::Cpu)?;
    let mask = Tensor::new(&[[1i64; 6], [1, 1, 1, 1, 0, 0]], &Device::Cpu)?;
    Ok((ids, mask))
}

/// The label of each row, or of each position of a causal model; -100 is ignored.
fn labels(causal: bool) -> Outcome<Tensor> {
    let (ids, mask) = inputs()?;
    if causal {
        Ok(mask.gt(0i64)?.where_cond(&ids, &Tensor::full(-100i64, ids.shape(), &Device::Cpu)?)?)
    } else {
        Ok(Tensor::new(&[2i64, 0], &Device::Cpu)?)
    }
}

/// The loss of the next training step of an adapter, with the draw that the script gives PEFT: every normal
/// is 0, the chi squares are 1, 1.1, 1.2 ...
fn next_loss(model: &mut Model, causal: bool, method: &AdapterMethod) -> Outcome<f32> {
    let (logits, labels) = (model.logits()?, labels(causal)?);
    let (logits, labels) = if causal {
        // The logits at a position predict the next token.
        let last = labels.dim(1)? - 1;
        (logits.narrow(1, 0, last)?.flatten_to(1)?, labels.narrow(1, 1, last)?.flatten_all()?)
    } else {
        (logits, labels)
    };
    let task = ops::cross_entropy(&logits, &labels, -100, OpPath::Fused)?.to_scalar::<f32>()?;
    let AdapterMethod::MonteCLoRA(config) = method else { return Ok(task) };
    let mut posteriors = Vec::new();
    model.adaptable().visit_linears(&mut |layer| {
        let active = layer.active_as::<MonteCLoRA>();
        posteriors.extend(active.map(|adapter| adapter.posterior().clone()));
        Ok(())
    })?;
    let draw = |posterior: &Posterior| -> Outcome<DrawNoise> {
        let spec = posterior.spec();
        let (r, n) = (spec.config.rank, spec.config.num_components);
        let chi: Vec<f32> = (0..r * r)
            .map(|i| if i / r == i % r { (1.0 + (i / r) as f32 / 10.0).sqrt() } else { 0.0 })
            .collect();
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let t = Tensor::from_vec(chi, (r, r), &Device::Cpu)?;
        Ok(DrawNoise::new(spec, &t, &zeros(&[n])?, &zeros(&[n, r, spec.in_dim])?)?)
    };
    let draws = posteriors.iter().map(draw).collect::<Outcome<Vec<_>>>()?;
    let penalty = Regularizer::new(config).of_draws(&posteriors, &draws)?;
    Ok(task + penalty.total.to_scalar::<f32>()?)
}

/// Writes a checkpoint with a head into a folder.
fn base(dir: &Path, family: &str) -> Outcome<ModelFiles> {
    // Without dropout, since losses are compared in training.
    let (weights, mut json, name) = if family != "roberta" {
        let mut json = if family == "llama" { toy_json(true) } else { crate::decoders::toy_json(family)? };
        let params = Params::new(Noise::new(5), &Device::Cpu);
        json["attention_dropout"] = 0.0.into();
        json["vocab_size"] = 50.into(); // covers the ids of `inputs`
        let config = DecoderConfig::from_value(json.clone())?;
        DecoderForCausalLM::load(params.var_builder(None, Role::Base), &config, Noise::new(0))?;
        scatter(&params)?;
        let all = params.all().into_iter();
        let weights = all.map(|(name, param)| (name, param.var.as_detached_tensor())).collect();
        (weights, json, config.class_name("ForCausalLM"))
    } else {
        let config = toy_config(monteclora::models::roberta::Family::Roberta);
        let weights = toy_weights(|vb: VarBuilder<'static>, noise| {
            let model = monteclora::models::roberta::RobertaForSequenceClassification::load;
            model(vb.clone(), vb, &config, noise).map(drop)
        })?;
        let mut json = serde_json::to_value(&config)?;
        json["hidden_dropout_prob"] = 0.0.into();
        json["attention_probs_dropout_prob"] = 0.0.into();
        (weights, json, "RobertaForSequenceClassification".to_string())
    };
    json["architectures"] = serde_json::json!([name]);
    std::fs::create_dir_all(dir)?;
    monteclora::util::files::write_safetensors(&dir.join("model.safetensors"), weights)?;
    std::fs::write(dir.join("config.json"), json.to_string())?;
    Ok(ModelFiles::locate(dir.to_str().ok_or("a path")?, None)?)
}

#[test]
fn adapters_and_merged_models_travel_to_python_and_back() -> Outcome {
    let Some(python) = python_or_skip() else { return Ok(()) };
    for family in ["roberta", "llama"].into_iter().chain(crate::decoders::FAMILIES) {
        for method in methods() {
            let (dir, causal) = (tempfile::tempdir()?, family != "roberta");
            let files = base(&dir.path().join("base"), family)?;
            there_and_back(&python, dir.path(), &files, causal, &method)
                .map_err(|error| format!("{family}: {error}"))?;
        }
    }
    Ok(())
}

#[test]
fn adapters_of_the_encoders_after_bert_travel_to_python_and_back() -> Outcome {
    let Some(python) = python_or_skip() else { return Ok(()) };
    for (family, count) in FAMILIES.into_iter().zip([1, 1, 2, 2]) {
        // Only one method for families whose layers are BERT's.
        for method in methods().into_iter().rev().take(count) {
            let dir = tempfile::tempdir()?;
            let files = Golden::open(family)?.no_dropout().write(&dir.path().join("base"))?;
            there_and_back(&python, dir.path(), &files, false, &method)
                .map_err(|error| format!("{family}: {error}"))?;
        }
    }
    Ok(())
}

/// [`python`]; if there is none, reports that the test is skipped.
fn python_or_skip() -> Option<PathBuf> {
    let python = python();
    if let Err(reason) = &python {
        skipped(&format!("no Python with torch, transformers and peft >= 0.20 ({reason})"));
    }
    python.ok()
}

/// LoRA and MonteCLoRA.
fn methods() -> [AdapterMethod; 2] {
    let lora = LoraConfig { rank: 3, alpha: 7.0, use_rslora: true, ..LoraConfig::default() };
    let bayes = MonteCLoRAConfig { rank: 3, alpha: 7.0, num_components: 3, ..Default::default() };
    [AdapterMethod::Lora(lora), AdapterMethod::MonteCLoRA(bayes)]
}

/// Loads an adapter of `method` on the checkpoint `files` in PEFT, merged and not, and reads back what PEFT
/// trains from it.
fn there_and_back(
    python: &Path,
    dir: &Path,
    files: &ModelFiles,
    causal: bool,
    method: &AdapterMethod,
) -> Outcome {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/live_peft.py");
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let mut model = Model::load(files, causal, &params)?;
    let base_logits = model.logits()?.copy()?;
    match method {
        AdapterMethod::Lora(config) => {
            let targets = Targets::parse("all-linear")?;
            inject::lora(model.adaptable(), &targets, config, &params)?
        }
        AdapterMethod::MonteCLoRA(config) => {
            inject::monteclora(model.adaptable(), &Targets::default(), config, &params)?
        }
        _ => return Err("a method without a test".into()),
    };
    scatter(&params)?;
    let task = Some(if causal { TaskType::CausalLm } else { TaskType::SequenceClassification });
    let origin = AdapterMetadata { base_model: Some("base".into()), task, ..Default::default() };
    let file = AdapterFile::from_model(model.adaptable(), DEFAULT_ADAPTER, &params, method, &origin)?;
    file.write(dir.join("adapter"), ExportFormat::Peft)?;
    if causal {
        // An adapter for servers has no head; any version of PEFT reads it.
        for (name, fold_rslora) in [("serving", false), ("serving_folded", true)] {
            file.write(dir.join(name), ExportFormat::Serving { fold_rslora })?;
        }
    }
    // In several shards, as large models are.
    save_merged(model.adaptable(), &params, files, None, &dir.join("merged"), 20_000)?;
    assert!(dir.join("merged/model.safetensors.index.json").is_file());
    let (ids, mask) = inputs()?;
    let logits = model.logits()?;
    let expected = [
        ("input_ids", &ids),
        ("attention_mask", &mask),
        ("labels", &labels(causal)?),
        ("logits", &logits),
        ("base_logits", &base_logits),
    ];
    monteclora::util::files::write_safetensors(&dir.join("expected.safetensors"), expected)?;

    let output = Command::new(python).arg(&script).arg(dir).env("HF_HUB_OFFLINE", "1").output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{task:?} {method:?}: {text}");

    // The adapter after PEFT's training step is read back and computes the same as in PEFT.
    let params = Params::new(Noise::new(2), &Device::Cpu);
    let mut model = Model::load(files, causal, &params)?;
    let file = AdapterFile::read(dir.join("back"))?;
    file.apply(model.adaptable(), DEFAULT_ADAPTER, &params)?;
    let back = candle_core::safetensors::load(dir.join("back.safetensors"), &Device::Cpu)?;
    let moved = (&back["logits"] - &logits)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(moved > 1e-3, "PEFT's step moved nothing");
    let loss = next_loss(&mut model, causal, &file.method())?;
    let theirs = back["loss"].to_scalar::<f32>()?;
    assert!((loss - theirs).abs() < 1e-4, "{task:?} {method:?}: {loss}, in PEFT {theirs}");
    let got = model.logits()?;
    if causal {
        // Outputs at padding are arbitrary.
        assert_close(&got.get(0)?, &back["logits"].get(0)?, 1e-4)?;
        assert_close(&got.get(1)?.narrow(0, 0, 4)?, &back["logits"].get(1)?.narrow(0, 0, 4)?, 1e-4)?;
    } else {
        assert_close(&got, &back["logits"], 1e-4)?;
    }
    Ok(())
}
