//! A user's table: training, evaluation, saving, opening and prediction; and the same predictions in PEFT.

use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device};
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::Batcher;
use monteclora::data::table::{self, Columns, DataSet, Target};
use monteclora::data::task::{Example, Label, Task};
use monteclora::inject::Targets;
use monteclora::metrics::entropy;
use monteclora::models::hub::ModelFiles;
use monteclora::predict::{Prediction, Submission};
use monteclora::train::{fit, Classification, Classifier, Method, MethodInit, TrainConfig};
use monteclora::{Labels, MonteCLoRAConfig, Noise, Pass};

use crate::live_peft::python;
use crate::support::{asset, skipped, Outcome};

const MAX_LENGTH: usize = 24;

/// The bundled encoder, by the name that an adapter gives to its base.
pub fn tiny_roberta() -> String {
    asset("tiny-roberta").display().to_string()
}

pub fn topics() -> Outcome<DataSet> {
    Ok(DataSet::read(asset("topics/topics.csv"), &Columns::default(), None)?.hold_out(0.25, Noise::new(3))?)
}

/// A classifier of the bundled model, trained a little on these rows.
fn trained(method: Method, target: &Target, rows: &[Example]) -> Outcome<Classifier> {
    let files = ModelFiles::locate(&tiny_roberta(), None)?;
    let start = MethodInit::Fresh(method, Targets::default());
    let mut classifier = Classifier::load(&files, target, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
    classifier.set_max_length(MAX_LENGTH)?;
    let rows = classifier.encode(rows)?;
    let batcher = Batcher::new(16, false, Noise::new(1))?;
    let objective = Classification::new(&classifier, &rows, batcher);
    let config = TrainConfig { epochs: 4, lr: 3e-3, ..TrainConfig::default() };
    fit(&objective, &classifier.params, &config, &mut ())?;
    Ok(classifier)
}

fn lora() -> Method {
    Method::Lora(LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() })
}

#[test]
fn a_table_of_four_classes_is_learnt_saved_opened_and_predicted_as_peft_predicts_it() -> Outcome {
    let data = topics()?;
    let counts: Vec<_> = data.counts().into_iter().map(|c| (c.name, c.train, c.dev)).collect();
    let expected = [("cooking", 105, 35), ("sport", 82, 28), ("travel", 68, 22), ("weather", 45, 15)];
    assert_eq!(counts.len(), 4);
    for ((name, train, dev), (topic, in_train, in_dev)) in counts.into_iter().zip(expected) {
        assert_eq!(name, topic);
        assert!(train.abs_diff(in_train) <= 1 && dev.abs_diff(in_dev) <= 1, "{name}: {train} {dev}");
    }
    let classifier = trained(lora(), &data.target, &data.train)?;
    let metrics = classifier.evaluate(&data.dev)?;
    assert!(metrics.accuracy > Some(0.9) && metrics.macro_f1 > Some(0.85), "{metrics:?}");

    // Rows that are read without labels have unknown labels.
    let all = table::read(asset("topics/topics.csv"), &Columns::default().unlabelled())?;
    let texts = data.target.examples(&all)?;
    assert!(texts.len() == 400 && texts.iter().all(|row| row.label == Label::Unknown));
    let said = classifier.predict(&texts, &Pass::Mean)?;
    assert!(
        classifier.evaluate(&texts).is_err() && classifier.predict::<Example>(&[], &Pass::Mean)?.is_empty()
    );
    // Each text alone, given as a `&str`: the batch does not matter.
    for row in [0, 63, 64, 399] {
        let alone = &classifier.predict(&[texts[row].text_a.as_str()], &Pass::Mean)?[0];
        assert_eq!(alone.label, said[row].label);
        let apart =
            alone.values.iter().zip(&said[row].values).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(apart < 1e-5, "row {row}: {apart}");
    }

    let dir = tempfile::tempdir()?;
    classifier.save(&tiny_roberta(), dir.path())?;
    // The adapter names its base model itself.
    let mut opened = Classifier::open(dir.path(), None, DType::F32, &Device::Cpu)?;
    opened.set_max_length(MAX_LENGTH)?;
    let again = opened.predict(&texts, &Pass::Mean)?;
    assert!(again.iter().zip(&said).all(|(again, said)| again.values == said.values));
    assert_eq!(opened.labels, classifier.labels);
    let no_posterior = opened.predict_averaged(&texts, 2).unwrap_err().to_string();
    assert!(no_posterior.contains("lora has no posterior"), "{no_posterior}");

    let python = match python() {
        Ok(python) => python,
        Err(reason) => {
            skipped(&format!("no Python with torch, transformers and peft >= 0.20 ({reason})"));
            return Ok(());
        }
    };
    let predicted = dir.path().join("predicted.csv");
    Prediction::write_csv(&said, &classifier.labels, &predicted)?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/live_predictions.py");
    let mut compare = Command::new(python);
    compare.arg(script).arg(asset("tiny-roberta")).arg(dir.path().join("adapter"));
    compare.arg(asset("topics/topics.csv")).arg(predicted).arg(MAX_LENGTH.to_string());
    let output = compare.env("HF_HUB_OFFLINE", "1").output()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    println!("in PEFT {}", String::from_utf8_lossy(&output.stdout).trim());
    Ok(())
}

#[test]
fn draws_of_a_posterior_are_averaged_and_say_how_much_they_disagree() -> Outcome {
    let data = topics()?;
    let bayes = MonteCLoRAConfig { rank: 4, alpha: 8.0, sample_scaler: 0.05, ..MonteCLoRAConfig::default() };
    let classifier = trained(Method::MonteCLoRA(bayes), &data.target, &data.train[..64])?;
    let texts = &data.dev[..20];
    let said = classifier.predict_averaged(texts, 3)?;
    let draws = [0, 1, 2].map(|draw| classifier.predict(texts, &Pass::Posterior { draw }));
    let mut apart = 0.0;
    for (row, said) in said.iter().enumerate() {
        let uncertainty = said.uncertainty.ok_or("draws were averaged")?;
        let mut aleatoric = 0.0;
        for class in 0..4 {
            let mut mean = 0.0;
            for draw in &draws {
                mean += draw.as_ref().map_err(ToString::to_string)?[row].values[class] / 3.0;
            }
            assert!((mean - said.values[class]).abs() < 1e-9, "row {row}, class {class}");
        }
        for draw in &draws {
            aleatoric += entropy(&draw.as_ref().map_err(ToString::to_string)?[row].values) / 3.0;
        }
        let information = entropy(&said.values) - aleatoric;
        assert!((information - uncertainty.epistemic).abs() < 1e-9, "row {row}");
        apart += information;
    }
    assert!(apart > 1e-6, "the draws say the same");
    let text = Prediction::csv(&said, &classifier.labels)?;
    let header = "row,label,p_cooking,p_sport,p_travel,p_weather,entropy,mutual_information";
    assert_eq!((text.lines().next(), text.lines().count()), (Some(header), 21));
    Ok(())
}

#[test]
fn scores_are_predicted_too_and_rows_without_one_not_trained_on() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("scores.tsv");
    let rows: String =
        (0..40).map(|i| format!("{} rain\t{}\n", "more ".repeat(i % 5), (i % 5) as f64 + 0.5)).collect();
    std::fs::write(&path, format!("text\tlabel\n{rows}"))?;
    let data = DataSet::read(&path, &Columns::default(), None)?.hold_out(0.25, Noise::new(1))?;
    assert_eq!((&data.target, data.counts().len(), data.dev.len()), (&Target::Score, 0, 10));
    let classifier = trained(lora(), &data.target, &data.train)?;
    assert!(classifier.evaluate(&data.dev)?.mse.is_some());
    let said = classifier.predict(&["more rain"], &Pass::Mean)?;
    assert!(said[0].label.is_none() && said[0].values.len() == 1);
    let submission = Submission::new(Task::Stsb, "test", &said)?.text;
    assert!(submission.starts_with("index\tprediction\n0\t"), "{submission}");
    // Rows without a label can be predicted, not trained on, for classes and scores alike.
    let files = ModelFiles::locate(&tiny_roberta(), None)?;
    for outputs in [1usize, 2] {
        let start = MethodInit::Fresh(lora(), Targets::default());
        let fresh = Classifier::load(&files, outputs, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
        let rows = fresh.encode(&["a".into(), "b".into()])?;
        let batcher = Batcher::new(2, false, Noise::new(1))?;
        let objective = Classification::new(&fresh, &rows, batcher);
        let error = fit(&objective, &fresh.params, &TrainConfig::default(), &mut ()).unwrap_err().to_string();
        assert!(error.contains("has no label: it can be predicted, not trained on"), "{error}");
    }
    Ok(())
}

#[test]
fn classes_that_are_called_by_numbers_keep_their_names() -> Outcome {
    let dir = tempfile::tempdir()?;
    let target = Target::Classes(Labels::new(["0", "1"])?);
    let rows: Vec<Example> = (0..4).map(|i| Example::new("a text", None, Label::Class(i % 2))).collect();
    for (method, folder) in [(lora(), "adapter"), (Method::Full, "model")] {
        trained(method, &target, &rows)?.save(&tiny_roberta(), dir.path())?;
        let opened = Classifier::open(&dir.path().join(folder), None, DType::F32, &Device::Cpu)?;
        assert_eq!(opened.labels, Labels::from(&target), "{folder}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_opened_says_why() -> Outcome {
    let open =
        |dir: &Path| Classifier::open(dir, None, DType::F32, &Device::Cpu).map(drop).unwrap_err().to_string();
    let dir = tempfile::tempdir()?;
    let empty = open(dir.path());
    assert!(
        empty.ends_with("no adapter_config.json and no config.json, here or in adapter/ or model/"),
        "{empty}"
    );
    let bare = open(&asset("tiny-roberta"));
    assert!(bare.contains("no trained head in it, nor in an adapter"), "{bare}");
    std::fs::create_dir(dir.path().join("adapter"))?;
    std::fs::write(dir.path().join("adapter/parameters.safetensors"), "")?;
    assert!(open(dir.path()).contains("its method is for comparison only"));
    Ok(())
}
