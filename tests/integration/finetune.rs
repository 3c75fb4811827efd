//! Fine-tuning end to end from a toy checkpoint on disk, with every method.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use monteclora::adapter::Role;
use monteclora::adapters::{BottleneckConfig, LoraConfig, PromptConfig};
use monteclora::data::batch::{Batch, Batcher};
use monteclora::data::encode::Encoded;
use monteclora::data::task::Label;
use monteclora::inject::Targets;
use monteclora::metrics::softmax;
use monteclora::models::hub::ModelFiles;
use monteclora::optim::{IvonConfig, Moments};
use monteclora::predict::{logits, posterior_probabilities};
use monteclora::train::{
    batches, fit, Classification, Classifier, Method, MethodInit, Objective, Observer, Predictions,
    StepRecord, TrainConfig,
};
use monteclora::{EvidenceBound, MonteCLoRAConfig, Noise, Params, Pass, Prior, PriorForm};

use crate::support::checkpoints::{
    bare_checkpoint, checkpoint, llama_checkpoint, load, logits_of, methods, rows, Log,
};
use crate::support::{scatter, Outcome};

fn train(classifier: &Classifier, rows: &[Encoded], epochs: usize) -> Outcome<Vec<StepRecord>> {
    let batcher = Batcher::new(8, true, Noise::new(4))?;
    let objective = Classification::new(classifier, rows, batcher);
    let config = TrainConfig { epochs, lr: 5e-3, keep_best: false, ..TrainConfig::default() };
    let mut log = Log::default();
    fit(&objective, &classifier.params, &config, &mut log)?;
    Ok(log.0)
}

#[test]
fn every_method_learns_through_the_one_loop_and_repeats_itself() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let (encoder, decoder) = (checkpoint(dir.path())?, llama_checkpoint(other.path())?);
    for (files, regression) in [(&encoder, false), (&encoder, true), (&decoder, false), (&decoder, true)] {
        let rows = rows(64, regression);
        for method in methods() {
            let run = || -> Outcome<(Vec<StepRecord>, Predictions)> {
                let classifier = load(files, &method, if regression { 1 } else { 2 })?;
                let log = train(&classifier, &rows, 6)?;
                let predictions = Predictions::new(&classifier, &rows, &batches(&classifier, &rows, 16)?, 0)?;
                Ok((log, predictions))
            };
            let (log, predictions) = run()?;
            assert_eq!((log.clone(), predictions.clone()), run()?, "{}", method.name());
            let mean = |records: &[StepRecord]| {
                records.iter().map(|r| r.terms["task"]).sum::<f64>() / records.len() as f64
            };
            let (first, last) = (mean(&log[..8]), mean(&log[log.len() - 8..]));
            assert!(last < 0.8 * first, "{} {regression}: {first} -> {last}", method.name());
            let metrics = predictions.evaluate()?.mean;
            let score = if regression { metrics.pearson } else { metrics.accuracy };
            assert!(score.is_some_and(|score| score > 0.7), "{} {metrics:?}", method.name());
        }
    }
    Ok(())
}

#[test]
fn monteclora_logs_its_terms_and_lora_has_none() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let rows = rows(16, false);
    for method in methods() {
        let classifier = load(&files, &method, 2)?;
        let names: Vec<&str> = train(&classifier, &rows, 1)?[0].terms.keys().copied().collect();
        match method {
            Method::MonteCLoRA(_) => {
                assert_eq!(names, ["cooperative", "kl_dirichlet", "kl_gaussian", "kl_wishart", "task"])
            }
            _ => assert_eq!(names, ["task"]),
        }
    }
    Ok(())
}

#[test]
fn the_trainer_tells_a_prior_how_many_rows_there_are() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let form = PriorForm::Factors { std_a: 0.1, std_b: 0.2 };
    let prior = Prior { form, temperature: 0.5, shared: false, head_std: Some(1.0) };
    let map = Method::Lora(LoraConfig { rank: 4, prior: Some(prior), ..LoraConfig::default() });
    let calibrated = MonteCLoRAConfig { rank: 4, prior: Some(prior), ..MonteCLoRAConfig::calibrated() };
    let evidence = Some(EvidenceBound { std: 0.1, temperature: 0.5, latents: false });
    let evidence = MonteCLoRAConfig { rank: 4, evidence, ..MonteCLoRAConfig::paper() };
    let rows = rows(48, false);
    for method in [map, Method::MonteCLoRA(calibrated), Method::MonteCLoRA(evidence)] {
        let classifier = load(&files, &method, 2)?;
        let log = train(&classifier, &rows, 1)?;
        let pull = |record: &StepRecord| record.terms.get("prior").or(record.terms.get("kl_mean")).copied();
        assert!(log.last().and_then(pull).is_some_and(|pull| pull > 0.0), "{method:?}");
        for record in log {
            let term = |name: &str| record.terms.get(name).copied().unwrap_or_default();
            let kl = term("kl_gaussian") + term("kl_wishart") + term("kl_dirichlet");
            let paper = if term("kl_mean") == 0.0 { 1e-5 * kl + term("cooperative") } else { 0.0 };
            let want = term("task") + paper + 0.5 / 48.0 * (term("prior") + term("kl_mean"));
            assert!((record.loss - want).abs() < 1e-5 * want, "{method:?} {record:?}");
        }
        // The number of rows cannot be known from a batch.
        let batch = &batches(&classifier, &rows, 8)?[0];
        let error = classifier.loss(batch, &Pass::Mean.into(), None).unwrap_err().to_string();
        assert!(error.starts_with("invalid rows"), "{error}");
    }
    Ok(())
}

#[test]
fn a_posterior_draw_is_the_same_weights_for_every_batch() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let bayes = MonteCLoRAConfig { rank: 4, sample_scaler: 0.5, ..MonteCLoRAConfig::default() };
    let classifier = load(&files, &Method::MonteCLoRA(bayes), 2)?;
    let rows = rows(24, false);
    train(&classifier, &rows, 2)?;
    let (small, large) = (batches(&classifier, &rows, 5)?, batches(&classifier, &rows, 24)?);
    let close = |a: &[Vec<f64>], b: &[Vec<f64>]| {
        a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| (a - b).abs() < 1e-5)
    };
    let draw = |draw, batches| logits(&classifier, batches, &Pass::Posterior { draw }.into());
    assert!(close(&draw(2, &small)?, &draw(2, &large)?));
    assert!(!close(&draw(2, &small)?, &draw(3, &small)?));
    // Averaged after the softmax, over the draws 0, 1, 2.
    let averaged = posterior_probabilities(&classifier, &small, 3)?;
    let mut by_hand = vec![vec![0.0; 2]; rows.len()];
    for i in 0..3 {
        for (sum, row) in by_hand.iter_mut().zip(draw(i, &large)?) {
            sum.iter_mut().zip(softmax(&row)).for_each(|(sum, p)| *sum += p / 3.0);
        }
    }
    assert!(close(&averaged, &by_hand));
    Ok(())
}

#[test]
fn predictions_and_what_was_trained_are_written() -> Outcome {
    let dirs = [tempfile::tempdir()?, tempfile::tempdir()?, tempfile::tempdir()?];
    let (encoder, decoder) = (checkpoint(dirs[0].path())?, llama_checkpoint(dirs[1].path())?);
    let bare = bare_checkpoint(&encoder, dirs[2].path())?;
    let rows = rows(10, false);
    let files = [&encoder, &decoder, &bare];
    let runs = methods().into_iter().flat_map(|method| files.map(|files| (files, method.clone())));
    for (i, (files, method)) in runs.enumerate() {
        let classifier = load(files, &method, 2)?;
        scatter(&classifier.params)?;
        let out = dirs[0].path().join(format!("{i}"));
        classifier.save("toy", &out)?;
        let batches = batches(&classifier, &rows, 10)?;
        let draws = if method.has_posterior() { 2 } else { 0 };
        let predictions = Predictions::new(&classifier, &rows, &batches, draws)?;
        if draws == 0 {
            let error = Predictions::new(&classifier, &rows, &batches, 2).err().ok_or("drew")?.to_string();
            assert!(error.contains("has no posterior"), "{error}");
        }
        predictions.write(&out.join("predictions.jsonl"))?;
        let text = std::fs::read_to_string(out.join("predictions.jsonl"))?;
        let last: serde_json::Value = serde_json::from_str(text.lines().last().ok_or("no line")?)?;
        assert_eq!((text.lines().count(), &last["index"]), (10, &serde_json::json!(9)));
        assert!(last["posterior"].is_array() == (draws > 0));
        assert!(last["mean"].is_array() && last["label"].is_u64());
        let again = match method {
            Method::Full => {
                let saved = ModelFiles::locate(out.join("model").to_str().ok_or("a path")?, None)?;
                let names = saved.var_builder(DType::F32, &Device::Cpu)?;
                let bodies = ["roberta.embeddings.word_embeddings.weight", "model.embed_tokens.weight"];
                assert!(bodies.iter().any(|name| names.contains_tensor(name)));
                logits_of(&saved, None, &rows)?
            }
            _ => logits_of(files, Some(&out.join("adapter")), &rows)?,
        };
        let expected: Vec<Vec<f32>> =
            predictions.logits.iter().map(|row| row.iter().map(|x| *x as f32).collect()).collect();
        assert_eq!(again, expected, "{}", method.name());
        let error = predictions.write(&out.join("no/such/folder.jsonl")).unwrap_err().to_string();
        assert!(error.contains("folder.jsonl"), "{error}");
    }
    let classifier = load(&encoder, &Method::Full, 2)?;
    let few = batches(&classifier, &rows[..9], 4)?;
    let error = Predictions::new(&classifier, &rows, &few, 0).map(drop).unwrap_err().to_string();
    assert!(error.contains("10 rows, but 9 in the batches"), "{error}");
    Ok(())
}

#[test]
fn labels_that_do_not_fit_the_outputs_are_refused_by_their_row() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let (mut classes, scores) = (rows(6, false), rows(6, true));
    classes[4].label = Label::Class(2);
    for (outputs, data, expected) in [
        (2, &scores, "invalid labels: row 3 has a score, expected a class below 2"),
        (1, &classes, "invalid labels: row 3 has a class, expected a score"),
        (2, &classes, "invalid labels: row 4 has class 2, the model has 2 outputs"),
    ] {
        let lora = LoraConfig { rank: 4, ..LoraConfig::default() };
        let classifier = load(&files, &Method::Lora(lora), outputs)?;
        let batcher = Batcher::new(8, false, Noise::new(4))?;
        let objective = Classification::new(&classifier, data, batcher);
        // Rows 3 to 5 of the data are rows 0 to 2 of the batch.
        let batch = objective.batch(&[3, 4, 5])?;
        let error = classifier.loss(&batch, &Pass::Mean.into(), None).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
        let error = Predictions::new(&classifier, &data[3..], &[batch], 0).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    Ok(())
}

#[test]
fn no_row_is_an_error_in_training_and_in_evaluation() -> Outcome {
    let dir = tempfile::tempdir()?;
    let classifier = load(&checkpoint(dir.path())?, &Method::Full, 2)?;
    let error = train(&classifier, &[], 1).unwrap_err().to_string();
    assert_eq!(error, "invalid data: there is no batch to train on");
    let error = batches(&classifier, &[], 4).unwrap_err().to_string();
    assert_eq!(error, "invalid rows: there is no row to evaluate");
    Ok(())
}

#[test]
fn batches_of_other_rows_are_refused() -> Outcome {
    let dir = tempfile::tempdir()?;
    let classifier = load(&checkpoint(dir.path())?, &Method::Full, 2)?;
    let rows = rows(6, false);
    let mut swapped = batches(&classifier, &rows, 3)?;
    swapped.swap(0, 1);
    let error = Predictions::new(&classifier, &rows, &swapped, 0).unwrap_err().to_string();
    assert_eq!(error, "invalid batches: place 0 holds row 3, but the split has row 0 there");
    Ok(())
}

#[test]
fn what_an_optimiser_remembers_is_told_beside_the_parameters_that_it_goes_with() -> Outcome {
    /// Scores that fall, so that the first evaluation is the best.
    struct Falling<'a>(&'a Params, Vec<BTreeMap<String, Tensor>>);

    impl Observer for Falling<'_> {
        fn step(&mut self, _: &StepRecord) -> monteclora::Result<()> {
            Ok(())
        }

        fn evaluate(&mut self, step: usize) -> monteclora::Result<Option<f64>> {
            self.1.push(self.0.snapshot()?);
            Ok(Some(-(step as f64)))
        }

        fn trained(&mut self, moments: &BTreeMap<String, Moments>) -> monteclora::Result<()> {
            assert_eq!(moments.len(), self.0.trainable().len());
            self.1.push(self.0.snapshot()?);
            Ok(())
        }
    }

    let dir = tempfile::tempdir()?;
    let (classifier, rows) = (load(&checkpoint(dir.path())?, &methods()[0], 2)?, rows(16, false));
    let batcher = Batcher::new(8, true, Noise::new(4))?;
    let objective = Classification::new(&classifier, &rows, batcher);
    let config = TrainConfig {
        epochs: 2,
        lr: 5e-3,
        ivon: Some(IvonConfig::default()),
        clip: None,
        ..TrainConfig::default()
    };
    let mut seen = Falling(&classifier.params, Vec::new());
    let summary = fit(&objective, &classifier.params, &config, &mut seen)?;
    let same = |one: &BTreeMap<String, Tensor>, other: &BTreeMap<String, Tensor>| -> Outcome<bool> {
        let of = |of: &BTreeMap<String, Tensor>| -> Outcome<Vec<Vec<f32>>> {
            of.values().map(|t| Ok(t.flatten_all()?.to_vec1()?)).collect()
        };
        Ok(of(one)? == of(other)?)
    };
    let [first, last, told] = &seen.1[..] else { return Err("two evaluations and an end".into()) };
    assert!(summary.kept_step == 2 && same(&classifier.params.snapshot()?, first)?);
    assert!(same(told, last)? && !same(told, first)?);
    Ok(())
}

#[test]
fn rows_without_a_label_have_no_weight() -> Outcome {
    let dir = tempfile::tempdir()?;
    let prior = Prior { form: PriorForm::Mean { std: 0.01 }, head_std: None, ..Prior::map() };
    let method = Method::Lora(LoraConfig { prior: Some(prior), ..LoraConfig::default() });
    let (classifier, mut rows) = (load(&checkpoint(dir.path())?, &method, 2)?, rows(4, false));
    rows[1].label = Label::Unknown;
    let batcher = Batcher::new(2, false, Noise::new(4))?;
    let objective = Classification::new(&classifier, &rows, batcher);
    assert_eq!([objective.weight(&[0, 1]), objective.weight(&[2, 3])], [1.0, 2.0]);
    // A prior is weighted by the number of rows with a label, three.
    let batch = Batch::collate(&[&rows[2], &rows[3]], 0, &Device::Cpu)?;
    let with = |n| -> Outcome<f32> {
        Ok(classifier.loss(&batch, &Pass::Mean.into(), Some(n))?.total.to_scalar::<f32>()?)
    };
    let got = objective.loss(&[2, 3], &Pass::Mean.into())?.total.to_scalar::<f32>()?;
    assert_eq!(got, with(3)?);
    assert!((with(3)? - with(4)?).abs() > 1e-3, "{} {}", with(3)?, with(4)?);
    Ok(())
}

#[test]
fn methods_for_comparison_have_places_of_their_own_and_save_their_parameters() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let (encoder, decoder) = (checkpoint(dir.path())?, llama_checkpoint(other.path())?);
    let bottleneck = Method::Bottleneck(BottleneckConfig { width: 2 });
    for (files, method, places) in [
        (&encoder, &Method::Ia3, &["attention.self.key", "attention.self.value", "output.dense"][..]),
        (&decoder, &Method::Ia3, &["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"]),
        (&encoder, &bottleneck, &["attention.output.dense", "output.dense"]),
        (&decoder, &bottleneck, &["self_attn.o_proj", "mlp.down_proj"]),
    ] {
        let classifier = load(files, method, 2)?;
        let mut adapted = Vec::new();
        classifier.model.visit_linears(&mut |layer| {
            if layer.active().is_some() && layer.path().contains(".0.") {
                adapted.push(layer.path().split(".0.").nth(1).unwrap_or_default().to_string());
            }
            Ok(())
        })?;
        adapted.sort();
        let mut places = places.to_vec();
        places.sort_unstable();
        assert_eq!(adapted, places, "{}", method.name());

        let out = tempfile::tempdir()?;
        // The adapter of an earlier run must not be found in place of this one.
        load(files, &methods()[0], 2)?.save("base", out.path())?;
        classifier.save("base", out.path())?;
        assert!(!out.path().join("adapter/adapter_config.json").exists());
        let path = out.path().join("adapter/parameters.safetensors");
        let saved = candle_core::safetensors::load(path, &Device::Cpu)?;
        assert_eq!(saved.len(), classifier.params.all().len());

        let targets = Targets { rank_pattern: [("down_proj".to_string(), 3)].into(), ..Targets::default() };
        let start = MethodInit::Fresh(method.clone(), targets);
        let error = Classifier::load(files, 2, &start, Noise::new(4), DType::F32, &Device::Cpu);
        assert!(error.is_err_and(|error| error.to_string().contains("rank_pattern")), "{}", method.name());
    }
    // IA3 scales the inner activations of a feed-forward block, and the outputs of keys and values.
    let classifier = load(&encoder, &Method::Ia3, 2)?;
    let len = |path: &str| -> Outcome<usize> {
        let name = format!("roberta.encoder.layer.0.{path}.default.scaling");
        Ok(classifier.params.get(&name).ok_or("no such parameter")?.var.elem_count())
    };
    assert_eq!((len("attention.self.key")?, len("output.dense")?), (32, 48));
    Ok(())
}

#[test]
fn prompt_tuning_trains_virtual_tokens_and_the_head_alone() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let method = Method::Prompt(PromptConfig { virtual_tokens: 4 });
    for files in [checkpoint(dir.path())?, llama_checkpoint(other.path())?] {
        let classifier = load(&files, &method, 2)?;
        let roles: Vec<Role> = classifier.params.trainable().iter().map(|(_, param)| param.role).collect();
        assert!(roles.iter().all(|role| matches!(role, Role::Prompt | Role::Head)), "{roles:?}");
        let (before, rows) = (classifier.params.snapshot()?, rows(12, false));
        train(&classifier, &rows, 2)?;
        let after = classifier.params.snapshot()?;
        let moved = |name: &str| -> Outcome<f32> {
            Ok((&before[name] - &after[name])?.abs()?.flatten_all()?.min(0)?.to_scalar()?)
        };
        assert!(moved("prompt.default")? > 0.0, "every virtual token learns");

        let out = tempfile::tempdir()?;
        classifier.save("base", out.path())?;
        let path = out.path().join("adapter/parameters.safetensors");
        assert!(candle_core::safetensors::load(path, &Device::Cpu)?.contains_key("prompt.default"));

        let start = MethodInit::Fresh(method.clone(), Targets::parse("all-linear")?);
        let error = Classifier::load(&files, 2, &start, Noise::new(4), DType::F32, &Device::Cpu);
        assert!(error.is_err_and(|error| error.to_string().contains("changes no layer")));
    }
    Ok(())
}

#[test]
fn a_loss_that_is_not_finite_names_the_first_layer_where_it_began() -> Outcome {
    let (dir, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let lora = Method::Lora(LoraConfig { rank: 4, ..LoraConfig::default() });
    // Finite factors whose product overflows, in the middle of the model and inside a fused block.
    for (files, layer) in [
        (checkpoint(dir.path())?, "roberta.encoder.layer.1.attention.self.value"),
        (llama_checkpoint(other.path())?, "model.layers.1.self_attn.v_proj"),
    ] {
        let classifier = load(&files, &lora, 2)?;
        for part in ["a", "b"] {
            let name = format!("{layer}.default.{part}");
            let shape = classifier.params.get(&name).ok_or("no such parameter")?.var.shape().clone();
            classifier.params.set(&name, &Tensor::full(1e30f32, shape, &Device::Cpu)?)?;
        }
        let error = train(&classifier, &rows(16, false), 1).unwrap_err().to_string();
        assert!(error.starts_with("step 1: task is NaN"), "{error}");
        assert!(error.contains(&format!(", first in {layer}; batch rows [")), "{error}");
    }
    Ok(())
}
