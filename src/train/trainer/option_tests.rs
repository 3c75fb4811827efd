//! What single options of a run change.

use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};

use super::tests::{config, Line, Log};
use super::*;
use crate::adapter::{Context, Init, Pass, Role};
use crate::noise::Noise;
use crate::optim::IvonConfig;
use crate::train::Loss;

/// The sum of all parameters times a factor; notes the draws that it is asked at.
struct Sum {
    params: Params,
    factor: f64,
    dtype: DType,
    batches: usize,
    draws: Mutex<Vec<u64>>,
}

impl Sum {
    fn new(roles: &[Role]) -> Result<Self> {
        let params = Params::with_dtype(Noise::new(1), DType::F64, &Device::Cpu);
        for (i, role) in roles.iter().enumerate() {
            params.create(&format!("p{i}"), *role, 1, &Init::Constant(0.0))?;
        }
        Ok(Self { params, factor: 1.0, dtype: DType::F64, batches: 1, draws: Mutex::default() })
    }

    fn values(&self) -> Result<Vec<f64>> {
        self.params.all().into_iter().map(|(_, param)| Ok(param.var.to_vec1::<f64>()?[0])).collect()
    }
}

impl Objective for Sum {
    fn epoch(&self, _: u64) -> Result<Vec<Vec<usize>>> {
        Ok((0..self.batches).map(|row| vec![row]).collect())
    }

    fn loss(&self, _: &[usize], cx: &Context) -> Result<Loss> {
        if let Pass::Train { draw } = cx.pass {
            self.draws.lock().map_err(|_| Error::config("draws", "poisoned"))?.push(draw);
        }
        let all = self.params.all();
        let scaled = all.iter().map(|(_, p)| p.var.to_dtype(self.dtype)?.to_dtype(DType::F64));
        let sum = Tensor::stack(&scaled.collect::<candle_core::Result<Vec<_>>>()?, 0)?.sum_all()?;
        let task = (sum * self.factor)?;
        Ok(Loss { total: task.clone(), terms: vec![("task", task)] })
    }
}

#[test]
fn each_role_has_its_own_multiple_of_the_learning_rate() -> Result<()> {
    let sum = Sum::new(&[Role::A, Role::B, Role::Head, Role::LogStd, Role::Concentration])?;
    let config = TrainConfig {
        epochs: 1,
        warmup_ratio: 0.0,
        loraplus_ratio: 2.0,
        head_lr_ratio: 3.0,
        variational_lr_ratio: 5.0,
        ..config()
    };
    fit(&sum, &sum.params, &config, &mut Log::default())?;
    // Adam's first step is the learning rate, up to its eps of 1e-8.
    for (value, ratio) in sum.values()?.into_iter().zip([1.0, 2.0, 3.0, 5.0, 5.0]) {
        assert!((value + config.lr * ratio).abs() < 1e-8, "{value} for {ratio}");
    }
    Ok(())
}

#[test]
fn micro_batches_have_draws_of_their_own_and_no_two_steps_share_one() -> Result<()> {
    // Three batches an epoch, two a step: steps of two, one, two and one.
    for (shared_draw, expected) in [(false, [0, 1, 2, 3, 4, 5]), (true, [0, 0, 1, 2, 2, 3])] {
        let sum = Sum { batches: 3, ..Sum::new(&[Role::A])? };
        let config = TrainConfig { epochs: 2, accumulation: 2, shared_draw, ..config() };
        fit(&sum, &sum.params, &config, &mut Log::default())?;
        assert_eq!(*sum.draws.lock().unwrap(), expected);
    }
    Ok(())
}

#[test]
fn the_constants_of_adamw_are_those_of_the_settings() -> Result<()> {
    let run = |config: TrainConfig| -> Result<f64> {
        let line = Line::new(5)?;
        line.fit(&config)?;
        line.value()
    };
    let plain = run(config())?;
    for other in [
        TrainConfig { adam_beta1: 0.5, ..config() },
        TrainConfig { adam_beta2: 0.9, ..config() },
        TrainConfig { adam_eps: 1.0, ..config() },
    ] {
        assert!((run(other.clone())? - plain).abs() > 1e-6, "{other:?}");
    }
    // The line's only parameter is a vector.
    let decay = TrainConfig { weight_decay: 0.5, ..config() };
    assert_ne!(run(decay.clone())?, plain);
    assert_eq!(run(TrainConfig { decay_vectors: false, ..decay })?, plain);
    let error = run(TrainConfig { adam_beta2: 1.0, ..config() }).unwrap_err().to_string();
    assert!(error.starts_with("invalid beta2"), "{error}");
    Ok(())
}

#[test]
fn settings_at_their_defaults_are_not_in_a_checkpoint() {
    let new = ["max_steps", "adam_beta1", "adam_beta2", "adam_eps", "decay_vectors"];
    let settings = config().settings();
    assert!(new.iter().all(|name| !settings.contains_key(*name)), "{settings:?}");
    let other = TrainConfig {
        max_steps: Some(7),
        adam_beta1: 0.8,
        adam_beta2: 0.98,
        adam_eps: 1e-6,
        decay_vectors: false,
        ..config()
    };
    let settings = other.settings();
    assert_eq!(new.map(|name| settings[name].as_str()), ["7", "0.8", "0.98", "1e-6", "false"]);
}

#[test]
fn a_run_ends_at_its_largest_number_of_steps_which_its_schedule_spans() -> Result<()> {
    // Two steps an epoch.
    let (summary, log) = Line::new(5)?.fit(&TrainConfig { max_steps: Some(3), ..config() })?;
    assert_eq!((summary.steps, summary.stopped_early, log.evaluated.as_slice()), (3, false, &[2, 3][..]));
    let lr = |log: &Log| log.records.iter().map(|record| record.lr).collect::<Vec<_>>();
    let third = config().lr / 3.0;
    let expected = [0.0, 3.0 * third, 1.5 * third]; // one of three steps warms up
    assert!(lr(&log).iter().zip(expected).all(|(lr, expected)| (lr - expected).abs() < 1e-12), "{log:?}");
    let (whole, _) = Line::new(5)?.fit(&TrainConfig { max_steps: Some(100), ..config() })?;
    assert_eq!(whole.steps, 8);
    let error = Line::new(5)?.fit(&TrainConfig { max_steps: Some(0), ..config() }).unwrap_err().to_string();
    assert!(error.starts_with("invalid max_steps"), "{error}");

    // One that has ended takes no further step when it is resumed.
    let (dir, line) = (tempfile::tempdir().unwrap(), Line::new(5)?);
    let capped = TrainConfig { max_steps: Some(3), ..config() };
    let go = |config: &TrainConfig, resume| {
        let checkpoints = Checkpoints { resume, ..Checkpoints::new(dir.path()) };
        let mut log = Log::default();
        fit_with_checkpoints(&line, &line.params, config, &mut log, &checkpoints)
            .map(|done| (done.steps, log))
    };
    assert_eq!(go(&capped, false)?.0, 3);
    let (steps, log) = go(&capped, true)?;
    assert_eq!((steps, log.records.len()), (3, 0));
    Ok(())
}

#[test]
fn scores_of_other_rows_or_another_metric_are_forgotten() -> Result<()> {
    let go = |changes: &[&str], settings: &[(&str, &str)]| -> Result<(Summary, Log)> {
        let (dir, line) = (tempfile::tempdir().unwrap(), Line::new(5)?);
        let of = |pairs: &[(&str, &str)]| -> Settings {
            pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
        };
        let settings = [of(&[("held_out", "a"), ("metric", "accuracy")]), of(settings)];
        let [first, then] = settings.map(|settings| Checkpoints {
            resume: true,
            settings,
            changes: changes.iter().map(ToString::to_string).collect(),
            ..Checkpoints::new(dir.path())
        });
        // The first two evaluations are better than all later ones.
        let config = TrainConfig { patience: Some(2), ..config() };
        let mut log = Log { scores: vec![0.9, 0.8, 0.8], ..Log::default() };
        let ended = fit_with_checkpoints(&line, &line.params, &config, &mut log, &first)?;
        assert_eq!((ended.steps, ended.kept_step, ended.stopped_early), (6, 2, true));
        let mut log = Log { scores: vec![0.1], ..Log::default() };
        Ok((fit_with_checkpoints(&line, &line.params, &config, &mut log, &then)?, log))
    };
    let (same, log) = go(&[], &[("held_out", "a"), ("metric", "accuracy")])?;
    assert_eq!((same.steps, same.kept_step, log.warned.len()), (6, 2, 0));
    for (changes, settings) in [
        (&["metric"][..], &[("held_out", "a"), ("metric", "f1")][..]),
        (&["metric"], &[("held_out", "a")]),
        (&["held_out"], &[("held_out", "b"), ("metric", "accuracy")]),
    ] {
        let (other, log) = go(changes, settings)?;
        assert_eq!((other.steps, other.kept_step, other.stopped_early), (8, 8, false), "{changes:?}");
        assert_eq!(log.warned.len(), 1);
        assert!(log.warned[0].contains(&format!("before the change of {}", changes[0])), "{log:?}");
    }
    Ok(())
}

#[test]
fn patience_counts_evaluations_in_a_row() -> Result<()> {
    let line = Line::new(5)?;
    let mut log = Log { scores: vec![0.5, 0.4, 0.6, 0.5, 0.7, 0.6, 0.8], ..Log::default() };
    let config = TrainConfig { epochs: 7, patience: Some(2), ..config() };
    let summary = fit(&line, &line.params, &config, &mut log)?;
    assert_eq!((summary.stopped_early, summary.kept_step, summary.steps), (false, 14, 14));
    Ok(())
}

#[test]
fn ivon_takes_no_notice_of_the_norm_that_gradients_are_clipped_to() -> Result<()> {
    let run = |clip| -> Result<u64> {
        let line = Line::new(5)?;
        let ivon = Some(IvonConfig { ess: 1e3, initial_hessian: 1.0, ..IvonConfig::default() });
        line.fit(&TrainConfig { clip, ivon, ..config() })?;
        Ok(line.value()?.to_bits())
    };
    assert_eq!(run(Some(1e-3))?, run(None)?);
    Ok(())
}

#[test]
fn a_scaled_loss_keeps_gradients_that_half_precision_would_lose() -> Result<()> {
    let norm = |loss_scale, dtype| -> Result<f64> {
        let sum = Sum { factor: 1e-8, dtype, ..Sum::new(&[Role::A])? };
        let mut log = Log::default();
        fit(&sum, &sum.params, &TrainConfig { epochs: 1, loss_scale, ..config() }, &mut log)?;
        Ok(log.records[0].grad_norm)
    };
    // The least number above zero in half precision is 6e-8.
    assert_eq!(norm(1.0, DType::F16)?, 0.0);
    assert!((norm(1024.0, DType::F16)? / 1e-8 - 1.0).abs() < 0.01);
    assert_eq!(norm(1024.0, DType::F64)?, norm(1.0, DType::F64)?);
    // Micro-batches with it are one large batch as without.
    let (small, big) = (Line::new(2)?, Line::new(4)?);
    small.fit(&TrainConfig { accumulation: 2, loss_scale: 1024.0, ..config() })?;
    big.fit(&config())?;
    assert!((small.value()? - big.value()?).abs() < 1e-12);
    Ok(())
}

#[test]
fn what_would_train_nothing_or_the_wrong_way_is_refused_before_the_first_step() -> Result<()> {
    let line = Line::new(3)?;
    let text = |config| line.fit(&config).err().map(|error| error.to_string()).unwrap_or_default();
    let ivon = Some(IvonConfig::default());
    assert!(text(TrainConfig { lr: -0.1, ivon: ivon.clone(), ..config() }).starts_with("invalid lr"));
    assert!(text(TrainConfig { clip: Some(f64::NAN), ..config() }).starts_with("invalid clip"));
    assert!(text(TrainConfig { loss_scale: 0.0, ..config() }).starts_with("invalid loss_scale"));
    assert!(text(TrainConfig { loss_scale: 2.0, ivon, ..config() }).starts_with("invalid loss_scale"));
    line.params.set_trainable(Role::Base, false);
    assert_eq!(text(config()), "invalid params: no parameter is trainable");
    assert_eq!(line.value()?, 0.0);
    Ok(())
}
