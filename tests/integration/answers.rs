//! Answers of a trained language model to the prompts of a file: the example `llama` and the library.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{DType, Device};
use monteclora::eval::Generator;
use monteclora::models::generate::{GenerateConfig, PosteriorWeights};
use monteclora::models::hub::ModelFiles;
use monteclora::train::LanguageModel;
use serde_json::{json, Value};

use crate::support::programs::example;
use crate::support::{asset, Outcome};

const PROMPTS: [&str; 3] = ["Once upon a time", "Lily saw a", "The dog"];

/// Runs the example `llama` in `dir`; returns its standard output, or its error.
fn llama(program: &Path, dir: &Path, options: &[&str]) -> Outcome<Result<String, String>> {
    let output =
        Command::new(program).args(options).current_dir(dir).env("RAYON_NUM_THREADS", "1").output()?;
    let (text, error) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    Ok(if output.status.success() { Ok(text) } else { Err(error) })
}

/// The prompts and answers in JSON lines.
fn pairs(lines: &str) -> Outcome<Vec<(String, String)>> {
    let pair = |line: &str| {
        let row: Value = serde_json::from_str(line)?;
        let text = |name: &str| row[name].as_str().map(str::to_string).ok_or("a text");
        Ok((text("prompt")?, text("answer")?))
    };
    lines.lines().map(pair).collect()
}

fn answers(lines: &str) -> Outcome<Vec<String>> {
    Ok(pairs(lines)?.into_iter().map(|(_, answer)| answer).collect())
}

/// The answers of an opened model to [`PROMPTS`], of at most 16 tokens.
fn of_library(language: &LanguageModel, weights: PosteriorWeights) -> Outcome<Vec<String>> {
    let config = GenerateConfig { max_new_tokens: 16, weights, ..GenerateConfig::default() };
    Ok(Generator::of(language, config).texts(&PROMPTS, &[])?)
}

/// A folder with prompts, and rows to train on that all answer "cat cat cat".
fn home() -> Outcome<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let row = |prompt: &&str| json!({"prompt": prompt, "completion": " cat cat cat"}).to_string();
    let rows: Vec<String> = PROMPTS.iter().cycle().take(60).map(row).collect();
    fs::write(dir.path().join("rows.jsonl"), rows.join("\n"))?;
    let prompts: Vec<String> = PROMPTS.iter().map(|prompt| json!({ "prompt": prompt }).to_string()).collect();
    fs::write(dir.path().join("asked.jsonl"), prompts.join("\n"))?;
    Ok(dir)
}

#[test]
fn a_run_answers_prompts_as_the_library_does_in_the_form_that_it_was_trained_in() -> Outcome {
    let (program, home) = (example("llama")?, home()?);
    let run = |options: &[&str]| llama(&program, home.path(), options);
    let train =
        "--data rows.jsonl --format completion --method monteclora --rank 4 --sample-scaler 0.05 --lr 2e-2 \
                 --epochs 8 --max-new-tokens 4 --output out";
    run(&train.split_whitespace().collect::<Vec<_>>())??;
    let predict = ["--predict", "asked.jsonl", "--adapter", "out", "--max-new-tokens", "16"];
    let told = run(&predict)??;
    let prompts: Vec<String> = pairs(&told)?.into_iter().map(|(prompt, _)| prompt).collect();
    assert_eq!(prompts, PROMPTS);
    let said = answers(&told)?;
    assert!(said.iter().all(|answer| answer.starts_with(" cat cat")), "{said:?}");

    // The same from the library, from a model folder of its own, and in batches of another size.
    let (out, cpu) = (home.path().join("out"), [Device::Cpu]);
    let language = LanguageModel::open(&out, None, DType::F32, &cpu)?;
    assert_eq!(of_library(&language, PosteriorWeights::Mean)?, said);
    let base = ModelFiles::locate(&asset("stories260k").to_string_lossy(), None)?;
    let named = LanguageModel::open(&out.join("adapter"), Some(&base), DType::F32, &cpu)?;
    assert_eq!(of_library(&named, PosteriorWeights::Mean)?, said);
    let plain = of_library(&LanguageModel::of_checkpoint(&base, DType::F32, &cpu)?, PosteriorWeights::Mean)?;
    assert!(plain.iter().all(|text| !text.contains("cat cat")), "{plain:?}");
    let alone = run(&[&predict[..], &["--batch-size", "1"]].concat())??;
    assert_eq!(alone, told);

    // Averaged draws, a text to stop at, a file to write.
    let averaged = run(&[&predict[..], &["--posterior-samples", "3"]].concat())??;
    assert_eq!(answers(&averaged)?, of_library(&language, PosteriorWeights::Average(3))?);
    assert_ne!(averaged, told);
    let stopped = run(&[&predict[..], &["--stop", " cat cat"]].concat())??;
    assert_eq!(answers(&stopped)?, ["", "", ""]);
    let nothing = run(&[&predict[..], &["--output", "answers"]].concat())??;
    assert_eq!(nothing, "");
    assert_eq!(fs::read_to_string(home.path().join("answers/asked.answers.jsonl"))?, told);
    Ok(())
}

#[test]
fn a_prediction_needs_a_model_and_rows_of_its_format() -> Outcome {
    let (program, home) = (example("llama")?, home()?);
    let fails = |options: &[&str]| -> Outcome<String> {
        let options = [&["--predict", "asked.jsonl"], options].concat();
        Ok(llama(&program, home.path(), &options)?.err().ok_or("an error")?)
    };
    let model = asset("stories260k");
    let model = model.to_str().ok_or("a path")?;
    for (options, reason) in [
        (&[][..], "--predict: give the trained --adapter, or a --model"),
        (&["--quantize", "q8_0"], "--quantize: give the --model that it quantises"),
        (&["--model", model], "asked.jsonl, line 1: no field \"question\""), // the default format is GSM8K's
        (&["--model", model, "--format", "completion", "--batch-size", "0"], "batch_size"),
        (&["--model", model, "--format", "completion", "--data", "rows.jsonl"], "--data"),
    ] {
        let error = fails(options)?;
        assert!(error.contains(reason), "{options:?}: {error}");
    }
    let tiny = asset("tiny-roberta");
    let error = LanguageModel::open(&tiny, None, DType::F32, &[Device::Cpu]).unwrap_err().to_string();
    assert!(error.contains("got roberta"), "{error}");
    let empty = tempfile::tempdir()?;
    let error = LanguageModel::open(empty.path(), None, DType::F32, &[Device::Cpu]).unwrap_err().to_string();
    assert!(error.contains("no adapter_config.json and no config.json"), "{error}");
    Ok(())
}

#[test]
fn conversations_are_answered_by_the_template_and_the_turn_ends_of_their_run() -> Outcome {
    let (program, home) = (example("llama")?, home()?);
    let run = |options: &[&str]| llama(&program, home.path(), options);
    // Of this template `<s>` ends a turn, which is no end token of the model's own.
    let template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}\
                    {{ bos_token }}{% else %}{{ m.content }}\n{% endif %}{% endfor %}";
    fs::write(home.path().join("mine.jinja"), template)?;
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let chat = json!({"messages": [turn("user", "Who ?"), turn("assistant", "A cat .")]}).to_string();
    fs::write(home.path().join("chats.jsonl"), format!("{chat}\n").repeat(40))?;
    let train =
        "--data chats.jsonl --format chat --chat-template mine.jinja --method lora --rank 4 --lr 2e-2 \
                 --epochs 8 --max-new-tokens 4 --output out";
    run(&train.split_whitespace().collect::<Vec<_>>())??;
    // The run has its own copy.
    fs::remove_file(home.path().join("mine.jinja"))?;
    let asked = json!({"messages": [turn("user", "Who ?")]}).to_string();
    fs::write(home.path().join("asked.jsonl"), format!("{asked}\n{chat}"))?;
    let told = run(&["--predict", "asked.jsonl", "--adapter", "out", "--max-new-tokens", "12"])??;
    assert_eq!(run(&["--predict", "asked.jsonl", "--adapter", "out", "--format", "chat"])??, told);
    let expected = ("<s>Who ?\n".to_string(), "A cat .".to_string());
    assert_eq!(pairs(&told)?, [expected.clone(), expected]);
    let draws = ["--predict", "asked.jsonl", "--adapter", "out", "--posterior-samples", "2"];
    let error = run(&draws)?.err().ok_or("LoRA has no draws")?;
    assert!(error.contains("has no posterior to draw from"), "{error}");
    // A whole model answers too.
    let full = "--data rows.jsonl --format completion --method full --lr 1e-2 --epochs 4 --output full";
    run(&full.split_whitespace().collect::<Vec<_>>())??;
    fs::write(home.path().join("asked.jsonl"), json!({"prompt": PROMPTS[0]}).to_string())?;
    let told = run(&["--predict", "asked.jsonl", "--adapter", "full", "--max-new-tokens", "6"])??;
    assert!(answers(&told)?[0].starts_with(" cat cat"), "{told}");
    let opened: PathBuf = home.path().join("full");
    let opened = LanguageModel::open(&opened, None, DType::F32, &[Device::Cpu])?;
    assert!(of_library(&opened, PosteriorWeights::Mean)?[0].starts_with(" cat cat"));
    Ok(())
}
