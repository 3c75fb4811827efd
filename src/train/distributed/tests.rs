//! Distributed training with threads as processes: the loop, its draws, its files and its ends.

use std::path::Path;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use candle_nn::Linear;

use super::rendezvous::meet;
use super::*;
use crate::adapter::{Context, Params};
use crate::error::{Error, Result};
use crate::monteclora::{MonteCLoRAConfig, MonteCLoRALinear, Regularizer};
use crate::noise::{Noise, Purpose};
use crate::optim::IvonConfig;
use crate::train::{
    fit_distributed, Checkpoints, Loss, Objective, Observer, OnNonFinite, StepRecord, Summary, TrainConfig,
};

/// One of several threads that stand for processes.
#[derive(Debug, Clone)]
struct Thread {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    world: usize,
    barrier: Barrier,
    said: Mutex<Vec<Vec<u8>>>,
    sums: Mutex<usize>,
}

impl Thread {
    /// Returns the bytes of every thread, in the order of their ranks.
    fn exchange(&self, own: Vec<u8>) -> Vec<Vec<u8>> {
        let said = || self.group.said.lock().unwrap_or_else(PoisonError::into_inner);
        said()[self.rank] = own;
        self.group.barrier.wait();
        let all = said().clone();
        self.group.barrier.wait();
        all
    }
}

impl Communicator for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.group.world
    }

    fn all_reduce_sum(&self, flat: &Tensor) -> Result<Tensor> {
        let own: Vec<u8> = flat.to_vec1::<f64>()?.into_iter().flat_map(f64::to_le_bytes).collect();
        let mut sums = vec![0f64; flat.dim(0)?];
        for said in self.exchange(own) {
            let (words, _) = said.as_chunks::<8>();
            assert_eq!(words.len(), sums.len(), "all sum the same");
            sums.iter_mut().zip(words).for_each(|(sum, word)| *sum += f64::from_le_bytes(*word));
        }
        *self.group.sums.lock().unwrap() += usize::from(self.rank == 0);
        Ok(Tensor::new(sums, flat.device())?)
    }

    fn broadcast(&self, bytes: Vec<u8>, root: usize) -> Result<Vec<u8>> {
        Ok(self.exchange(bytes).swap_remove(root))
    }

    fn barrier(&self) -> Result<()> {
        self.exchange(Vec::new());
        Ok(())
    }
}

/// Runs `f` on `world` threads; returns their results by rank, and the number of sums.
fn together<T: Send>(world: usize, f: impl Fn(Thread) -> T + Sync) -> (Vec<T>, usize) {
    let group = Group {
        world,
        barrier: Barrier::new(world),
        said: Mutex::new(vec![Vec::new(); world]),
        sums: Mutex::default(),
    };
    let group = Arc::new(group);
    let of_all = std::thread::scope(|scope| {
        let start = |rank| {
            let thread = Thread { rank, group: group.clone() };
            scope.spawn(|| f(thread))
        };
        let handles: Vec<_> = (0..world).map(start).collect();
        handles.into_iter().map(|handle| handle.join().expect("a thread")).collect()
    });
    let sums = *group.sums.lock().unwrap();
    (of_all, sums)
}

const ROWS: usize = 22;

/// Fits a layer to another layer's outputs on random rows; row `poison` has an infinite input.
struct Rows {
    layer: MonteCLoRALinear,
    params: Params,
    regularizer: Regularizer,
    batch: usize,
    poison: Option<usize>,
}

fn normal(path: &str, draw: u64, shape: (usize, usize)) -> Result<Tensor> {
    let mut values = vec![0f32; shape.0 * shape.1];
    Noise::new(7).stream(path, Purpose::Init).fill_normal_f32(draw, &mut values);
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F64)?)
}

impl Rows {
    fn new(batch: usize, dropout: f64) -> Result<Self> {
        let params = Params::with_dtype(Noise::new(3), DType::F64, &Device::Cpu);
        let config = MonteCLoRAConfig { rank: 2, sample_scaler: 0.05, dropout, ..Default::default() };
        let layer =
            MonteCLoRALinear::new(Linear::new(normal("w", 0, (6, 4))?, None), &params, "proj", &config)?;
        Ok(Self { layer, params, regularizer: Regularizer::new(&config), batch, poison: None })
    }

    fn values(&self) -> Result<Vec<f64>> {
        let all = self.params.all();
        let values = all.iter().map(|(_, p)| Ok(p.var.flatten_all()?.to_vec1::<f64>()?));
        Ok(values.collect::<Result<Vec<_>>>()?.concat())
    }
}

impl Objective for Rows {
    fn epoch(&self, epoch: u64) -> Result<Vec<Vec<usize>>> {
        let order = Noise::new(3).stream("data", Purpose::Shuffle).permutation(epoch, ROWS);
        Ok(order.chunks(self.batch).map(<[usize]>::to_vec).collect())
    }

    fn loss(&self, rows: &[usize], cx: &Context) -> Result<Loss> {
        let of = |row: &usize| normal("x", *row as u64, (1, 4));
        let mut xs = Tensor::cat(&rows.iter().map(of).collect::<Result<Vec<_>>>()?, 0)?;
        if self.poison.is_some_and(|row| rows.contains(&row)) {
            xs = (xs * f64::INFINITY)?;
        }
        let want = xs.matmul(&normal("w", 1, (6, 4))?.t()?)?;
        let task = (self.layer.forward_with(&xs, cx)? - want)?.sqr()?.mean_all()?;
        let total = (&task + self.regularizer.for_layers(&[self.layer.adapter()], cx)?.total)?;
        Ok(Loss { total, terms: vec![("task", task)] })
    }
}

/// Logs losses; the evaluation's score is the negative loss.
#[derive(Default)]
struct Log {
    losses: Vec<f64>,
    fails_at: Option<usize>,
    stops_at: Option<usize>,
    fails_to_evaluate: bool,
}

impl Observer for Log {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.losses.push(record.loss);
        assert!(record.terms.contains_key("task"));
        match self.fails_at {
            Some(step) if step == record.step => Err(Error::config("log", "the disk is full")),
            _ => Ok(()),
        }
    }

    fn stop(&self) -> bool {
        self.stops_at.is_some_and(|step| self.losses.len() >= step)
    }

    fn evaluate(&mut self, _: usize) -> Result<Option<f64>> {
        match self.fails_to_evaluate {
            true => Err(Error::config("dev", "there is no row")),
            false => Ok(self.losses.last().map(|loss| -loss)),
        }
    }
}

fn config() -> TrainConfig {
    // Eight micro-batches per epoch, the last with one row: two steps of 4.
    TrainConfig { epochs: 17, lr: 0.02, accumulation: 4, ..Default::default() }
}

/// Returns the losses and the parameters of each rank.
fn runs(world: usize, config: &TrainConfig, dropout: f64, batch: usize) -> Vec<(Vec<f64>, Vec<f64>)> {
    let run = |thread: Thread| -> Result<_> {
        let (rows, mut log) = (Rows::new(batch, dropout)?, Log::default());
        fit_distributed(&rows, &rows.params, config, &mut log, None, &thread)?;
        Ok((log.losses, rows.values()?))
    };
    let (of_all, sums) = together(world, run);
    let of_all: Vec<_> = of_all.into_iter().map(|of_one| of_one.expect("a run")).collect();
    // One exchange per step, and one at the end.
    assert!(world == 1 || sums == of_all[0].0.len() + 1, "{sums}");
    of_all
}

fn assert_close(got: &[f64], want: &[f64], within: f64) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= within * want.abs().max(1e-3), "{got} and {want}");
    }
}

#[test]
fn several_processes_are_one_with_the_same_accumulation() {
    for dropout in [0.0, 0.3] {
        let one = runs(1, &config(), dropout, 3).remove(0);
        assert_eq!(one.0.len(), 34);
        for world in [2, 4] {
            for several in runs(world, &config(), dropout, 3) {
                assert_close(&several.0, &one.0, 1e-12);
                assert_close(&several.1, &one.1, 1e-9);
            }
        }
    }
}

#[test]
fn a_shared_draw_makes_one_larger_batch() {
    let one = runs(1, &TrainConfig { accumulation: 1, ..config() }, 0.0, 11).remove(0);
    let shared = TrainConfig { accumulation: 11, shared_draw: true, ..config() };
    for (losses, values) in runs(2, &shared, 0.0, 1) {
        assert_close(&losses, &one.0, 1e-9);
        assert_close(&values, &one.1, 1e-7);
    }
    let (_, values) = runs(2, &TrainConfig { shared_draw: false, ..shared }, 0.0, 1).remove(0);
    assert!(values.iter().zip(&one.1).any(|(own, shared)| (own - shared).abs() > 1e-6));
}

/// A run to its end or its stop, with checkpoints in `dir`.
fn resumed(world: usize, dir: &Path, stops_at: Option<usize>) -> Vec<Result<(Summary, Vec<f64>)>> {
    together(world, |thread| {
        let (rows, mut log) = (
            Rows::new(3, 0.3)?,
            Log { stops_at: stops_at.filter(|_| thread.rank + 1 == world), ..Log::default() },
        );
        let checkpoints = Checkpoints { resume: true, ..Checkpoints::new(dir) };
        let summary = fit_distributed(&rows, &rows.params, &config(), &mut log, Some(&checkpoints), &thread)?;
        Ok((summary, rows.values()?))
    })
    .0
}

#[test]
fn a_run_goes_on_with_another_number_of_processes() -> Result<()> {
    let one = runs(1, &config(), 0.3, 3).remove(0);
    let dir = tempfile::tempdir().expect("a folder");
    for (world, stops_at) in [(2, 7), (4, 9), (1, 4)] {
        // Only the last rank is asked to stop, and all stop after the same step.
        let steps: Vec<_> = resumed(world, dir.path(), Some(stops_at))
            .into_iter()
            .map(|outcome| match outcome {
                Err(Error::Interrupted { step }) => step,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(steps.iter().all(|step| *step == steps[0]), "{steps:?}");
    }
    for outcome in resumed(4, dir.path(), None) {
        let (summary, values) = outcome?;
        assert_eq!((summary.steps, summary.stopped_early), (34, false));
        assert_close(&values, &one.1, 1e-9);
    }
    Ok(())
}

#[test]
fn what_is_not_finite_anywhere_is_so_for_all() {
    let run = |on_nonfinite: OnNonFinite| {
        let config = TrainConfig { on_nonfinite, epochs: 2, ..config() };
        together(4, move |thread| {
            let mut rows = Rows::new(3, 0.0)?;
            rows.poison = Some(5);
            let mut log = Log::default();
            let summary = fit_distributed(&rows, &rows.params, &config, &mut log, None, &thread)?;
            Ok((summary.skipped, rows.values()?))
        })
        .0
    };
    let skipped: Vec<_> = run(OnNonFinite::Skip).into_iter().collect::<Result<_>>().expect("runs");
    for (count, values) in &skipped {
        assert_eq!((*count, values), (2, &skipped[0].1)); // once per epoch
        assert!(values.iter().all(|value| value.is_finite()));
    }
    let stopped: Vec<String> =
        run(OnNonFinite::Stop).into_iter().map(|e| e.unwrap_err().to_string()).collect();
    assert!(stopped[0].contains("task is") && stopped[0].contains('5'), "{}", stopped[0]);
    assert!(stopped.iter().all(|error| *error == stopped[0]), "{stopped:?}");
}

/// Returns the errors of all ranks if rank `bad` has the log `of_bad`.
fn errors(world: usize, bad: usize, of_bad: impl Fn() -> Log + Sync, config: &TrainConfig) -> Vec<String> {
    let run = |thread: Thread| -> Result<Summary> {
        let rows = Rows::new(3, 0.0)?;
        let mut log = if thread.rank == bad { of_bad() } else { Log::default() };
        fit_distributed(&rows, &rows.params, config, &mut log, None, &thread)
    };
    together(world, run).0.into_iter().map(|outcome| outcome.unwrap_err().to_string()).collect()
}

#[test]
fn an_error_of_one_ends_all_with_its_reason() {
    for bad in [0, 1] {
        for fails_at in [1, 2, 34] {
            let log = || Log { fails_at: Some(fails_at), ..Log::default() };
            let errors = errors(3, bad, log, &config());
            for (rank, error) in errors.iter().enumerate() {
                let of = if rank == bad { String::new() } else { format!("rank {bad}: ") };
                assert_eq!(*error, format!("{of}invalid log: the disk is full"), "{bad} {fails_at}");
            }
        }
        let errors = errors(2, bad, || Log { fails_to_evaluate: true, ..Log::default() }, &config());
        assert!(errors.iter().all(|error| error.contains("there is no row")), "{errors:?}");
    }
}

#[test]
fn what_cannot_be_split_is_refused() {
    let few = errors(4, 0, Log::default, &TrainConfig { accumulation: 3, ..config() });
    assert!(few.iter().all(|error| error.starts_with("invalid accumulation: ")), "{few:?}");
    let ivon = TrainConfig { ivon: Some(IvonConfig::default()), ..config() };
    let ivon = errors(2, 0, Log::default, &ivon);
    assert!(ivon.iter().all(|error| error.starts_with("invalid ivon: ")), "{ivon:?}");
}

#[test]
fn processes_that_began_otherwise_are_told_apart() {
    let run = |other: bool| {
        together(3, move |thread| {
            let rows = Rows::new(3, 0.0)?;
            let mut config = config();
            if thread.rank == 2 && other {
                config.lr = 0.5;
            } else if thread.rank == 2 {
                rows.params.set("proj.default.b", &Tensor::ones((6, 2), DType::F64, &Device::Cpu)?)?;
            }
            fit_distributed(&rows, &rows.params, &config, &mut (), None, &thread)
        })
        .0
    };
    for (other, want) in
        [(true, "invalid lr: rank 2 has 0.5, rank 0 has 0.02"), (false, "parameters of rank 2")]
    {
        for outcome in run(other) {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}

#[test]
fn launchers_are_read_by_their_variables() {
    let read = |variables: &[(&str, &str)]| {
        let get = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        };
        Launch::from_variables(&get)
    };
    assert_eq!(read(&[]).unwrap(), None);
    assert_eq!(read(&[("WORLD_SIZE", "1"), ("RANK", "0")]).unwrap(), None);
    // A batch script, whose commands run once.
    assert_eq!(read(&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")]).unwrap(), None);
    let launch = |launcher, rank, world, local_rank| Some(Launch { launcher, rank, world, local_rank });
    let mpirun =
        [("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_LOCAL_RANK", "1")];
    assert_eq!(read(&mpirun).unwrap(), launch(Launcher::Mpirun, 3, 4, 1));
    let srun = [("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_PROCID", "5"), ("SLURM_LOCALID", "1")];
    assert_eq!(read(&srun).unwrap(), launch(Launcher::Srun, 5, 8, 1));
    let torchrun = [("WORLD_SIZE", "2"), ("RANK", "1")];
    assert_eq!(read(&torchrun).unwrap(), launch(Launcher::Torchrun, 1, 2, 0));
    for (variables, want) in [
        (&[("WORLD_SIZE", "2")][..], "invalid RANK: it is not set, though WORLD_SIZE is 2"),
        (&[("RANK", "1")], "invalid WORLD_SIZE: it is not set, though RANK is 1"),
        (&[("WORLD_SIZE", "2"), ("RANK", "2")], "invalid RANK: expected less than 2 (WORLD_SIZE), got 2"),
        (&[("WORLD_SIZE", "two"), ("RANK", "0")], "invalid WORLD_SIZE: expected a number"),
    ] {
        let error = read(variables).unwrap_err().to_string();
        assert!(error.starts_with(want), "{error}");
    }
    let error = launched(launch(Launcher::Torchrun, 0, 2, 0).as_ref(), &Device::Cpu).unwrap_err().to_string();
    assert!(
        cfg!(feature = "nccl") || error.contains("process 0 of 2") && error.contains("mpirun"),
        "{error}"
    );
    assert_eq!(launched(None, &Device::Cpu).unwrap().world(), 1);
}

#[test]
fn processes_that_share_a_folder_meet_whatever_lies_there() -> Result<()> {
    let dir = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("a file");
    let (long, short) = (Duration::from_secs(60), Duration::from_millis(200));
    let meeting = |rank: usize, patience: Duration| {
        let launch = Launch { launcher: Launcher::Torchrun, rank, world: 3, local_rank: rank };
        let own = if rank == 0 { b"a\nnumber".to_vec() } else { Vec::new() };
        meet(&launch, dir.path(), &own, patience)
    };
    // Files of earlier runs: a word without an answer, an answer, an acknowledged word.
    write("process-1", "old-1");
    write("process-2", "old-2 has it");
    write("answer", "old-1 old-2\nstale");
    let late = |rank: usize| {
        std::thread::sleep(Duration::from_millis(100 * rank as u64));
        meeting(rank, long)
    };
    let got: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..3).map(|rank| scope.spawn(move || late(rank))).collect();
        handles.into_iter().map(|handle| handle.join().expect("a thread")).collect::<Result<_>>()
    })?;
    assert_eq!(got, vec![b"a\nnumber".to_vec(); 3]);
    let alone = meeting(0, short).unwrap_err().to_string();
    assert!(alone.contains("2 of 3 processes did not appear"), "{alone}");
    let alone = meeting(1, short).unwrap_err().to_string();
    assert!(alone.contains("process 0 did not appear"), "{alone}");
    Ok(())
}
