//! A method's hooks between steps are called by the objectives of classifiers and of language models.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use monteclora::adapters::BlobConfig;
use monteclora::data::batch::Batcher;
use monteclora::data::encode::Encoded;
use monteclora::data::task::Label;
use monteclora::inject::Targets;
use monteclora::optim::Gradients;
use monteclora::train::{
    fit, CausalTuning, Classification, Classifier, Method, MethodHooks, MethodInit, Objective, StepDone,
    TrainConfig,
};
use monteclora::{MonteCLoRAConfig, Noise, Params, Pass, ReleasedWalk, ScalerSchedule};

use crate::causal;
use crate::support::checkpoints::{checkpoint, rows, Log};
use crate::support::decoders::{frozen, toy_config};
use crate::support::{scatter, Outcome};

/// A configuration with a learning rate of 0: all changes come from the method, none from the optimiser.
fn still() -> TrainConfig {
    TrainConfig { epochs: 1, lr: 0.0, weight_decay: 0.0, keep_best: false, ..TrainConfig::default() }
}

fn classifier(method: &Method) -> Outcome<Classifier> {
    let dir = tempfile::tempdir()?;
    let start = MethodInit::Fresh(method.clone(), Targets::default());
    let files = checkpoint(dir.path())?;
    Ok(Classifier::load(&files, 2, &start, Noise::new(4), DType::F32, &Device::Cpu)?)
}

fn run(classifier: &Classifier, rows: &[Encoded], batch: usize, config: &TrainConfig) -> Outcome<Log> {
    let objective = Classification::new(classifier, rows, Batcher::new(batch, false, Noise::new(4))?);
    let mut log = Log::default();
    fit(&objective, &classifier.params, config, &mut log)?;
    Ok(log)
}

fn bits(params: &Params) -> Outcome<Vec<(String, Vec<u32>)>> {
    let bits = |(name, param): (String, monteclora::adapter::Param)| -> Outcome<(String, Vec<u32>)> {
        let values = param.var.flatten_all()?.to_vec1::<f32>()?;
        Ok((name, values.into_iter().map(f32::to_bits).collect()))
    };
    params.all().into_iter().map(bits).collect()
}

#[test]
fn the_released_code_s_walk_takes_its_step_before_the_optimiser() -> Outcome {
    let config = MonteCLoRAConfig { rank: 4, ..MonteCLoRAConfig::released() };
    let method = Method::Released(config.clone());
    let (ran, by_hand) = (classifier(&method)?, classifier(&method)?);
    let start = bits(&ran.params)?;
    let walk = ReleasedWalk::new(by_hand.model.as_ref(), &config, &by_hand.params)?;
    run(&ran, &rows(4, false), 4, &still())?;
    walk.before_step(1)?;
    assert_eq!(bits(&ran.params)?, bits(&by_hand.params)?);
    let moved = bits(&ran.params)?.into_iter().zip(start).filter(|(now, then)| now != then);
    assert!(moved.map(|((name, _), _)| name).all(|name| name.ends_with(".a")));
    assert_ne!(bits(&ran.params)?, bits(&classifier(&method)?.params)?);
    Ok(())
}

#[test]
fn blob_descends_by_the_labelled_rows_and_the_batch_size() -> Outcome {
    // A large rate, so that an error in any of its factors shows.
    let config = BlobConfig { rank: 4, kl_lr: 0.5, ..BlobConfig::default() };
    let method = Method::Blob(config.clone());
    let (ran, by_hand) = (classifier(&method)?, classifier(&method)?);
    let mut rows = rows(10, false);
    rows[3].label = Label::Unknown;
    // Few steps a cycle, three of which are taken.
    run(&ran, &rows, 50, &TrainConfig { epochs: 3, ..still() })?;
    let hooks = MethodHooks::of_blob(&config);
    let (model, params, gradients) = (by_hand.model.as_ref(), &by_hand.params, &Gradients::new());
    for step in 1..=3 {
        hooks.after_step(&StepDone { model, params, gradients, step, total: 3, rows: 9, batch_size: 50 })?;
    }
    assert_eq!(bits(&ran.params)?, bits(&by_hand.params)?);
    assert_ne!(bits(&ran.params)?, bits(&classifier(&method)?.params)?);
    Ok(())
}

#[test]
fn training_draws_are_as_wide_as_the_schedule_says() -> Outcome {
    let first_loss = |sample_scaler: f64, scaler_schedule| -> Outcome<f64> {
        let config =
            MonteCLoRAConfig { rank: 4, sample_scaler, scaler_schedule, ..MonteCLoRAConfig::default() };
        let classifier = classifier(&Method::MonteCLoRA(config))?;
        scatter(&classifier.params)?; // with B at zero a draw has no effect
        Ok(run(&classifier, &rows(16, false), 4, &still())?.0[0].terms["task"])
    };
    // Of four steps with this warm-up the first has half of the width.
    let warm = first_loss(0.3, ScalerSchedule::Warmup(0.5))?;
    let (half, whole) =
        (first_loss(0.15, ScalerSchedule::Constant)?, first_loss(0.3, ScalerSchedule::Constant)?);
    assert!((warm - half).abs() < 1e-6 && (warm - whole).abs() > 1e-4, "{warm} {half} {whole}");
    Ok(())
}

#[test]
fn a_language_model_s_run_asks_for_it_as_well() -> Outcome {
    let (seen, batcher) = (causal::rows(10), || Batcher::new(50, false, Noise::new(4)));
    let blob = BlobConfig { rank: 4, kl_lr: 0.5, ..BlobConfig::default() };
    let load = |method: &Method| -> Outcome<_> {
        let (mut model, params) = frozen(&toy_config(false)?, DType::F32)?;
        let start = MethodInit::Fresh(method.clone(), Targets::parse("all-linear")?);
        let hooks = start.inject(&mut model, &params)?;
        Ok((model, params, hooks))
    };
    let method = Method::Blob(blob.clone());
    let ((ran, params, hooks), (by_hand, expected, _)) = (load(&method)?, load(&method)?);
    let objective = CausalTuning::new(&ran, hooks, &seen, batcher()?, 0);
    fit(&objective, &params, &TrainConfig { epochs: 3, ..still() }, &mut Log::default())?;
    let hooks = MethodHooks::of_blob(&blob);
    let (model, gradients) = (&by_hand, &Gradients::new());
    for step in 1..=3 {
        let params = &expected;
        hooks.after_step(&StepDone { model, params, gradients, step, total: 3, rows: 10, batch_size: 50 })?;
    }
    assert_eq!(bits(&params)?, bits(&expected)?);

    // The state of the hooks is kept in checkpoints.
    let adaptive =
        MonteCLoRAConfig { rank: 4, scaler_schedule: ScalerSchedule::Adaptive, ..Default::default() };
    let method = Method::MonteCLoRA(adaptive);
    let ((ran, params, hooks), (fresh, _, other)) = (load(&method)?, load(&method)?);
    let objective = CausalTuning::new(&ran, hooks, &seen, batcher()?, 0);
    let moving = TrainConfig { epochs: 3, lr: 1e-2, keep_best: false, ..TrainConfig::default() };
    fit(&objective, &params, &moving, &mut Log::default())?;
    let resumed = CausalTuning::new(&fresh, other, &seen, batcher()?, 0);
    let state = objective.state()?;
    assert!(resumed.state()?.is_empty() && !state.is_empty());
    resumed.restore(&state)?;
    let numbers = |state: &BTreeMap<String, Tensor>| -> Outcome<Vec<_>> {
        state.iter().map(|(name, seen)| Ok((name.clone(), seen.to_vec1::<f64>()?))).collect()
    };
    assert_eq!(numbers(&resumed.state()?)?, numbers(&state)?);
    // The factors follow from it.
    let (fresh, _, hooks) = load(&method)?;
    let factors = || hooks.context(&Pass::Train { draw: 0 }.into()).map(|cx| cx.scaler_factors);
    let before = factors()?;
    hooks.restore(&fresh, &state)?;
    assert_ne!(before, factors()?);
    Ok(())
}
