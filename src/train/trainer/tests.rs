//! The loop on a line fitted to ten points.

use candle_core::Device;

use super::*;
use crate::noise::{Noise, Purpose};
use crate::params::{Init, Role};

/// Fits w to rows x, y with y = 2 x + noise; row `poison` has an infinite target.
struct Line {
    params: Params,
    w: Tensor,
    batch: usize,
    poison: Option<usize>,
}

const ROWS: usize = 10;

impl Line {
    fn new(batch: usize) -> Result<Self> {
        let params = Params::with_dtype(Noise::new(1), DType::F64, &Device::Cpu);
        let w = params.create("w", Role::Base, 1, &Init::Constant(0.0))?;
        Ok(Self { params, w, batch, poison: None })
    }

    fn fit(&self, config: &TrainConfig) -> Result<(Summary, Log)> {
        let mut log = Log::default();
        Ok((fit(self, &self.params, config, &mut log)?, log))
    }

    fn value(&self) -> Result<f64> {
        Ok(self.w.to_vec1::<f64>()?[0])
    }
}

impl Objective for Line {
    fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>> {
        let order = Noise::new(3).stream("data", Purpose::Shuffle).permutation(epoch, ROWS);
        Ok(order.chunks(self.batch).map(<[usize]>::to_vec).collect())
    }

    fn loss(&self, rows: &[usize], _: &Pass) -> Result<Loss> {
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

#[derive(Default)]
struct Log {
    records: Vec<Record>,
    scores: Vec<f64>,
    evaluated: Vec<usize>,
}

impl Observer for Log {
    fn step(&mut self, record: &Record) -> Result<()> {
        self.records.push(record.clone());
        Ok(())
    }

    fn evaluate(&mut self, step: usize) -> Result<Option<f64>> {
        self.evaluated.push(step);
        Ok(self.scores.get(self.evaluated.len() - 1).copied())
    }
}

fn config() -> TrainConfig {
    TrainConfig { epochs: 4, lr: 0.1, weight_decay: 0.0, clip: None, ..Default::default() }
}

#[test]
fn accumulated_micro_batches_are_one_big_batch() -> Result<()> {
    // Ten rows: groups of 4 + 4 + 2 rows, the last micro-batch of which is short.
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
    let run = |keep_best| -> Result<(f64, usize)> {
        let line = Line::new(5)?;
        let mut log = Log { scores: vec![0.1, 0.9, 0.3, 0.9], ..Log::default() };
        let summary = fit(&line, &line.params, &TrainConfig { keep_best, ..config() }, &mut log)?;
        Ok((line.value()?, summary.kept_step))
    };
    let ((best, best_step), (last, last_step)) = (run(true)?, run(false)?);
    assert_eq!((best_step, last_step), (4, 8));
    assert!(best < last, "{best} {last}");
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
    Ok(())
}

#[test]
fn no_data_is_an_error_rather_than_a_run_of_no_steps() -> Result<()> {
    struct Nothing;
    impl Objective for Nothing {
        fn epoch(&self, _: u64) -> Result<Vec<Vec<usize>>> {
            Ok(Vec::new())
        }
        fn loss(&self, rows: &[usize], _: &Pass) -> Result<Loss> {
            Err(Error::config("rows", format!("{rows:?}")))
        }
    }
    let line = Line::new(3)?;
    let error = fit(&Nothing, &line.params, &config(), &mut Log::default()).map(|s| s.steps);
    assert!(error.is_err_and(|error| error.to_string().contains("no batch")));
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
    /// Is content with the first evaluation and fails at the third.
    struct Fails(Vec<f64>, Params);
    impl Observer for Fails {
        fn step(&mut self, _: &Record) -> Result<()> {
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
        fn loss(&self, rows: &[usize], pass: &Pass) -> Result<Loss> {
            self.0.loss(rows, pass)
        }
    }
    let objective = Shrinks(Line::new(3)?);
    let error = fit(&objective, &objective.0.params, &config(), &mut Log::default()).map(|s| s.steps);
    assert!(error.is_err_and(|e| e.to_string().contains("epoch 1 has 3 steps, the first had 4")));
    Ok(())
}
