//! A classifier that predicts in the linearised model: what a text gets, files, threads.

use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use monteclora::bayes::LinearisedClassifier;
use monteclora::data::batch::Batcher;
use monteclora::data::table::DataSet;
use monteclora::inject::Targets;
use monteclora::metrics::entropy;
use monteclora::models::hub::ModelFiles;
use monteclora::predict::Prediction;
use monteclora::train::{batches, fit, Classification, Classifier, Method, MethodInit, TrainConfig};
use monteclora::{MonteCLoRAConfig, Noise, Pass};
use serde_json::{json, Value};

use crate::support::Outcome;
use crate::tables::{tiny_roberta, topics};

/// A classifier that is trained a little on the topics, with its layers recomputed in backward passes.
fn trained(data: &DataSet) -> Outcome<Classifier> {
    let files = ModelFiles::locate(&tiny_roberta(), None)?;
    let bayes = MonteCLoRAConfig { rank: 4, alpha: 8.0, ..MonteCLoRAConfig::default() };
    let start = MethodInit::Fresh(Method::MonteCLoRA(bayes), Targets::default());
    let target = &data.target;
    let mut classifier = Classifier::load(&files, target, &start, Noise::new(1), DType::F32, &Device::Cpu)?;
    classifier.set_max_length(24)?;
    classifier.model.set_checkpoint_layers(true);
    let rows = classifier.encode(&data.train)?;
    let objective = Classification::new(&classifier, &rows, Batcher::new(16, false, Noise::new(1))?);
    let config = TrainConfig { epochs: 2, lr: 3e-3, ..TrainConfig::default() };
    fit(&objective, &classifier.params, &config, &mut ())?;
    Ok(classifier)
}

#[test]
fn a_refitted_classifier_is_less_sure_and_says_the_same_alone_after_opening_and_in_threads() -> Outcome {
    let data = topics()?;
    let classifier = trained(&data)?;
    let rows = classifier.encode(&data.train)?;
    let plain = classifier.predict(&data.dev, &Pass::Mean)?;
    let linearised = LinearisedClassifier::refitted(classifier, &rows)?;
    let said = linearised.predict(&data.dev)?;
    let sure =
        |all: &[Prediction]| all.iter().map(|row| entropy(&row.values)).sum::<f64>() / all.len() as f64;
    assert!(sure(&said) > sure(&plain) + 0.01, "{} {}", sure(&said), sure(&plain));
    for row in &said {
        let unsure = row.uncertainty.ok_or("an uncertainty")?;
        assert!((row.values.iter().sum::<f64>() - 1.0).abs() < 1e-9 && unsure.epistemic > 0.0, "{row:?}");
    }
    let same = |a: &[Prediction], b: &[Prediction]| {
        let pairs = a.iter().zip(b).flat_map(|(a, b)| a.values.iter().zip(&b.values));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) < 1e-5
    };
    for place in [0, 70] {
        assert!(same(&linearised.predict(&data.dev[place..=place])?, &said[place..=place]), "{place}");
    }
    let encoded = linearised.classifier().encode(&data.dev)?;
    let dev = batches(linearised.classifier(), &encoded, 7)?;
    let probabilities = linearised.probabilities(&dev)?;
    let of_rows: Vec<Prediction> =
        said.iter().zip(probabilities).map(|(said, values)| Prediction { values, ..said.clone() }).collect();
    assert!(same(&of_rows, &said));

    // Other threads predict at the mean meanwhile.
    std::thread::scope(|scope| {
        let others = [0, 1].map(|_| scope.spawn(|| linearised.classifier().predict(&data.dev, &Pass::Mean)));
        let both = [0, 1].map(|_| scope.spawn(|| linearised.predict(&data.dev)));
        for thread in both {
            assert!(same(&thread.join().expect("a thread").expect("predictions"), &said));
        }
        for thread in others {
            assert!(same(&thread.join().expect("a thread").expect("predictions"), &plain));
        }
    });

    let dir = tempfile::tempdir()?;
    linearised.save(&tiny_roberta(), dir.path())?;
    let open = |dir: &Path| LinearisedClassifier::open(dir, None, DType::F32, &Device::Cpu);
    let mut opened = open(dir.path())?;
    opened.classifier_mut().set_max_length(24)?;
    assert!(same(&opened.predict(&data.dev)?, &said));
    // Saving the adapter again makes the posterior one of other weights: it is removed.
    let file = dir.path().join("adapter/linearised.json");
    let text = fs::read(&file)?;
    opened.classifier().save(&tiny_roberta(), dir.path())?;
    assert!(!file.exists());
    assert!(open(&dir.path().join("adapter")).unwrap_err().to_string().contains("linearised.json"));

    let saved: Value = serde_json::from_slice(&text)?;
    let layers = saved["variances"].as_object().ok_or("layers")?;
    let first = layers.keys().next().ok_or("a layer")?;
    let broken = |change: &dyn Fn(&mut Value)| -> Outcome<String> {
        let mut saved = saved.clone();
        change(&mut saved);
        fs::write(&file, saved.to_string())?;
        Ok(open(dir.path()).unwrap_err().to_string())
    };
    let wanted = format!("expected 4 positive variances of {first}");
    for value in [json!([1.0, 1.0]), json!([1.0, 1.0, 0.0, 1.0])] {
        let error = broken(&|saved| saved["variances"][first] = value.clone())?;
        assert!(error.contains(&wanted), "{error}");
    }
    let error = broken(&|saved| saved["variances"]["nosuch"] = json!([1.0]))?;
    assert!(error.contains("nosuch has no adapter"), "{error}");
    // The adapter was trained on since, by a program that does not know this file.
    let [a, b] = [0, 1].map(|at| saved["norms"][first][at].as_f64().unwrap_or(f64::NAN));
    assert!(a > 0.0 && b > 0.0, "{a} {b}");
    for norms in [json!([a * 1.01, b]), json!([a, b * 0.99])] {
        let error = broken(&|saved| saved["norms"][first] = norms.clone())?;
        assert!(error.contains(&format!("other weights of {first}")), "{error}");
    }
    // Another precision rounds them.
    let mut rounded = saved.clone();
    rounded["norms"][first] = json!([a * 1.0003, b]);
    fs::write(&file, rounded.to_string())?;
    open(dir.path())?;
    fs::write(&file, &text[..text.len() / 2])?;
    let error = open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("linearised.json") && error.contains("malformed"), "{error}");
    Ok(())
}

#[test]
fn more_rows_than_a_refit_reads_stand_for_all() -> Outcome {
    // The same rows three times over: the sample has other rows than all, of the same classes.
    let data = topics()?;
    let variances = |times: usize| -> Outcome<f64> {
        let classifier = trained(&data)?;
        let rows = classifier.encode(&data.train)?;
        let rows: Vec<_> = (0..times).flat_map(|_| rows.iter().cloned()).collect();
        let dir = tempfile::tempdir()?;
        LinearisedClassifier::refitted(classifier, &rows)?.save(&tiny_roberta(), dir.path())?;
        let saved: Value = serde_json::from_slice(&fs::read(dir.path().join("adapter/linearised.json"))?)?;
        let layers = saved["variances"].as_object().ok_or("layers")?.values();
        let all = layers.flat_map(|layer| layer.as_array().cloned().unwrap_or_default());
        Ok(all.filter_map(|v| v.as_f64()).map(f64::ln).sum())
    };
    // 300, 600 and 900 rows; 512 are read.
    let [once, twice, thrice] = [variances(1)?, variances(2)?, variances(3)?];
    assert!(once > twice && twice > thrice, "{once} {twice} {thrice}");
    Ok(())
}
