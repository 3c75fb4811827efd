//! Tests that llama.cpp loads the GGUF files that this crate writes and computes the same, if Python has it.
//!
//! `MONTECLORA_PYTHON` names an interpreter with `llama-cpp-python` and `gguf`; the default is `python3`. It
//! runs `tests/data/live_llama_cpp.py`.

use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::quantized::GgmlDType;
use candle_core::Tensor;
use monteclora::data::tokenizer;
use monteclora::models::gguf::{write_adapter, GgufKind};
use monteclora::models::save::{save_gguf, save_merged_gguf};
use monteclora::{Context, Pass};
use serde_json::{json, Value};

use crate::gguf::{adapted, families, load, locate, logits, logits_of, raw, toy_folder, IDS, TEXT};
use crate::support::{asset, skipped, Outcome};

/// An interpreter with llama.cpp; if there is none, reports why.
fn python() -> Option<PathBuf> {
    let python = std::env::var_os("MONTECLORA_PYTHON").map_or("python3".into(), PathBuf::from);
    let why = match Command::new(&python).args(["-c", "import llama_cpp, gguf, numpy"]).output() {
        Ok(output) if output.status.success() => return Some(python),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            text.lines().last().unwrap_or("it failed").to_string()
        }
        Err(error) => error.to_string(),
    };
    skipped(&format!("no Python with llama-cpp-python and gguf: {why}"));
    None
}

/// Runs llama.cpp on the files in `folder` and compares the results.
fn check(python: &Path, folder: &Path, pieces: &[u32], cases: &[Value]) -> Outcome {
    let expected = json!({"text": TEXT, "pieces": pieces, "ids": IDS, "files": cases});
    std::fs::write(folder.join("expected.json"), expected.to_string())?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/live_llama_cpp.py");
    let output = Command::new(python).arg(script).arg(folder).output()?;
    let (told, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{told}");
    assert!(output.status.success(), "{told}\n{errors}");
    Ok(())
}

fn case(model: &str, lora: Option<&str>, tolerance: f64, logits: &Tensor) -> Outcome<Value> {
    let logits = logits.to_vec2::<f32>()?;
    Ok(json!({"model": model, "lora": lora, "tolerance": tolerance, "logits": logits}))
}

#[test]
fn bases_adapters_and_merged_models_give_our_logits() -> Outcome {
    let dir = asset("stories260k");
    let Some(python) = python() else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let (source, mut cases) = (locate(&dir)?, Vec::new());
    // llama.cpp also rounds the inputs of a matrix: to half precision, or to blocks of eight bits.
    for (name, kind, tolerance) in [
        ("base_f32.gguf", GgufKind::F32, 1e-4),
        ("base_q8.gguf", GgufKind::Q8_0, 0.3),
        ("base_q4.gguf", GgufKind::Q4K, 0.3),
    ] {
        save_gguf(&source, &at(name), kind)?;
        cases.push(case(name, None, tolerance, &logits(&load(&locate(&at(name))?)?)?)?);
    }
    for (name, monteclora, rslora, kind, tolerance) in [
        ("lora.gguf", false, false, GgufKind::Q8_0, 0.8),
        ("rslora.gguf", false, true, GgufKind::F16, 0.06),
        ("monteclora.gguf", true, false, GgufKind::F32, 1e-4),
    ] {
        let mut model = load(&source)?;
        let (params, file) = adapted(&mut model, monteclora, rslora)?;
        write_adapter(&file, &source.config()?, &at(name))?;
        let expected = logits(&model)?;
        cases.push(case("base_f32.gguf", Some(name), 1e-4, &expected)?);
        let merged = format!("merged_{name}");
        save_merged_gguf(&model, &params, &source, &at(&merged), kind)?;
        // The logits of the merged weights as stored: eight bits change them by 0.3, llama.cpp as much again.
        let expected = logits(&load(&locate(&at(&merged))?)?)?;
        cases.push(case(&merged, None, tolerance, &expected)?);
    }
    let tokenizer = tokenizer::of_model(&source)?;
    let pieces = tokenizer.encode(TEXT, true).map_err(|e| e.to_string())?.get_ids().to_vec();
    check(&python, folder.path(), &pieces, &cases)
}

#[test]
fn every_family_gives_our_logits() -> Outcome {
    let assets = asset("stories260k");
    let Some(python) = python() else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let (mut cases, mut pieces) = (Vec::new(), Vec::new());
    for config in families() {
        // llama.cpp looks the tanh GELU up in a table of half precision.
        let tolerance = if config["hidden_activation"].is_null() { 2e-5 } else { 5e-3 };
        let toy = toy_folder(&config, &assets)?;
        let (source, family) = (locate(toy.path())?, config["model_type"].as_str().unwrap_or_default());
        let mut model = load(&source)?;
        let (base, lora) = (format!("{family}.gguf"), format!("{family}_lora.gguf"));
        save_gguf(&source, &at(&base), GgufKind::F32)?;
        cases.push(case(&base, None, tolerance, &logits(&model)?)?);
        let (_, file) = adapted(&mut model, false, false)?;
        write_adapter(&file, &source.config()?, &at(&lora))?;
        cases.push(case(&base, Some(&lora), tolerance, &logits(&model)?)?);
        let tokenizer = tokenizer::of_model(&source)?;
        pieces = tokenizer.encode(TEXT, true).map_err(|e| e.to_string())?.get_ids().to_vec();
    }
    check(&python, folder.path(), &pieces, &cases)
}

#[test]
fn blocks_are_those_of_llama_cpp() -> Outcome {
    let assets = asset("stories260k");
    let Some(python) = python() else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    // Wide enough for blocks of 256.
    let mut config = families().swap_remove(0);
    (config["hidden_size"], config["intermediate_size"]) = (json!(256), json!(512));
    let source = toy_folder(&config, &assets)?;
    let source = locate(source.path())?;
    let mut cases = Vec::new();
    for (name, kind, kinds) in [
        ("q4.gguf", GgufKind::Q4K, [GgmlDType::Q6K, GgmlDType::Q4K]),
        ("q8.gguf", GgufKind::Q8_0, [GgmlDType::Q8_0; 2]),
    ] {
        save_gguf(&source, &at(name), kind)?;
        let model = load(&locate(&at(name))?)?;
        let ours = logits(&model)?;
        // llama.cpp rounds the inputs of a matrix to eight bits, as candle's kernels for few rows do.
        let few = logits_of(&model, &IDS[..3], &Context::from(Pass::Mean).only_to_predict())?;
        let rounding = (few - ours.narrow(0, 0, 3)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
        let mut case = case(name, None, 2.0 * f64::from(rounding), &ours)?;
        let (content, tensors) = raw(&at(name))?;
        let names = ["token_embd.weight", "blk.1.ffn_down.weight"];
        for (tensor, kind) in names.into_iter().zip(kinds) {
            assert_eq!(content.tensor_infos[tensor].ggml_dtype, kind);
            let numbers = format!("{name}.{tensor}.npy");
            tensors[tensor].write_npy(at(&numbers))?;
            case["numbers"][tensor] = json!(numbers);
        }
        cases.push(case);
    }
    let tokenizer = tokenizer::of_model(&source)?;
    let pieces = tokenizer.encode(TEXT, true).map_err(|e| e.to_string())?.get_ids().to_vec();
    check(&python, folder.path(), &pieces, &cases)
}
