//! Whole models on a CUDA device against the same models on the host. A build with the feature `cuda` fails
//! these tests if there is no device.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use monteclora::adapters::{AdaLoraConfig, BottleneckConfig, LoraConfig, PromptConfig};
use monteclora::data::batch::Batcher;
use monteclora::data::encode::Encoded;
use monteclora::inject::Targets;
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::merged_tensors;
use monteclora::models::Placement;
use monteclora::predict::posterior_probabilities;
use monteclora::train::{batches, fit, Classification, Classifier, Method, MethodInit, TrainConfig};
use monteclora::{cuda_device, KlEvaluation, Mixture, MonteCLoRAConfig, Noise, Pass, Prior};

use crate::causal;
use crate::placement::run;
use crate::support::checkpoints::{checkpoint, llama_checkpoint, logits_of, rows, Log};
use crate::support::{assert_close, scatter, skipped, Outcome};

fn methods() -> Vec<Method> {
    let bayes = MonteCLoRAConfig { rank: 4, alpha: 8.0, sample_scaler: 0.1, ..MonteCLoRAConfig::default() };
    let sparse = MonteCLoRAConfig { mixture: Mixture::Sparse, ..bayes.clone() };
    let sampled = MonteCLoRAConfig { mode: KlEvaluation::Sampled, ..bayes.clone() };
    let literal = MonteCLoRAConfig { rank: 4, ..MonteCLoRAConfig::paper_literal() };
    let peft = MonteCLoRAConfig { rank: 4, ..MonteCLoRAConfig::peft() };
    let lora = LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() };
    let bayesian = [bayes, sparse, sampled, literal, peft].map(Method::MonteCLoRA);
    let others = [
        Method::Lora(lora.clone()),
        Method::Dora(lora),
        Method::AdaLora(AdaLoraConfig::towards(2)),
        Method::Ia3,
        Method::Bottleneck(BottleneckConfig { width: 2 }),
        Method::Prompt(PromptConfig { virtual_tokens: 2 }),
        Method::Full,
    ];
    bayesian.into_iter().chain(others).collect()
}

fn load(files: &ModelFiles, method: &Method, dtype: DType, device: &Device) -> Outcome<Classifier> {
    let start = MethodInit::Fresh(method.clone(), Targets::default());
    Ok(Classifier::load(files, 2, &start, Noise::new(4), dtype, device)?)
}

/// Trains for two epochs and returns the loss of every step.
fn losses(classifier: &Classifier, rows: &[Encoded]) -> Outcome<Vec<f64>> {
    let batcher = Batcher::new(8, true, Noise::new(4))?;
    let objective = Classification::new(classifier, rows, batcher);
    let config = TrainConfig { epochs: 2, lr: 5e-3, keep_best: false, ..TrainConfig::default() };
    let mut log = Log::default();
    fit(&objective, &classifier.params, &config, &mut log)?;
    Ok(log.0.iter().map(|record| record.loss).collect())
}

#[test]
fn training_on_a_device_is_training_on_the_host() -> Outcome {
    let (dirs, device) = ([tempfile::tempdir()?, tempfile::tempdir()?], cuda_device(0)?);
    // Rows of one length: the host leaves padding out, so that dropout would hit other elements.
    let rows: Vec<_> = rows(80, false).into_iter().filter(|row| row.ids.len() == 8).collect();
    for files in [checkpoint(dirs[0].path())?, llama_checkpoint(dirs[1].path())?] {
        for method in methods() {
            let [there, here] = [
                load(&files, &method, DType::F32, &device)?,
                load(&files, &method, DType::F32, &Device::Cpu)?,
            ];
            let (got, want) = (losses(&there, &rows)?, losses(&here, &rows)?);
            for (step, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!(
                    (got - want).abs() < 1e-3 * want,
                    "{} step {step}: {got}, on the host {want}",
                    method.name()
                );
            }
            let probabilities = |classifier: &Classifier| {
                posterior_probabilities(classifier, &batches(classifier, &rows, 4)?, 2)
            };
            for (got, want) in
                probabilities(&there)?.iter().flatten().zip(probabilities(&here)?.iter().flatten())
            {
                assert!((got - want).abs() < 1e-2, "{}: {got}, on the host {want}", method.name());
            }
        }
    }
    Ok(())
}

#[test]
fn what_a_device_has_trained_is_read_on_the_host() -> Outcome {
    let (dir, device) = (tempfile::tempdir()?, cuda_device(0)?);
    let (files, rows) = (checkpoint(dir.path())?, rows(16, false));
    let method = &methods()[0];
    let classifier = load(&files, method, DType::F32, &device)?;
    losses(&classifier, &rows)?;
    classifier.save("toy", &dir.path().join("out"))?;
    let there =
        monteclora::predict::logits(&classifier, &batches(&classifier, &rows, 16)?, &Pass::Mean.into())?;
    let here = logits_of(&files, Some(&dir.path().join("out/adapter")), &rows)?;
    for (got, want) in here.iter().flatten().zip(there.iter().flatten()) {
        assert!((f64::from(*got) - want).abs() < 1e-4, "{got} {want}");
    }
    Ok(())
}

#[test]
fn a_checkpoint_takes_from_a_device_what_it_takes_from_the_host() -> Outcome {
    let (dir, device) = (tempfile::tempdir()?, cuda_device(0)?);
    let files = checkpoint(dir.path())?;
    // IA3 also scales biases, which cannot be merged into a weight.
    let merges = |method: &&Method| {
        matches!(method, Method::MonteCLoRA(_) | Method::Lora(_) | Method::Dora(_) | Method::AdaLora(_))
    };
    for method in methods().iter().filter(merges) {
        let merged = |device: &Device| -> Outcome<HashMap<String, Tensor>> {
            let classifier = load(&files, method, DType::F32, device)?;
            scatter(&classifier.params)?;
            Ok(merged_tensors(&*classifier.model, &classifier.params, &files, &Pass::Mean)?)
        };
        let (there, here) = (merged(&device)?, merged(&Device::Cpu)?);
        assert_eq!(there.len(), here.len());
        for (name, want) in here {
            assert_close(&there[&name].to_device(&Device::Cpu)?, &want, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn a_base_of_half_width_trains_adapters_of_single_precision() -> Outcome {
    let (dirs, device) = ([tempfile::tempdir()?, tempfile::tempdir()?], cuda_device(0)?);
    let rows = rows(32, false);
    for files in [checkpoint(dirs[0].path())?, llama_checkpoint(dirs[1].path())?] {
        for dtype in [DType::BF16, DType::F16] {
            let method = &methods()[0];
            let classifier = load(&files, method, dtype, &device)?;
            assert!(classifier.params.all().iter().all(|(_, param)| param.var.dtype() == DType::F32));
            let losses = losses(&classifier, &rows)?;
            assert!(
                losses.iter().all(|loss| loss.is_finite()) && losses[losses.len() - 1] < losses[0],
                "{losses:?}"
            );
        }
    }
    Ok(())
}

/// On one device, and with the layers on two devices, each of which must only access its own memory.
#[test]
fn a_language_model_learns_and_writes_on_devices_what_it_does_on_the_host() -> Outcome {
    let mut placements = vec![Placement::new(&[(cuda_device(0)?, 3)])?];
    match cuda_device(1) {
        Ok(second) => placements.push(Placement::new(&[(cuda_device(0)?, 1), (second, 2)])?),
        Err(error) => skipped(&format!("two devices: {error}")),
    }
    let (host, all) = (Placement::new(&[(Device::Cpu, 3)])?, Targets::parse("all-linear")?);
    // Methods with other terms that are sums over layers.
    let map = LoraConfig { rank: 4, prior: Some(Prior::map()), ..LoraConfig::default() };
    let calibrated = MonteCLoRAConfig { rank: 4, ..MonteCLoRAConfig::calibrated() };
    let sampled = MonteCLoRAConfig { rank: 4, mode: KlEvaluation::Sampled, ..MonteCLoRAConfig::default() };
    let sums = [
        Method::AdaLora(AdaLoraConfig::towards(2)),
        Method::Lora(map),
        Method::MonteCLoRA(calibrated),
        Method::MonteCLoRA(sampled),
    ];
    let both = causal::methods();
    let runs = both.iter().flat_map(|method| [(method, false), (method, true)]);
    for (method, checkpoint) in runs.chain(sums.iter().map(|method| (method, false))) {
        let want = run(&host, method, &all, checkpoint)?;
        for placement in &placements {
            let got = run(placement, method, &all, checkpoint)?;
            for (step, (got, want)) in got.losses.iter().zip(&want.losses).enumerate() {
                let what = format!("{} step {step}, {placement}", method.name());
                assert!((got - want).abs() < 1e-3 * want, "{what}: {got}, on the host {want}");
            }
            assert_eq!(got.said, want.said, "{}, {placement}", method.name());
        }
    }
    Ok(())
}
