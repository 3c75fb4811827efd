//! Rows that a run of the example `glue` does not train on: for a temperature, and for a test at the end.

use std::fs;
use std::process::Command;

use candle_core::{DType, Device};
use monteclora::bayes::Temperature;
use monteclora::data::split::{at, hold_out, strata};
use monteclora::data::task::{Label, Task};
use monteclora::predict::logits;
use monteclora::train::{batches, Classifier};
use monteclora::{Noise, Pass};
use serde_json::Value;

use crate::support::programs::{glue, sst2};
use crate::support::{asset, Outcome};

#[test]
fn the_head_that_a_run_writes_is_calibrated_on_the_rows_that_it_held_out() -> Outcome {
    let (program, home) = (glue()?, tempfile::tempdir()?);
    sst2(home.path(), 64, 16)?;
    let run = |out: &str, share: &str, options: &str| -> Outcome<String> {
        let mut command = Command::new(&program);
        command.arg("--data").arg(home.path()).arg("--output").arg(home.path().join(out));
        command.args(options.split_whitespace()).args(["--temperature-share", share, "--seed", "7"]);
        let output = command.env("RAYON_NUM_THREADS", "1").output()?;
        let text = String::from_utf8(output.stderr)?;
        if output.status.success() {
            Ok(text)
        } else {
            Err(text.into())
        }
    };
    let text = run("out", "0.25", "--method lora --rank 4 --lr 1e-2 --epochs 8")?;
    assert!(text.contains("from 16 rows that were not trained on"), "{text}");
    let metrics: Value = serde_json::from_slice(&fs::read(home.path().join("out/metrics.json"))?)?;
    let found = metrics["temperature"].as_f64().ok_or("a temperature")?;
    assert!((found - 1.0).abs() > 0.02 && found > 0.02 && found < 90.0, "{found}");

    // The head that was written is the scaled one: on the same rows it needs no other temperature.
    let mut classifier = Classifier::open(&home.path().join("out"), None, DType::F32, &Device::Cpu)?;
    classifier.set_max_length(128)?;
    let rows = classifier.encode(&Task::Sst2.load_folder(home.path())?.train)?;
    let (_, held) = hold_out(&strata(&rows), 0.25, Noise::new(7))?;
    let held = at(&rows, &held);
    let class = |label: Label| if let Label::Class(class) = label { class } else { u32::MAX };
    let labels: Vec<u32> = held.iter().map(|row| class(row.label)).collect();
    let again = logits(&classifier, &batches(&classifier, &held, 16)?, &Pass::Mean.into())?;
    let again = Temperature::fit(&again, &labels)?.value();
    assert!((again - 1.0).abs() < 1e-3, "{again}, after {found}");

    let adapter = format!("--adapter {} --epochs 0", home.path().join("out").display());
    let text = run("measured", "0.25", &adapter)?;
    assert!(text.contains("warning: --temperature-share has no effect"), "{text}");
    let error = run("none", "0.001", "--method lora").unwrap_err().to_string();
    assert!(error.contains("--temperature-share: ") && error.contains("at least one row"), "{error}");
    Ok(())
}

#[test]
fn a_test_is_measured_at_the_end_alone_as_predictions_of_the_adapter_and_the_merged_model_are() -> Outcome {
    let (program, home) = (glue()?, tempfile::tempdir()?);
    let table = fs::read_to_string(asset("topics/topics.csv"))?;
    let (header, rows) = table.split_once('\n').ok_or("a header")?;
    let rows: Vec<&str> = rows.lines().collect();
    for (name, part) in [("train.csv", &rows[..240]), ("test.csv", &rows[240..])] {
        fs::write(home.path().join(name), format!("{header}\n{}\n", part.join("\n")))?;
    }
    let run = |options: &str| -> Outcome<(String, String)> {
        let mut command = Command::new(&program);
        command.args(options.split_whitespace()).current_dir(home.path()).env("RAYON_NUM_THREADS", "1");
        let output = command.output()?;
        let told = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        if output.status.success() {
            Ok(told)
        } else {
            Err(told.1.into())
        }
    };
    let (told, _) = run(
        "--train train.csv --test test.csv --method lora --rank 4 --epochs 2 --max-length 24 --merged --output out",
    )?;
    assert!(told.contains("lora (mean)") && told.contains("lora (mean, test)"), "{told}");
    let metrics: Value = serde_json::from_slice(&fs::read(home.path().join("out/metrics.json"))?)?;
    let log = fs::read_to_string(home.path().join("out/evaluations.jsonl"))?;
    assert!(log.contains("dev/accuracy") && !log.contains("test/"), "{log}");
    let lines = fs::read_to_string(home.path().join("out/predictions_test.jsonl"))?;
    assert_eq!(lines.lines().count(), rows.len() - 240);
    // By the adapter, and by the whole model with the adapter merged in.
    for trained in ["out", "out/model"] {
        let (_, told) = run(&format!("--predict test.csv --adapter {trained} --label-column label"))?;
        let measured = told.lines().find_map(|line| line.strip_prefix("measured: ")).ok_or("metrics")?;
        let measured: Value = serde_json::from_str(measured)?;
        for name in ["accuracy", "nll"] {
            let [of_run, alone] = [&metrics["mean_test"], &measured].map(|metrics| metrics[name].as_f64());
            let (of_run, alone) = (of_run.ok_or("a metric")?, alone.ok_or("a metric")?);
            assert!((of_run - alone).abs() < 1e-4 && of_run > 0.0, "{trained}, {name}: {of_run} {alone}");
        }
    }
    Ok(())
}
