//! Heads whose classes are in another order than the task's: loading and saving match them by name.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{Params, Prior, Role};
use monteclora::adapters::LoraConfig;
use monteclora::data::encode::{Encoded, TextEncoder};
use monteclora::data::task::{Label, Task};
use monteclora::inject::Targets;
use monteclora::models::decoder::{DecoderConfig, DecoderForSequenceClassification};
use monteclora::models::hub::ModelFiles;
use monteclora::models::roberta::{Family, RobertaForSequenceClassification};
use monteclora::peft::{AdapterFile, OWN_FILE};
use monteclora::predict::logits;
use monteclora::train::{batches, Classifier, Method, MethodInit, Predictions};
use monteclora::{Labels, MonteCLoRAConfig, Noise, Pass};
use serde_json::{json, Value};

use crate::live_peft::python;
use crate::support::checkpoints::{self, rows};
use crate::support::decoders::toy_json;
use crate::support::{asset, case, scatter, skipped, toy_config, toy_weights, Outcome};

const KINDS: [&str; 3] = ["roberta", "bert", "llama"];
const NLI: [&str; 3] = ["entailment", "neutral", "contradiction"];

/// The weights and configuration of a toy model of this kind with a head for `labels` classes.
fn weights(kind: &str, labels: usize) -> Outcome<(HashMap<String, Tensor>, Value)> {
    if kind == "llama" {
        let json = toy_json(true);
        let params = Params::new(Noise::new(5), &Device::Cpu);
        let config = DecoderConfig::from_value(json.clone())?.with_num_labels(labels);
        let vb = params.var_builder(None, Role::Base);
        DecoderForSequenceClassification::load(vb.clone(), vb, &config, Noise::new(0))?;
        scatter(&params)?;
        let all = params.all().into_iter();
        return Ok((all.map(|(name, param)| (name, param.var.as_detached_tensor())).collect(), json));
    }
    let family = if kind == "bert" { Family::Bert } else { Family::Roberta };
    let config = toy_config(family).with_num_labels(labels);
    let weights = toy_weights(|vb, noise| {
        RobertaForSequenceClassification::load(vb.clone(), vb, &config, noise).map(drop)
    })?;
    Ok((weights, serde_json::to_value(&config)?))
}

/// Writes a checkpoint whose output `i` is the class `order[i]`, with names in its configuration if given.
fn checkpoint(dir: &Path, kind: &str, order: &[u32], names: Option<&[String]>) -> Outcome<ModelFiles> {
    let (mut weights, mut json) = weights(kind, order.len())?;
    let order = Tensor::new(order, &Device::Cpu)?;
    for (name, tensor) in &mut weights {
        let head = name.starts_with("classifier.") || name.starts_with("score.");
        if head && !name.contains("dense") {
            *tensor = tensor.index_select(&order, 0)?;
        }
    }
    let labels = names.map(|names| Labels::new(names.iter().cloned())).transpose()?;
    json["id2label"] = labels.as_ref().map_or(Value::Null, Labels::id2label);
    json["label2id"] = labels.as_ref().map_or(Value::Null, Labels::label2id);
    std::fs::create_dir_all(dir)?;
    candle_core::safetensors::save(&weights, dir.join("model.safetensors"))?;
    std::fs::write(dir.join("config.json"), json.to_string())?;
    locate(dir)
}

fn locate(dir: &Path) -> Outcome<ModelFiles> {
    Ok(ModelFiles::locate(dir.to_str().ok_or("a path")?, None)?)
}

fn lora() -> Method {
    Method::Lora(LoraConfig { rank: 2, ..LoraConfig::default() })
}

fn fresh(method: Method) -> MethodInit {
    MethodInit::Fresh(method, Targets::default())
}

fn load(files: &ModelFiles, labels: impl Into<Labels>, start: &MethodInit) -> monteclora::Result<Classifier> {
    Classifier::load(files, labels, start, Noise::new(4), DType::F32, &Device::Cpu)
}

fn nli(order: &[u32]) -> Vec<String> {
    order.iter().map(|class| NLI[*class as usize].to_string()).collect()
}

/// The logits of some rows, in the order of the classifier's outputs.
fn says(classifier: &Classifier) -> Outcome<Vec<Vec<f64>>> {
    let rows = rows(6, false);
    Ok(logits(classifier, &batches(classifier, &rows, 6)?, &Pass::Mean.into())?)
}

fn assert_same(got: &[Vec<f64>], want: &[Vec<f64>], what: &str) {
    for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
        assert!((got - want).abs() < 1e-6, "{what}: {got}, expected {want}");
    }
    let flat: Vec<f64> = want.iter().flat_map(|row| [row[0] - row[1], row[1] - row[2]]).collect();
    assert!(flat.iter().all(|gap| gap.abs() > 1e-4), "the classes cannot be told apart: {flat:?}");
}

const ORDERS: [[u32; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

#[test]
fn a_prior_on_the_head_is_about_its_rows_where_they_lie() -> Outcome {
    let dir = tempfile::tempdir()?;
    let with_prior = Method::Lora(LoraConfig { rank: 2, prior: Some(Prior::map()), ..LoraConfig::default() });
    let bayes = Method::MonteCLoRA(MonteCLoRAConfig { rank: 2, ..MonteCLoRAConfig::calibrated() });
    for kind in KINDS {
        for (i, order) in ORDERS.iter().enumerate() {
            let files = checkpoint(&dir.path().join(format!("{kind}{i}")), kind, order, Some(&nli(order)))?;
            for method in [&with_prior, &bayes] {
                let classifier = load(&files, Task::Mnli, &fresh(method.clone()))?;
                let batch = &batches(&classifier, &rows(6, false), 6)?[0];
                let loss = classifier.loss(batch, &Pass::Mean.into(), Some(6))?;
                let prior = loss.terms.iter().find(|(name, _)| *name == "prior").ok_or("a prior")?;
                // B is zero, and the head is at its start.
                assert_eq!(prior.1.to_scalar::<f32>()?, 0.0, "{kind} {order:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_head_for_several_classes_at_once_is_refused_and_a_new_one_says_what_it_is() -> Outcome {
    for kind in KINDS {
        let dir = tempfile::tempdir()?;
        let files = checkpoint(dir.path(), kind, &[0, 1, 2], Some(&nli(&[0, 1, 2])))?;
        let path = dir.path().join("config.json");
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        for (problem, said) in [
            ("regression", "several scores at once"),
            ("multi_label_classification", "several classes at once"),
        ] {
            json["problem_type"] = problem.into();
            std::fs::write(&path, json.to_string())?;
            let error = load(&files, Task::Mnli, &fresh(lora())).expect_err(problem).to_string();
            assert!(error.contains(said) && error.contains("--new-head"), "{error}");
        }
        for (outputs, said) in [(3, "single_label_classification"), (1, "regression")] {
            let (noise, device) = (Noise::new(4), Device::Cpu);
            let new =
                Classifier::load_with_new_head(&files, outputs, &fresh(lora()), noise, DType::F32, &device)?;
            assert_eq!(new.config().to_json()["problem_type"], said);
        }
    }
    Ok(())
}

#[test]
fn an_adapter_of_peft_keeps_what_its_checkpoints_head_is_for() -> Outcome {
    let (dir, out) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let files = checkpoint(dir.path(), KINDS[0], &[0, 1, 2], None)?;
    let path = dir.path().join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    json["problem_type"] = "multi_label_classification".into();
    std::fs::write(&path, json.to_string())?;
    let (noise, device) = (Noise::new(4), Device::Cpu);
    let own = Classifier::load_with_new_head(&files, 3, &fresh(lora()), noise, DType::F32, &device)?;
    own.save(dir.path().to_str().ok_or("a path")?, out.path())?;
    // An adapter of this crate names its classes: it has a head of its own, for one class per row.
    assert_eq!(Classifier::open(out.path(), None, DType::F32, &device)?.labels, own.labels);
    // PEFT writes no such file: its head is for the problem in the checkpoint's configuration.
    std::fs::remove_file(out.path().join("adapter/monteclora.json"))?;
    let error = Classifier::open(out.path(), None, DType::F32, &device).expect_err("PEFT's").to_string();
    assert!(error.contains("several classes at once"), "{error}");
    Ok(())
}

#[test]
fn the_rows_of_a_head_go_where_their_names_say() -> Outcome {
    for kind in KINDS {
        let dir = tempfile::tempdir()?;
        let plain = checkpoint(&dir.path().join("plain"), kind, &[0, 1, 2], None)?;
        let want = says(&load(&plain, Task::Mnli, &fresh(lora()))?)?;
        for (i, order) in ORDERS.iter().enumerate() {
            let spelt = |name: String| if i % 2 == 0 { name.to_uppercase() } else { name };
            let names: Vec<String> = nli(order).into_iter().map(spelt).collect();
            let files = checkpoint(&dir.path().join(format!("{i}")), kind, order, Some(&names))?;
            for method in [lora(), Method::Full] {
                let classifier = load(&files, Task::Mnli, &fresh(method))?;
                assert_same(&says(&classifier)?, &want, &format!("{kind} {order:?}"));
                assert_eq!((classifier.labels.clone(), classifier.note()), (Labels::from(Task::Mnli), None));
            }
            // With only a number of classes the head is used in its own order.
            let classifier = load(&files, 3, &fresh(lora()))?;
            assert_eq!(classifier.labels.names(), names);
            let own: Vec<Vec<f64>> =
                want.iter().map(|row| order.iter().map(|class| row[*class as usize]).collect()).collect();
            assert_same(&says(&classifier)?, &own, &format!("{kind} {order:?} by number"));
        }
    }
    Ok(())
}

#[test]
fn names_are_written_and_read_again() -> Outcome {
    let order = [2, 0, 1];
    let bayes = Method::MonteCLoRA(MonteCLoRAConfig { rank: 2, ..MonteCLoRAConfig::default() });
    for kind in KINDS {
        for method in [lora(), bayes.clone(), Method::Full] {
            let dir = tempfile::tempdir()?;
            let files = checkpoint(&dir.path().join("base"), kind, &order, Some(&nli(&order)))?;
            let trained = load(&files, Task::Mnli, &fresh(method.clone()))?;
            scatter(&trained.params)?;
            let want = says(&trained)?;
            trained.save("base", dir.path())?;

            // Read with labels in another order: contradiction comes first.
            let mine = Labels::new(["contradiction", "neutral", "entailment"])?;
            let again = match &method {
                Method::Full => {
                    let config = std::fs::read_to_string(dir.path().join("model/config.json"))?;
                    let config: Value = serde_json::from_str(&config)?;
                    assert_eq!(config["id2label"], json!({ "0": NLI[0], "1": NLI[1], "2": NLI[2] }));
                    assert_eq!(config["label2id"][NLI[2]], json!(2));
                    load(&locate(&dir.path().join("model"))?, mine, &fresh(lora()))?
                }
                _ => {
                    let file = AdapterFile::read(dir.path().join("adapter"))?;
                    // PEFT uses the checkpoint's names, so the file has the checkpoint's order.
                    assert_eq!(file.labels, Some(Labels::new(nli(&order))?));
                    let again = load(&files, mine.clone(), &MethodInit::Adapter(Box::new(file)))?;
                    if let Method::Lora(_) = method {
                        std::fs::remove_file(dir.path().join("adapter").join(OWN_FILE))?;
                        let bare = AdapterFile::read(dir.path().join("adapter"))?;
                        let bare = load(&files, mine, &MethodInit::Adapter(Box::new(bare)))?;
                        assert_eq!(says(&bare)?, says(&again)?);
                    }
                    again
                }
            };
            let turned: Vec<Vec<f64>> = want.iter().map(|row| vec![row[2], row[1], row[0]]).collect();
            assert_same(&says(&again)?, &turned, &format!("{kind} {method:?}"));
        }
    }
    Ok(())
}

#[test]
fn an_adapter_of_peft_has_the_order_of_its_checkpoint() -> Outcome {
    let (dir, order) = (tempfile::tempdir()?, [1, 2, 0]);
    let files = checkpoint(&dir.path().join("base"), "roberta", &order, Some(&nli(&order)))?;
    let trained = load(&files, 3, &fresh(lora()))?; // in the checkpoint's order, as PEFT trains
    scatter(&trained.params)?;
    let theirs = says(&trained)?;
    trained.save("base", dir.path())?;
    std::fs::remove_file(dir.path().join("adapter").join(OWN_FILE))?;
    let file = AdapterFile::read(dir.path().join("adapter"))?;
    assert_eq!(file.labels, None);
    let read = load(&files, Task::Mnli, &MethodInit::Adapter(Box::new(file)))?;
    let want: Vec<Vec<f64>> = theirs.iter().map(|row| vec![row[2], row[0], row[1]]).collect();
    assert_same(&says(&read)?, &want, "of PEFT");
    Ok(())
}

#[test]
fn strange_names_are_told_and_numbers_are_not() -> Outcome {
    let dir = tempfile::tempdir()?;
    let names = |names: [&str; 3]| names.map(str::to_string);
    let note = |at: &str, named: Option<[String; 3]>| -> Outcome<Option<String>> {
        let files = checkpoint(&dir.path().join(at), "roberta", &[0, 1, 2], named.as_ref().map(|n| &n[..]))?;
        let classifier = load(&files, Task::Mnli, &fresh(lora()))?;
        assert_eq!(classifier.labels, Labels::from(Task::Mnli));
        Ok(classifier.note().map(str::to_string))
    };
    let told = note("a", Some(names(["negative", "neutral", "positive"])))?.ok_or("not told")?;
    assert!(told.contains("the classes negative, neutral, positive, the task has entailment, "), "{told}");
    assert!(told.contains("--new-head"), "{told}");
    assert_eq!(note("b", Some(names(["LABEL_0", "LABEL_1", "LABEL_2"])))?, None);
    assert_eq!(note("c", None)?, None);
    // Without a head in the checkpoint, the order of its names does not matter.
    let files = checkpoints::checkpoint(dir.path())?;
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(files.config_path())?)?;
    json["id2label"] = json!({ "0": "x", "1": "y", "2": "z" });
    let before = says(&load(&files, Task::Mnli, &fresh(lora()))?)?;
    std::fs::write(files.config_path(), json.to_string())?;
    let classifier = load(&files, Task::Mnli, &fresh(lora()))?;
    assert_eq!((classifier.note(), says(&classifier)?), (None, before));
    Ok(())
}

#[test]
fn a_head_of_another_size_names_the_way_on() -> Outcome {
    for kind in KINDS {
        let dir = tempfile::tempdir()?;
        let files = checkpoint(&dir.path().join("base"), kind, &[0, 1, 2], Some(&nli(&[0, 1, 2])))?;
        let error = load(&files, Task::Rte, &fresh(lora())).unwrap_err().to_string();
        let expected =
            "the checkpoint's head has 3 outputs (entailment, neutral, contradiction), the task has 2";
        assert!(error.contains(expected) && error.contains("--new-head"), "{kind}: {error}");

        let (noise, cpu) = (Noise::new(4), Device::Cpu);
        let start = fresh(lora());
        let new = Classifier::load_with_new_head(&files, Task::Rte, &start, noise, DType::F32, &cpu)?;
        assert_eq!((says(&new)?[0].len(), new.note()), (2, None));
        new.save("base", dir.path())?;
        // The head of the adapter replaces the checkpoint's.
        let file = AdapterFile::read(dir.path().join("adapter"))?;
        let again = load(&files, Task::Rte, &MethodInit::Adapter(Box::new(file)))?;
        assert_eq!(says(&again)?, says(&new)?);
        // Its layers go on with a head for something else.
        let file = AdapterFile::read(dir.path().join("adapter"))?.without_head();
        let start = MethodInit::Adapter(Box::new(file));
        let other = Classifier::load_with_new_head(&files, 4, &start, noise, DType::F32, &cpu)?;
        let a = |of: &Classifier| -> Outcome<Vec<f32>> {
            Ok(of.params.of_role(Role::A)[0].1.var.flatten_all()?.to_vec1()?)
        };
        assert_eq!((says(&other)?[0].len(), a(&other)?), (4, a(&new)?));
    }
    Ok(())
}

/// Reads text from a folder in RTE's layout, as the example does; transformers has labelled the rows.
#[test]
fn a_case_that_was_scored_inverted_is_right() -> Outcome {
    let Some(case) = case("label-order") else { return Ok(()) };
    let tokenizer = asset("tiny-roberta/tokenizer.json");
    let encoder = TextEncoder::new(monteclora::data::tokenizer::read(&tokenizer)?, 128, 128)?;
    let rows = encoder.encode(&Task::Rte.load_folder(&case)?.dev[0].1)?;
    let classifier = load(&locate(&case)?, Task::Rte, &fresh(lora()))?;
    let predictions = Predictions::new(&classifier, &rows, &batches(&classifier, &rows, 32)?, 0)?;
    assert_eq!(predictions.evaluate()?.mean.accuracy, Some(1.0));
    Ok(())
}

#[test]
fn every_order_of_labels_predicts_what_transformers_predicts() -> Outcome {
    let python = match python() {
        Ok(python) => python,
        Err(reason) => {
            skipped(&format!("no Python with torch and transformers ({reason})"));
            return Ok(());
        }
    };
    let dir = tempfile::tempdir()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/live_labels.py");
    let output = Command::new(python).arg(script).arg(dir.path()).env("HF_HUB_OFFLINE", "1").output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut cases = 0;
    for case in std::fs::read_dir(dir.path())? {
        let case = case?.path();
        let expected: Value = serde_json::from_slice(&std::fs::read(case.join("expected.json"))?)?;
        let task: Task = expected["task"].as_str().ok_or("no task")?.parse()?;
        let ids: Vec<Vec<u32>> = serde_json::from_value(expected["input_ids"].clone())?;
        let rows = ids.into_iter().enumerate().map(|(row, ids)| Encoded {
            type_ids: vec![0; ids.len()],
            ids,
            label: Label::Class(0),
            row,
        });
        let (rows, labels) = (rows.collect::<Vec<_>>(), Labels::from(task));
        let classifier = load(&locate(&case)?, task, &fresh(lora()))?;
        let told = logits(&classifier, &batches(&classifier, &rows, 8)?, &Pass::Mean.into())?;
        for (row, logits) in told.iter().enumerate() {
            let best = (0..labels.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            let theirs = expected["labels"][row].as_str().and_then(|name| labels.index_of(name));
            assert_eq!(best, theirs, "{} row {row}", case.display());
        }
        cases += 1;
    }
    assert_eq!(cases, 3 * (2 + 6));
    Ok(())
}
