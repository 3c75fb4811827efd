//! Runs that stop and resume from a checkpoint: N + N steps equal 2 N steps, bit for bit.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use monteclora::adapters::{AdaLoraConfig, BlobConfig, LoraConfig, PromptConfig};
use monteclora::data::batch::Batcher;
use monteclora::inject::Targets;
use monteclora::models::hub::ModelFiles;
use monteclora::optim::IvonConfig;
use monteclora::peft::AdapterFile;
use monteclora::train::{
    batches, fit_with_checkpoints, Checkpoints, Classification, Classifier, Method, MethodInit, Observer,
    Predictions, StepRecord, Summary, TrainConfig,
};
use monteclora::{Error, MonteCLoRAConfig, Noise, Prior, PriorForm, ScalerSchedule};

use crate::support::checkpoints::{checkpoint, rows};
use crate::support::Outcome;

/// An observer that keeps a log as the examples do, gives each step a score, and stops after a step.
#[derive(Default)]
struct Watch {
    log: Vec<StepRecord>,
    stop_after: Option<usize>,
    done: usize,
    warnings: Vec<String>,
    scores: BTreeMap<usize, f64>,
}

impl Observer for Watch {
    fn step(&mut self, record: &StepRecord) -> monteclora::Result<()> {
        self.log.push(record.clone());
        Ok(())
    }

    /// The score is best near step 7, so that the last evaluation is not the best.
    fn evaluate(&mut self, step: usize) -> monteclora::Result<Option<f64>> {
        let score = -(step as f64 - 7.0).abs() + 0.1;
        self.scores.insert(step, score);
        Ok(Some(score))
    }

    fn start(&mut self, _: usize, done: usize) -> monteclora::Result<()> {
        self.log.retain(|record| record.step <= done);
        self.done = done;
        Ok(())
    }

    fn warned(&mut self, what: &str) {
        self.warnings.push(what.to_string());
    }

    fn stop(&self) -> bool {
        self.log.last().is_some_and(|record| self.stop_after.is_some_and(|stop| record.step >= stop))
    }
}

struct Run<'a> {
    files: &'a ModelFiles,
    start: MethodInit,
    dtype: DType,
    config: TrainConfig,
    checkpoints: Checkpoints,
}

/// The results that must not depend on whether a run was stopped and resumed.
#[derive(PartialEq, Debug)]
struct End {
    params: Vec<(String, Vec<u32>)>,
    /// Parameters, moments, best parameters and the method's state after the last step.
    last_checkpoint: Vec<u8>,
    log: Vec<StepRecord>,
    predictions: Predictions,
    kept_step: usize,
}

impl Run<'_> {
    /// Loads everything anew, as a separate process would, and runs.
    fn go(&self, watch: &mut Watch) -> Outcome<(Classifier, monteclora::Result<Summary>)> {
        let (noise, device) = (Noise::new(4), &Device::Cpu);
        let classifier = Classifier::load(self.files, 2, &self.start, noise, self.dtype, device)?;
        let (rows, batcher) = (rows(41, false), Batcher::new(4, false, noise)?);
        let objective = Classification::new(&classifier, &rows, batcher);
        let (params, config) = (&classifier.params, &self.config);
        let outcome = fit_with_checkpoints(&objective, params, config, watch, &self.checkpoints);
        Ok((classifier, outcome))
    }

    fn end(&self, watch: &mut Watch) -> Outcome<End> {
        let (classifier, summary) = self.go(watch)?;
        let summary = summary?;
        let rows = rows(12, false);
        let draws = if classifier.method().has_posterior() { 2 } else { 0 };
        let last = self.checkpoints.dir.join(format!("step-{:08}/tensors.safetensors", summary.steps));
        let bits = |(name, param): (String, monteclora::adapter::Param)| -> Outcome<(String, Vec<u32>)> {
            let values = param.var.flatten_all()?.to_vec1::<f32>()?;
            Ok((name, values.into_iter().map(f32::to_bits).collect()))
        };
        Ok(End {
            params: classifier.params.all().into_iter().map(bits).collect::<Outcome<_>>()?,
            last_checkpoint: std::fs::read(last)?,
            log: watch.log.clone(),
            predictions: Predictions::new(&classifier, &rows, &batches(&classifier, &rows, 5)?, draws)?,
            kept_step: summary.kept_step,
        })
    }
}

fn run<'a>(files: &'a ModelFiles, method: &Method, accumulation: usize, dir: &Path) -> Run<'a> {
    let config =
        TrainConfig { epochs: 2, lr: 5e-3, accumulation, eval_every: Some(3), ..TrainConfig::default() };
    let checkpoints = Checkpoints { resume: true, every: Some(2), ..Checkpoints::new(dir) };
    let start = MethodInit::Fresh(method.clone(), Targets::default());
    Run { files, start, dtype: DType::F32, config, checkpoints }
}

/// Trains a LoRA adapter with its head and returns its file.
fn adapter(files: &ModelFiles, lora: &LoraConfig) -> Outcome<Box<AdapterFile>> {
    let dir = tempfile::tempdir()?;
    let (classifier, trained) =
        run(files, &Method::Lora(lora.clone()), 1, &dir.path().join("run")).go(&mut Watch::default())?;
    trained?;
    classifier.save("base", dir.path())?;
    Ok(Box::new(AdapterFile::read(dir.path().join("adapter"))?))
}

#[test]
fn a_run_that_stopped_ends_with_the_bits_of_one_that_did_not() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let lora = LoraConfig { rank: 4, dropout: 0.1, ..LoraConfig::default() };
    let adapter = adapter(&files, &lora)?;
    let bayes = MonteCLoRAConfig { rank: 4, sample_scaler: 0.1, ..MonteCLoRAConfig::default() };
    let adaptive = MonteCLoRAConfig { scaler_schedule: ScalerSchedule::Adaptive, ..bayes.clone() };
    let post_hoc = MethodInit::PostHoc(adapter.clone(), bayes.clone());
    let fresh = |method| MethodInit::Fresh(method, Targets::default());
    // Priors about the initial parameters, which a resumed run does not start from.
    let form = PriorForm::Factors { std_a: 0.1, std_b: 0.1 };
    let prior = Some(Prior { form, temperature: 1.0, shared: false, head_std: Some(0.1) });
    let map = LoraConfig { prior, ..lora.clone() };
    let with_prior = MonteCLoRAConfig { prior, ..bayes.clone() };
    let bayes = fresh(Method::MonteCLoRA(bayes));
    let starts = [
        fresh(Method::Full),
        fresh(Method::Lora(lora)),
        bayes.clone(),
        fresh(Method::MonteCLoRA(adaptive)),
        fresh(Method::Lora(map)),
        fresh(Method::MonteCLoRA(with_prior)),
        fresh(Method::AdaLora(AdaLoraConfig::towards(2))),
        fresh(Method::Blob(BlobConfig { rank: 4, ..BlobConfig::default() })),
        fresh(Method::LoraFa(LoraConfig { rank: 4, ..LoraConfig::default() })),
        fresh(Method::Released(MonteCLoRAConfig {
            rank: 4,
            sample_scaler: 0.1,
            ..MonteCLoRAConfig::released()
        })),
        fresh(Method::Prompt(PromptConfig { virtual_tokens: 3 })),
        MethodInit::Adapter(adapter),
        post_hoc,
    ];
    let single = starts.iter().flat_map(|start| [1, 3].map(|a| (start, a, DType::F32, false)));
    // Half-width bases, with trained parameters in single precision.
    let half = [DType::BF16, DType::F16].map(|dtype| (&bayes, 1, dtype, false));
    let ivon = [1, 3].map(|accumulation| (&starts[1], accumulation, DType::F32, true));
    for (start, accumulation, dtype, ivon) in single.chain(half).chain(ivon) {
        let (whole, parts) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let of = |dir: &Path| {
            let run = run(&files, &start.method(), accumulation, dir);
            let config = TrainConfig { ivon: ivon.then(IvonConfig::default), ..run.config.clone() };
            Run { dtype, start: start.clone(), config, ..run }
        };
        let expected = of(whole.path()).end(&mut Watch::default())?;
        let total = expected.log.len();
        assert_eq!(total, 2 * 11_usize.div_ceil(accumulation));
        let run = of(parts.path());
        // Stops between evaluations and between checkpoints, in both epochs.
        let mut watch = Watch::default();
        for stop in [1, total / 2 - 1, total / 2 + 1, total - 1] {
            watch.stop_after = Some(stop);
            let stopped = run.go(&mut watch)?.1.err().ok_or("it did not stop")?;
            assert!(matches!(stopped, Error::Interrupted { step } if step == stop), "{stopped}");
        }
        watch.stop_after = None;
        let end = run.end(&mut watch)?;
        assert!(watch.done == total - 1 && watch.warnings.is_empty());
        assert!(end == expected, "{start:?} {accumulation} {dtype:?} {ivon}");
        // A finished run that is resumed has nothing left to do.
        let again = run.end(&mut watch)?;
        assert!(again == expected, "{start:?} {accumulation}");
    }
    Ok(())
}

/// The format of checkpoints must not change, whatever is renamed in the code. These were written in November
/// 2026, when settings began to be kept as JSON, by `go` with a stop after step 18. The final parameters are
/// compared to 1e-5, since sums differ between processors.
#[test]
fn a_checkpoint_of_an_earlier_state_of_the_crate_goes_on() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let earlier = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/checkpoints");
    let bayes = MonteCLoRAConfig { rank: 4, sample_scaler: 0.1, ..MonteCLoRAConfig::default() };
    let adaptive = MonteCLoRAConfig { scaler_schedule: ScalerSchedule::Adaptive, ..bayes };
    let targets = Targets { rank_pattern: [("query".to_string(), 2)].into(), ..Targets::default() };
    for (name, method, targets) in [
        ("monteclora", Method::MonteCLoRA(adaptive), targets),
        ("adalora", Method::AdaLora(AdaLoraConfig::towards(2)), Targets::default()),
    ] {
        let parts = tempfile::tempdir()?;
        let (from, to) = (earlier.join(name), parts.path().join("step-00000018"));
        std::fs::create_dir(&to)?;
        for file in ["manifest.json", "state.json", "tensors.safetensors"] {
            std::fs::copy(from.join("step-00000018").join(file), to.join(file))?;
        }
        let run = run(&files, &method, 1, parts.path());
        let run = Run { start: MethodInit::Fresh(method, targets), ..run };
        let mut watch = Watch::default();
        let (classifier, summary) = run.go(&mut watch)?;
        assert_eq!((watch.done, summary?.steps), (18, 22), "{name}");
        let ends = candle_core::safetensors::load(from.join("end.safetensors"), &Device::Cpu)?;
        let params = classifier.params.all();
        assert_eq!(ends.len(), params.len(), "{name}");
        for (key, param) in params {
            let end = ends.get(&key).ok_or(key.clone())?;
            let error = (param.var.as_detached_tensor() - end)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(error < 1e-5, "{name} {key}: {error}");
        }
    }
    Ok(())
}

#[test]
fn a_damaged_checkpoint_costs_the_steps_since_the_one_before() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let (whole, parts) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let method = Method::MonteCLoRA(MonteCLoRAConfig { rank: 4, ..MonteCLoRAConfig::default() });
    let expected = run(&files, &method, 1, whole.path()).end(&mut Watch::default())?;
    let run = run(&files, &method, 1, parts.path());
    let mut watch = Watch { stop_after: Some(14), ..Watch::default() };
    run.go(&mut watch)?.1.err().ok_or("it did not stop")?;
    let newest = parts.path().join("step-00000014/tensors.safetensors");
    let mut bytes = std::fs::read(&newest)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&newest, bytes)?;
    watch.stop_after = None;
    assert!(run.end(&mut watch)? == expected);
    let warnings = &watch.warnings;
    assert!(
        watch.done == 12 && warnings.len() == 1 && warnings[0].contains("damaged-1-step-00000014"),
        "{warnings:?}"
    );
    Ok(())
}

#[test]
fn a_change_of_settings_is_named_and_made_only_if_it_is_meant() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let parts = tempfile::tempdir()?;
    let lora = |rank| Method::Lora(LoraConfig { rank, ..LoraConfig::default() });
    let mut first = run(&files, &lora(4), 1, parts.path());
    first.go(&mut Watch { stop_after: Some(5), ..Watch::default() })?.1.err().ok_or("it did not stop")?;
    let refused = |run: &Run| -> Outcome<String> {
        Ok(run.go(&mut Watch::default())?.1.err().ok_or("it was not refused")?.to_string())
    };
    let config = first.config.clone();
    first.config.lr = 1e-3;
    let error = refused(&first)?;
    assert!(error.contains("invalid lr") && error.contains("had 0.005, this one has 0.001"), "{error}");
    first.checkpoints.changes = vec!["lr".to_string()];
    first.go(&mut Watch { stop_after: Some(9), ..Watch::default() })?.1.err().ok_or("it did not stop")?;
    // From then on the change is one of the run's settings.
    first.checkpoints.changes.clear();
    first.go(&mut Watch { stop_after: Some(10), ..Watch::default() })?.1.err().ok_or("it did not stop")?;

    let other = run(&files, &lora(2), 1, parts.path());
    let other = Run { config: first.config.clone(), ..other };
    assert!(refused(&other)?.contains(r#""rank":2"#));
    let changes = vec!["method".to_string()];
    let other = Run { checkpoints: Checkpoints { changes, ..other.checkpoints.clone() }, ..other };
    assert!(refused(&other)?.contains("shape"));

    let mut short = run(&files, &lora(4), 1, parts.path());
    short.config = TrainConfig { epochs: 1, lr: 1e-3, ..config };
    short.checkpoints.changes = vec!["epochs".to_string(), "accumulation".to_string()];
    short.go(&mut Watch { stop_after: Some(11), ..Watch::default() })?.1?;
    let over = Run { config: TrainConfig { accumulation: 11, ..short.config.clone() }, ..short };
    assert!(refused(&over)?.contains("rows a step takes"));
    Ok(())
}

#[test]
fn other_targets_and_another_dtype_are_other_runs() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    let parts = tempfile::tempdir()?;
    let method = Method::Lora(LoraConfig { rank: 4, ..LoraConfig::default() });
    let first = run(&files, &method, 1, parts.path());
    first.go(&mut Watch { stop_after: Some(2), ..Watch::default() })?.1.err().ok_or("it did not stop")?;
    // The same shapes, another scale.
    let alpha_pattern = [("query".to_string(), 1.0)].into();
    let targets = Targets { alpha_pattern, ..Targets::default() };
    let start = MethodInit::Fresh(method.clone(), targets);
    for (other, name) in [
        (Run { start, ..run(&files, &method, 1, parts.path()) }, "targets"),
        (Run { dtype: DType::BF16, ..run(&files, &method, 1, parts.path()) }, "dtype"),
    ] {
        let error = other.go(&mut Watch::default())?.1.err().ok_or("it was not refused")?.to_string();
        assert!(error.starts_with(&format!("invalid {name}: the run in")), "{error}");
    }
    Ok(())
}
