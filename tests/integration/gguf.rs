//! GGUF: models written and read again, and what llama.cpp makes of them, where Python has it.

use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use monteclora::adapters::LoraConfig;
use monteclora::data::tokenizer;
use monteclora::inject::{self, Targets, DEFAULT_ADAPTER};
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::gguf::{write_adapter, GgufKind};
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::{save_gguf, save_merged_gguf};
use monteclora::peft::{AdapterFile, AdapterMetadata, AdapterMethod};
use monteclora::{MonteCLoRAConfig, Noise, Params, Pass};
use serde_json::{json, Value};

use crate::stories::asset;
use crate::support::{assert_close, scatter, skipped, Outcome};

const TEXT: &str = "Once upon a time, there was a little girl named Lily.\nShe had 27 caf\u{e9}s \u{1f600}!";
/// The beginning, and some words.
const IDS: [u32; 12] = [1, 403, 407, 261, 378, 432, 317, 286, 261, 376, 268, 414];

fn locate(path: &Path) -> Outcome<ModelFiles> {
    Ok(ModelFiles::locate(path.to_str().ok_or("a path of Unicode")?, None)?)
}

fn load(files: &ModelFiles) -> Outcome<DecoderForCausalLM> {
    let weights = files.open_weights(DType::F32, &Device::Cpu)?;
    Ok(DecoderForCausalLM::load(weights, &DecoderConfig::from_files(files)?, Noise::new(0))?)
}

/// The logits of all places of [`IDS`], `(t, vocab)`.
fn logits(model: &DecoderForCausalLM) -> Outcome<Tensor> {
    let ids = Tensor::new(&[IDS], &Device::Cpu)?;
    Ok(model.logits(&ids, &ids.ones_like()?.to_dtype(DType::U8)?, &Pass::Mean.into())?.squeeze(0)?)
}

/// Adapters on every layer in general position, and their file.
fn adapted(model: &mut DecoderForCausalLM, monteclora: bool, rslora: bool) -> Outcome<(Params, AdapterFile)> {
    let params = Params::new(Noise::new(7), &Device::Cpu);
    let targets = Targets::default();
    let method = if monteclora {
        let config = MonteCLoRAConfig { rank: 4, alpha: 6.0, ..MonteCLoRAConfig::default() };
        inject::monteclora(model, &targets, &config, &params)?;
        AdapterMethod::MonteCLoRA(config)
    } else {
        let config = LoraConfig { rank: 4, alpha: 6.0, use_rslora: rslora, ..LoraConfig::default() };
        inject::lora(model, &targets, &config, &params)?;
        AdapterMethod::Lora(config)
    };
    scatter(&params)?;
    let file =
        AdapterFile::from_model(model, DEFAULT_ADAPTER, &params, &method, &AdapterMetadata::default())?;
    Ok((params, file))
}

#[test]
fn a_model_in_single_precision_comes_back_to_the_bit() -> Outcome {
    let Some(dir) = asset("stories260k") else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let (source, path) = (locate(&dir)?, folder.path().join("model.gguf"));
    save_gguf(&source, &path, GgufKind::F32)?;
    let back = locate(&path)?;
    let (ours, theirs) =
        (logits(&load(&source)?)?.to_vec2::<f32>()?, logits(&load(&back)?)?.to_vec2::<f32>()?);
    assert!(ours == theirs, "q and k among them");

    let (config, again) = (source.config()?, back.config()?);
    for key in
        ["vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_theta", "eos_token_id"]
    {
        assert_eq!(config[key], again[key], "{key}");
    }
    let (ours, theirs) = (tokenizer::of_model(&source)?, tokenizer::of_model(&back)?);
    for text in [TEXT, "", " two  spaces ", "</s> <s>x"] {
        let ids = |of: &tokenizers::Tokenizer| {
            Ok::<_, tokenizers::Error>(of.encode(text, true)?.get_ids().to_vec())
        };
        let (ours, theirs) =
            (ids(&ours).map_err(|e| e.to_string())?, ids(&theirs).map_err(|e| e.to_string())?);
        assert_eq!(ours, theirs, "{text:?}");
    }
    let error = save_gguf(&source, &path, GgufKind::F32).unwrap_err().to_string();
    assert!(error.contains("model.gguf: it exists"), "{error}");
    Ok(())
}

#[test]
fn quantised_matrices_stay_so_and_compute_what_their_numbers_do() -> Outcome {
    let Some(dir) = asset("stories260k") else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    for (kind, kinds) in [(GgufKind::Q8_0, vec!["f32", "q8_0"]), (GgufKind::Q4K, vec!["f32", "q5_0"])] {
        let path = folder.path().join(format!("{kind:?}.gguf"));
        save_gguf(&locate(&dir)?, &path, kind)?;
        let files = locate(&path)?;
        let model = load(&files)?;
        let mut found = std::collections::BTreeSet::new();
        monteclora::adapter::AdaptableModel::visit_linears(&model, &mut |layer| {
            found.insert(layer.base().kind());
            Ok(())
        })?;
        // The width of `down_proj` is 172, which no block divides.
        assert_eq!(found.iter().collect::<Vec<_>>(), kinds.iter().collect::<Vec<_>>());
        let vb = files.var_builder(DType::F32, &Device::Cpu)?;
        let dense = DecoderForCausalLM::load(vb, &DecoderConfig::from_files(&files)?, Noise::new(0))?;
        // Few rows go through candle's kernels, which quantise what comes in, too.
        let scale = logits(&dense)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert_close(&logits(&model)?, &logits(&dense)?, 0.02 * f64::from(scale))?;
    }
    Ok(())
}

#[test]
fn what_llama_cpp_cannot_load_is_refused_by_name() -> Outcome {
    let Some(dir) = asset("stories260k") else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let source = locate(&dir)?;
    let (_, mut file) = adapted(&mut load(&source)?, false, false)?;
    let config = source.config()?;
    let path = folder.path().join("adapter.gguf");
    let write =
        |file: &AdapterFile, config: &Value| write_adapter(file, config, &path).unwrap_err().to_string();
    let other = json!({"model_type": "roberta"});
    assert!(write(&file, &other).contains("expected mistral or one of llama"), "{}", write(&file, &other));
    let layer = file.layers.values().next().cloned().ok_or("a layer")?;
    file.layers.insert("lm_head".into(), layer);
    file.config.target_modules = None;
    let names = file.layers.keys().cloned().collect();
    file.config.target_modules = Some(monteclora::peft::TargetModules::Names(names));
    assert!(write(&file, &config).contains("leave lm_head out of the targets"), "{}", write(&file, &config));
    assert!(!path.exists());
    Ok(())
}

/// An interpreter that has llama.cpp, or why there is none.
fn python() -> Result<PathBuf, String> {
    let python = std::env::var_os("MONTECLORA_PYTHON").map_or("python3".into(), PathBuf::from);
    match Command::new(&python).args(["-c", "import llama_cpp, numpy"]).output() {
        Ok(output) if output.status.success() => Ok(python),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            Err(text.lines().last().unwrap_or("it failed").to_string())
        }
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn llama_cpp_computes_what_we_do() -> Outcome {
    let Some(dir) = asset("stories260k") else { return Ok(()) };
    let python = match python() {
        Ok(python) => python,
        Err(why) => {
            skipped(&format!("no Python with llama-cpp-python: {why}"));
            return Ok(());
        }
    };
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let source = locate(&dir)?;
    let mut cases = Vec::new();
    let mut case = |model: &str, lora: Option<&str>, tolerance: f64, logits: &Tensor| -> Outcome {
        let logits = logits.to_vec2::<f32>()?;
        cases.push(json!({"model": model, "lora": lora, "tolerance": tolerance, "logits": logits}));
        Ok(())
    };
    let kinds = [
        ("base_f32", GgufKind::F32, 1e-4),
        ("base_q8", GgufKind::Q8_0, 0.3),
        ("base_q4", GgufKind::Q4K, 0.3),
    ];
    for (name, kind, tolerance) in kinds {
        save_gguf(&source, &at(&format!("{name}.gguf")), kind)?;
        case(
            &format!("{name}.gguf"),
            None,
            tolerance,
            &logits(&load(&locate(&at(&format!("{name}.gguf")))?)?)?,
        )?;
    }
    // llama.cpp rounds what comes into a matrix, too: to half precision, or to blocks of eight bits.
    for (name, monteclora, rslora, kind, tolerance) in [
        ("lora", false, false, GgufKind::F16, 0.06),
        ("rslora", false, true, GgufKind::Q8_0, 0.3),
        ("monteclora", true, false, GgufKind::F32, 1e-4),
    ] {
        let mut model = load(&source)?;
        let (params, file) = adapted(&mut model, monteclora, rslora)?;
        write_adapter(&file, &source.config()?, &at(&format!("{name}.gguf")))?;
        let expected = logits(&model)?;
        case("base_f32.gguf", Some(&format!("{name}.gguf")), 1e-4, &expected)?;
        let merged = format!("merged_{name}.gguf");
        save_merged_gguf(&model, &params, &source, &at(&merged), kind)?;
        case(&merged, None, tolerance, &expected)?;
    }
    let ids = tokenizer::of_model(&source)?.encode(TEXT, true).map_err(|e| e.to_string())?.get_ids().to_vec();
    let expected = json!({"text": TEXT, "pieces": ids, "ids": IDS, "files": cases});
    std::fs::write(at("expected.json"), expected.to_string())?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/live_llama_cpp.py");
    let output = Command::new(python).arg(script).arg(folder.path()).output()?;
    let (told, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{told}");
    assert!(output.status.success(), "{told}\n{errors}");
    Ok(())
}
