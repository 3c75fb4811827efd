//! The training loop on a line fitted to ten points.

use candle_core::{DType, Device};

use super::*;
use crate::adapter::{Context, Init, Role};
use crate::noise::{Noise, Purpose};
use crate::optim::IvonConfig;
use crate::train::Loss;

/// Fits w to rows x, y with y = 2 x + noise; row `poison` has an infinite target.
pub(super) struct Line {
    pub params: Params,
    w: Tensor,
    batch: usize,
    poison: Option<usize>,
}

const ROWS: usize = 10;

impl Line {
    pub fn new(batch: usize) -> Result<Self> {
        let params = Params::with_dtype(Noise::new(1), DType::F64, &Device::Cpu);
        let w = params.create("w", Role::Base, 1, &Init::Constant(0.0))?;
        Ok(Self { params, w, batch, poison: None })
    }

    pub fn fit(&self, config: &TrainConfig) -> Result<(Summary, Log)> {
        let mut log = Log::default();
        Ok((fit(self, &self.params, config, &mut log)?, log))
    }

    pub fn value(&self) -> Result<f64> {
        Ok(self.w.to_vec1::<f64>()?[0])
    }
}

impl Objective for Line {
    fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>> {
        let order = Noise::new(3).stream("data", Purpose::Shuffle).permutation(epoch, ROWS);
        Ok(order.chunks(self.batch).map(<[usize]>::to_vec).collect())
    }

    fn loss(&self, rows: &[usize], _: &Context) -> Result<Loss> {
        let xs: Vec<f64> = rows.iter().map(|i| 1.0 + *i as f64 / 4.0).collect();
        let ys: Vec<f64> = rows
            .iter()
            .zip(&xs)
            .map(|(i, x)| if self.poison == Some(*i) { f64::INFINITY } else { 2.0 * x + (*i % 3) as f64 })
            .collect();
        let n = rows.len();
        let (xs, ys) = (Tensor::from_vec(xs, n, &Device::Cpu)?, Tensor::from_vec(ys, n, &Device::Cpu)?);
        let task = (xs.broadcast_mul(&self.w)? - ys)?.sqr()?.mean_all()?;
        Ok(Loss { total: task.clone(), terms: vec![("task", task)] })
    }
}

#[derive(Debug, Default)]
pub(super) struct Log {
    pub records: Vec<StepRecord>,
    pub scores: Vec<f64>,
    pub evaluated: Vec<usize>,
    pub kept: Vec<usize>,
    pub warned: Vec<String>,
}

impl Observer for Log {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.records.push(record.clone());
        Ok(())
    }

    fn evaluate(&mut self, step: usize) -> Result<Option<f64>> {
        self.evaluated.push(step);
        Ok(self.scores.get(self.evaluated.len() - 1).copied())
    }

    fn kept(&mut self, step: usize) -> Result<()> {
        self.kept.push(step);
        Ok(())
    }

    fn warned(&mut self, what: &str) {
        self.warned.push(what.to_string());
    }
}

pub(super) fn config() -> TrainConfig {
    TrainConfig { epochs: 4, lr: 0.1, weight_decay: 0.0, clip: None, ..Default::default() }
}

#[test]
fn accumulated_micro_batches_are_one_big_batch() -> Result<()> {
    // Ten rows: steps of 4, 4 and 2 rows; the last step has a single micro-batch.
    let (small, big) = (Line::new(2)?, Line::new(4)?);
    let (summary, log) = small.fit(&TrainConfig { accumulation: 2, ..config() })?;
    let (_, whole) = big.fit(&config())?;
    assert_eq!((summary.steps, log.records.len(), log.evaluated.as_slice()), (12, 12, &[3, 6, 9, 12][..]));
    for (one, other) in log.records.iter().zip(&whole.records) {
        assert!((one.loss - other.loss).abs() < 1e-12 && (one.grad_norm - other.grad_norm).abs() < 1e-12);
        assert_eq!((one.step, one.lr, one.epoch), (other.step, other.lr, other.epoch));
    }
    assert!((small.value()? - big.value()?).abs() < 1e-12);
    Ok(())
}

#[test]
fn the_same_run_gives_the_same_numbers() -> Result<()> {
    let (one, other) = (Line::new(3)?, Line::new(3)?);
    assert_eq!(one.fit(&config())?.1.records, other.fit(&config())?.1.records);
    assert_eq!(one.value()?.to_bits(), other.value()?.to_bits());
    Ok(())
}

#[test]
fn the_best_evaluation_is_kept_where_it_is_asked_for() -> Result<()> {
    let run = |keep_best| -> Result<(f64, usize, Vec<usize>)> {
        let line = Line::new(5)?;
        let mut log = Log { scores: vec![0.1, 0.9, 0.3, 0.9], ..Log::default() };
        let summary = fit(&line, &line.params, &TrainConfig { keep_best, ..config() }, &mut log)?;
        Ok((line.value()?, summary.kept_step, log.kept))
    };
    let ((best, best_step, kept), (last, last_step, all)) = (run(true)?, run(false)?);
    assert_eq!((best_step, last_step), (4, 8));
    assert!(best < last, "{best} {last}");
    // Parameters that may be saved on the way: of each new best, or of each evaluation.
    assert_eq!((kept.as_slice(), all.as_slice()), (&[2, 4][..], &[2, 4, 6, 8][..]));
    Ok(())
}

#[test]
fn the_parameters_that_are_kept_are_the_present_ones_and_a_full_disk_ends_the_run() -> Result<()> {
    /// Records the value at each new best, and fails to save the second.
    struct Saves<'a>(&'a Line, Vec<f64>);
    impl Observer for Saves<'_> {
        fn step(&mut self, _: &StepRecord) -> Result<()> {
            Ok(())
        }
        fn evaluate(&mut self, step: usize) -> Result<Option<f64>> {
            Ok(Some(step as f64))
        }
        fn kept(&mut self, _: usize) -> Result<()> {
            self.1.push(self.0.value()?);
            match self.1.len() {
                2 => Err(Error::config("disk", "full")),
                _ => Ok(()),
            }
        }
    }
    let line = Line::new(5)?;
    let mut observer = Saves(&line, Vec::new());
    let error = fit(&line, &line.params, &config(), &mut observer).map(|s| s.steps).unwrap_err();
    assert!(error.to_string().contains("disk"), "{error}");
    // The second best is restored although saving it failed.
    assert_eq!((observer.1.len(), line.value()?), (2, observer.1[1]));
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_is_named_though_the_loss_is_finite() -> Result<()> {
    struct Root(Params, Tensor);
    impl Objective for Root {
        fn epoch(&self, _: u64) -> Result<Vec<Vec<usize>>> {
            Ok(vec![vec![4, 2]])
        }
        fn loss(&self, _: &[usize], _: &Context) -> Result<Loss> {
            let task = self.1.sqrt()?.sum_all()?; // 0, with an infinite slope
            Ok(Loss { total: task.clone(), terms: vec![("task", task)] })
        }
    }
    for clip in [None, Some(1.0)] {
        let line = Line::new(5)?;
        let root = Root(line.params.clone(), line.w.clone());
        let outcome = fit(&root, &root.0, &TrainConfig { clip, ..config() }, &mut Log::default());
        let error = outcome.map(|s| s.steps).unwrap_err().to_string();
        assert_eq!(error, "step 1: gradient of w is inf; batch rows [4, 2]");
        assert_eq!(line.value()?, 0.0);
    }
    Ok(())
}

#[test]
fn the_posterior_is_decayed_where_it_is_asked_for() -> Result<()> {
    for (decay_variational, expected) in [(false, 1.0), (true, 0.95)] {
        struct Flat(Params);
        impl Objective for Flat {
            fn epoch(&self, _: u64) -> Result<Vec<Vec<usize>>> {
                Ok(vec![vec![0]])
            }
            fn loss(&self, _: &[usize], _: &Context) -> Result<Loss> {
                let all = self.0.all().into_iter().map(|(_, param)| param.var.affine(1e-30, 0.0));
                let task = Tensor::stack(&all.collect::<candle_core::Result<Vec<_>>>()?, 0)?.sum_all()?;
                Ok(Loss { total: task.clone(), terms: vec![("task", task)] })
            }
        }
        let params = Params::with_dtype(Noise::new(1), DType::F64, &Device::Cpu);
        for (name, role) in [("rho", Role::LogStd), ("c", Role::Concentration)] {
            params.create(name, role, 1, &Init::Constant(1.0))?;
        }
        let train =
            TrainConfig { epochs: 1, weight_decay: 0.5, decay_variational, warmup_ratio: 0.0, ..config() };
        fit(&Flat(params.clone()), &params, &train, &mut Log::default())?;
        for (name, param) in params.all() {
            let value = param.var.to_vec1::<f64>()?[0];
            assert!((value - expected).abs() < 1e-12, "{name}: {value}");
        }
    }
    Ok(())
}

#[test]
fn a_non_finite_loss_stops_the_run_and_names_its_cause() -> Result<()> {
    let mut line = Line::new(3)?;
    line.poison = Some(7);
    let mut log = Log::default();
    let error = fit(&line, &line.params, &config(), &mut log).unwrap_err();
    let Error::NonFinite { step, term, rows, .. } = &error else { panic!("{error}") };
    assert_eq!((term.as_str(), rows.contains(&7)), ("task", true));
    assert_eq!(*step, log.records.len() + 1);
    assert!(line.value()?.is_finite());
    let text = error.to_string();
    assert!(text.contains(&format!("step {step}: task is inf; batch rows")), "{text}");
    Ok(())
}

#[test]
fn options_outside_their_domain_are_named() -> Result<()> {
    let line = Line::new(3)?;
    let text = |config| line.fit(&config).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(text(TrainConfig { epochs: 0, ..config() }).contains("epochs"));
    assert!(text(TrainConfig { accumulation: 0, ..config() }).contains("accumulation"));
    assert!(text(TrainConfig { warmup_ratio: 1.5, ..config() }).contains("warmup_ratio"));
    assert!(text(TrainConfig { lr: f64::NAN, ..config() }).contains("lr"));
    assert!(text(TrainConfig { eval_every: Some(0), ..config() }).contains("eval_every"));
    assert!(text(TrainConfig { weight_decay: -0.1, ..config() }).contains("weight_decay"));
    assert!(text(TrainConfig { clip: Some(0.0), ..config() }).contains("clip"));
    // 4 steps per epoch: the product overflows, and a list of that many steps would not fit into memory.
    let error = text(TrainConfig { epochs: usize::MAX, ..config() });
    assert!(error.starts_with("invalid epochs: ") && error.contains("of 4 steps"), "{error}");
    assert_eq!(line.value()?, 0.0);
    Ok(())
}

#[test]
fn no_data_is_an_error_rather_than_a_run_of_no_steps() -> Result<()> {
    struct Nothing;
    impl Objective for Nothing {
        fn epoch(&self, _: u64) -> Result<Vec<Vec<usize>>> {
            Ok(Vec::new())
        }
        fn loss(&self, rows: &[usize], _: &Context) -> Result<Loss> {
            Err(Error::config("rows", format!("{rows:?}")))
        }
    }
    let line = Line::new(3)?;
    let error = fit(&Nothing, &line.params, &config(), &mut Log::default()).map(|s| s.steps);
    assert!(error.is_err_and(|error| error.to_string() == "invalid data: there is no batch to train on"));
    Ok(())
}

#[test]
fn a_score_that_is_no_number_never_counts_as_the_best() -> Result<()> {
    let line = Line::new(5)?;
    let mut log = Log { scores: vec![f64::NAN, 0.2, 0.9, f64::NAN], ..Log::default() };
    let summary = fit(&line, &line.params, &config(), &mut log)?;
    assert_eq!(summary.kept_step, 6);
    Ok(())
}

#[test]
fn whatever_ends_a_run_the_best_parameters_are_put_back() -> Result<()> {
    /// Scores the first evaluation best and fails at the third.
    struct Fails(Vec<f64>, Params);
    impl Observer for Fails {
        fn step(&mut self, _: &StepRecord) -> Result<()> {
            Ok(())
        }
        fn evaluate(&mut self, _: usize) -> Result<Option<f64>> {
            let w = self.1.get("w").map(|w| w.var.as_tensor().to_vec1::<f64>()).transpose()?;
            self.0.push(w.map_or(f64::NAN, |w| w[0]));
            match self.0.len() {
                3 => Err(Error::config("disk", "full")),
                n => Ok(Some(-(n as f64))),
            }
        }
    }
    let line = Line::new(5)?;
    let mut observer = Fails(Vec::new(), line.params.clone());
    let error = fit(&line, &line.params, &config(), &mut observer).map(|s| s.steps).unwrap_err();
    assert!(error.to_string().contains("disk"), "{error}");
    assert_eq!(line.value()?, observer.0[0]);
    assert_ne!(observer.0[0], observer.0[2]);
    Ok(())
}

#[test]
fn epochs_of_several_lengths_are_refused() -> Result<()> {
    struct Shrinks(Line);
    impl Objective for Shrinks {
        fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>> {
            Ok(self.0.epoch(0)?.split_off(epoch as usize))
        }
        fn loss(&self, rows: &[usize], cx: &Context) -> Result<Loss> {
            self.0.loss(rows, cx)
        }
    }
    let objective = Shrinks(Line::new(3)?);
    let error = fit(&objective, &objective.0.params, &config(), &mut Log::default()).map(|s| s.steps);
    assert!(error.is_err_and(|e| e.to_string().contains("epoch 1 has 3 steps, the first had 4")));
    Ok(())
}

#[test]
fn a_step_that_is_not_finite_may_be_skipped_and_is_counted() -> Result<()> {
    #[derive(Default)]
    struct Skips(Log, Vec<(usize, String)>);
    impl Observer for Skips {
        fn step(&mut self, record: &StepRecord) -> Result<()> {
            self.0.step(record)
        }
        fn evaluate(&mut self, _: usize) -> Result<Option<f64>> {
            Ok(None)
        }
        fn skipped(&mut self, step: usize, why: &Error) -> Result<()> {
            self.1.push((step, why.to_string()));
            Ok(())
        }
    }
    let config = TrainConfig { on_nonfinite: OnNonFinite::Skip, ..config() };
    // One of an epoch's two steps contains the row.
    let line = Line { poison: Some(3), ..Line::new(5)? };
    let mut watch = Skips::default();
    let summary = fit(&line, &line.params, &config, &mut watch)?;
    assert_eq!((summary.steps, summary.skipped), (8, 4));
    let mut steps: Vec<usize> = watch.0.records.iter().map(|record| record.step).collect();
    assert_eq!((steps.len(), watch.1.len()), (4, 4));
    steps.extend(watch.1.iter().map(|(step, _)| step));
    steps.sort_unstable();
    assert_eq!(steps, (1..=8).collect::<Vec<_>>());
    assert!(watch.1.iter().all(|(_, why)| why.contains("task is inf; batch rows") && why.contains('3')));
    assert!(line.value()?.is_finite() && line.value()? != 0.0);

    // Every step contains the row: the run ends.
    let line = Line { poison: Some(3), ..Line::new(10)? };
    let mut watch = Skips::default();
    let error = fit(&line, &line.params, &TrainConfig { epochs: 30, ..config }, &mut watch).unwrap_err();
    assert!(matches!(error, Error::NonFinite { step: MAX_SKIPPED, .. }), "{error}");
    assert_eq!((watch.1.len(), line.value()?), (MAX_SKIPPED, 0.0));
    Ok(())
}

#[test]
fn under_ivon_losses_are_at_draws_and_the_mean_comes_back_wherever_they_end() -> Result<()> {
    let ivon = IvonConfig { ess: 1e3, initial_hessian: 1.0, ..IvonConfig::default() };
    let config = TrainConfig { epochs: 60, lr: 0.05, ivon: Some(ivon), clip: None, ..TrainConfig::default() };
    let plain = TrainConfig { ivon: None, ..config.clone() };
    let (line, other) = (Line::new(ROWS)?, Line::new(ROWS)?);
    let ((_, drawn), (_, mean)) = (line.fit(&config)?, other.fit(&plain)?);
    // The first step starts from the same w; its draw has the standard deviation 1 / sqrt(1e3).
    let off = (drawn.records[0].loss - mean.records[0].loss).abs();
    assert!(off > 1e-4 && off < 3.0, "{off}");
    assert!((line.value()? - other.value()?).abs() < 0.3, "{} and {}", line.value()?, other.value()?);
    assert!(line.value()? > 1.0);
    // A non-finite loss at a draw.
    let mut line = Line::new(ROWS)?;
    line.poison = Some(4);
    let error = line.fit(&config).map(drop).expect_err("an infinite loss");
    assert!(matches!(error, Error::NonFinite { step: 1, .. }), "{error}");
    assert_eq!(line.value()?, 0.0);
    Ok(())
}

#[test]
fn evaluations_that_get_no_better_end_the_run_well_and_for_good() -> Result<()> {
    let dir = tempfile::tempdir().map_err(Error::io("a folder"))?;
    let checkpoints = |resume| Checkpoints { resume, ..Checkpoints::new(dir.path()) };
    let config = TrainConfig { epochs: 9, patience: Some(2), ..config() };
    let scores = vec![0.1, 0.9, f64::NAN, 0.9, 1.0];
    let (line, mut log) = (Line::new(5)?, Log { scores, ..Log::default() });
    let summary = fit_with_checkpoints(&line, &line.params, &config, &mut log, &checkpoints(false))?;
    // Two steps per epoch: the second evaluation is the best, the third is NaN, the fourth is no better.
    assert_eq!((summary.steps, summary.kept_step, summary.stopped_early), (8, 4, true));
    assert_eq!((log.records.len(), log.evaluated.as_slice()), (8, &[2, 4, 6, 8][..]));

    // A run that has ended stays ended, with its best parameters; with more patience it continues.
    let (again, mut log) = (Line::new(5)?, Log { scores: vec![0.9, 0.9], ..Log::default() });
    let ended = fit_with_checkpoints(&again, &again.params, &config, &mut log, &checkpoints(true))?;
    assert_eq!((ended.steps, ended.kept_step, log.records.len()), (8, 4, 0));
    assert_eq!(again.value()?.to_bits(), line.value()?.to_bits());
    let more = Checkpoints { changes: vec!["patience".to_string()], ..checkpoints(true) };
    let config = TrainConfig { patience: Some(4), ..config };
    let summary = fit_with_checkpoints(&again, &again.params, &config, &mut log, &more)?;
    assert_eq!((summary.steps, summary.kept_step, log.records.len()), (12, 4, 4));

    // Evaluations without improvement before an interruption still count afterwards.
    struct Stops(Log, usize);
    impl Observer for Stops {
        fn step(&mut self, record: &StepRecord) -> Result<()> {
            self.0.step(record)
        }
        fn evaluate(&mut self, step: usize) -> Result<Option<f64>> {
            self.0.evaluate(step)
        }
        fn stop(&self) -> bool {
            self.0.records.len() == self.1
        }
    }
    let (dir, config) =
        (tempfile::tempdir().map_err(Error::io("a folder"))?, TrainConfig { patience: Some(2), ..config });
    let checkpoints = |resume| Checkpoints { resume, ..Checkpoints::new(dir.path()) };
    let (cut, scores) = (Line::new(5)?, vec![0.9, 0.5]);
    let mut stops = Stops(Log { scores, ..Log::default() }, 4);
    let stopped = fit_with_checkpoints(&cut, &cut.params, &config, &mut stops, &checkpoints(false));
    assert!(matches!(stopped, Err(Error::Interrupted { step: 4 })));
    let (rest, mut log) = (Line::new(5)?, Log { scores: vec![0.7, 0.95], ..Log::default() });
    let summary = fit_with_checkpoints(&rest, &rest.params, &config, &mut log, &checkpoints(true))?;
    assert_eq!((summary.steps, summary.kept_step, summary.stopped_early), (6, 2, true));

    // Patience does not apply if there is no score.
    let summary = line.fit(&config)?.0;
    assert_eq!((summary.steps, summary.stopped_early), (18, false));
    let refused = line.fit(&TrainConfig { patience: Some(0), ..config }).map(drop);
    assert!(refused.unwrap_err().to_string().contains("patience"));
    Ok(())
}
