//! The examples in several processes, started by Open MPI's `mpirun`: compared with one process with the same
//! accumulation, under SIGKILL, and with an error in only one of them. Skipped without Open MPI.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use monteclora::noise::{Noise, Purpose};
use serde_json::Value;

use crate::support::programs::examples_with;
use crate::support::{skipped, Outcome};

/// The number of kills; the runs are long enough for some to hit each part of a step.
const KILLS: usize = 8;
/// How long the other processes may run after one was killed.
const GRACE: Duration = Duration::from_secs(30);

/// The examples, built with the feature `mpi`, and a folder.
struct Home {
    dir: tempfile::TempDir,
    glue: PathBuf,
    llama: PathBuf,
}

impl Home {
    /// Returns `None` without Open MPI or what is needed to build against it.
    fn new() -> Outcome<Option<Self>> {
        let says = |program: &str| Command::new(program).arg("--version").stderr(Stdio::null()).output();
        let is_open_mpi = |said: Output| String::from_utf8_lossy(&said.stdout).contains("Open MPI");
        let ready = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/mpi");
        let is_ready = Command::new(ready).arg("--ready").status().is_ok_and(|status| status.success());
        if !is_ready || !says("mpirun").is_ok_and(is_open_mpi) {
            skipped("there is no Open MPI with mpicc, mpirun and libclang");
            return Ok(None);
        }
        let dir = tempfile::tempdir()?;
        let Ok(built) = examples_with("mpi", &["glue", "llama"], dir.path()) else {
            return Err("the feature mpi does not build: beside Open MPI it needs libclang".into());
        };
        let [glue, llama] = <[PathBuf; 2]>::try_from(built).map_err(|_| "two examples")?;
        Ok(Some(Self { dir, glue, llama }))
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command of a run in `world` processes.
    fn command(&self, example: &Path, world: usize, options: &str, out: &Path) -> Command {
        let mut command = Command::new(if world == 1 { example } else { Path::new("mpirun") });
        if world > 1 {
            command.args(["-n", &world.to_string(), "--oversubscribe"]).arg(example);
            // Some CI machines are containers whose only user is root.
            command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        }
        command.args(options.split_whitespace()).arg("--output").arg(out).env("RAYON_NUM_THREADS", "1");
        command.stdout(Stdio::null());
        command
    }

    fn run(&self, example: &Path, world: usize, options: &str, out: &str) -> Outcome<Run> {
        let out = self.out(out);
        let said = self.command(example, world, options, &out).stderr(Stdio::piped()).output()?;
        if !said.status.success() {
            return Err(format!("{world} processes: {}", String::from_utf8_lossy(&said.stderr)).into());
        }
        Run::read(&out)
    }
}

/// The results of a run.
struct Run {
    losses: Vec<f64>,
    adapter: HashMap<String, Tensor>,
    metrics: Value,
}

impl Run {
    fn read(out: &Path) -> Outcome<Self> {
        let read = |name: &str| {
            let path = out.join(name);
            fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let log = read("log.jsonl")?;
        let loss = |line: &str| -> Outcome<f64> {
            let record: Value = serde_json::from_str(line)?;
            Ok(record["loss"].as_f64().ok_or("a loss")?)
        };
        Ok(Self {
            losses: log.lines().map(loss).collect::<Outcome<_>>()?,
            adapter: candle_core::safetensors::load(
                out.join("adapter/adapter_model.safetensors"),
                &Device::Cpu,
            )?,
            metrics: serde_json::from_str(&read("metrics.json")?)?,
        })
    }

    /// The largest differences of losses (relative) and adapter (relative to each tensor's maximum).
    fn differences(&self, other: &Self) -> Outcome<(f64, f64)> {
        assert_eq!(self.losses.len(), other.losses.len());
        let of_losses = self.losses.iter().zip(&other.losses).map(|(a, b)| (a - b).abs() / b.abs());
        let mut of_adapter = 0f64;
        assert_eq!(self.adapter.len(), other.adapter.len());
        for (name, tensor) in &self.adapter {
            let [a, b] = [tensor, &other.adapter[name]].map(|tensor| tensor.to_dtype(DType::F64));
            let b = b?;
            let largest = |tensor: &Tensor| tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
            of_adapter = of_adapter.max(largest(&(a? - &b)?)? / largest(&b)?.max(1e-12));
        }
        Ok((of_losses.fold(0.0, f64::max), of_adapter))
    }
}

/// A single test: several at once would start even more processes than cores, and tests that wait for each
/// other would keep the remaining tests from running.
#[test]
fn several_processes() -> Outcome {
    let Some(home) = Home::new()? else { return Ok(()) };
    several_processes_train_what_one_does(&home)?;
    a_killed_process_ends_the_others_and_the_run_goes_on(&home)?;
    an_error_of_one_process_ends_all_with_its_words(&home)
}

fn several_processes_train_what_one_does(home: &Home) -> Outcome {
    let glue = "--epochs 1 --batch-size 4 --limit-train 800 --accumulation 4 --lr 1e-3";
    let llama = "--epochs 1 --batch-size 1 --limit-train 200 --max-length 192 --accumulation 4 --lr 1e-3 \
                 --max-new-tokens 4 --task gsm8k --limit-task 6";
    for (example, options, method, dropout, worlds) in [
        (&home.glue, glue, "lora", "0", &[2][..]),
        (&home.glue, glue, "monteclora", "0.1", &[2, 4]),
        (&home.llama, llama, "lora", "0.1", &[4]),
        (&home.llama, llama, "monteclora", "0", &[2]),
    ] {
        let name = format!("{}-{method}", example.file_name().ok_or("a name")?.to_string_lossy());
        let options = format!("{options} --method {method} --adapter-dropout {dropout}");
        let one = home.run(example, 1, &options, &name)?;
        assert_eq!(one.losses.len(), 50);
        for &world in worlds {
            let several = home.run(example, world, &options, &format!("{name}-{world}"))?;
            let (losses, adapter) = several.differences(&one)?;
            println!("{name}, {world} processes: losses within {losses:.1e}, adapter within {adapter:.1e}");
            // In single precision, and the sums of each step are in another order.
            assert!(losses < 1e-5 && adapter < 1e-4, "{name}, {world}: {losses:e}, {adapter:e}");
            for key in ["mean", "loss_mean"] {
                assert_eq!(several.metrics[key].is_null(), one.metrics[key].is_null());
            }
            assert_eq!(several.metrics["task_mean"], one.metrics["task_mean"]);
        }
    }
    Ok(())
}

/// Kills a run when it is dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Guard {
    /// The ids of its child processes.
    fn children(&self) -> Vec<u32> {
        let parent = self.0.id();
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let id = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<u32>().ok();
        let is_child = |id: &u32| {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            let after_name = stat.rsplit(')').next().unwrap_or_default();
            after_name.split_whitespace().nth(1).and_then(|parent| parent.parse().ok()) == Some(parent)
        };
        processes.filter_map(id).filter(is_child).collect()
    }

    fn ends_within(&mut self, patience: Duration) -> Outcome<Option<bool>> {
        let clock = Instant::now();
        while clock.elapsed() < patience {
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status.success()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(None)
    }
}

fn a_killed_process_ends_the_others_and_the_run_goes_on(home: &Home) -> Outcome {
    let options =
        "--epochs 1 --batch-size 4 --limit-train 800 --accumulation 4 --lr 1e-3 --method monteclora \
                   --checkpoint-every 5 --adapter-dropout 0.1 --resume";
    let one = home.run(&home.glue, 1, options, "whole")?;
    let clock = Instant::now();
    home.run(&home.glue, 4, options, "measured")?;
    let length = clock.elapsed();
    let (mut kills, mut runs, mut slowest) = (0, 0, Duration::ZERO);
    let moments = Noise::new(20).stream("kills", Purpose::Init);
    for attempt in 0.. {
        assert!(attempt < 10 * KILLS, "{kills} kills in {attempt} attempts");
        if kills == KILLS {
            break;
        }
        let out = home.out(&format!("killed-{runs}"));
        // Alternately 4 and 2 processes, into the same folder.
        let world = [4, 2][kills % 2];
        let mut uniforms = vec![0.0; 2];
        moments.fill_uniform(attempt as u64, &mut uniforms);
        let mut run = Guard(home.command(&home.glue, world, options, &out).stderr(Stdio::null()).spawn()?);
        let by_itself = run.ends_within(length.mul_f64(0.1 + uniforms[0] * 0.7))?;
        let children = run.children();
        let victim = children.get((uniforms[1] * children.len() as f64) as usize);
        if let (None, Some(victim)) = (by_itself, victim) {
            Command::new("sh").args(["-c", &format!("kill -9 {victim}")]).stderr(Stdio::null()).status()?;
        }
        let clock = Instant::now();
        // Without a victim the run has not begun yet or has ended.
        let patience = if victim.is_some() { GRACE } else { 10 * GRACE };
        let ended = by_itself.map_or_else(|| run.ends_within(patience), |ended| Ok(Some(ended)))?;
        if let (None, Some(_), Some(false)) = (by_itself, victim, ended) {
            kills += 1;
            slowest = slowest.max(clock.elapsed());
            continue;
        }
        assert_eq!(
            ended,
            Some(true),
            "{world} processes, one killed: the others still run after {patience:?}"
        );
        runs += 1;
        let (losses, adapter) = Run::read(&out)?.differences(&one)?;
        assert!(losses < 1e-5 && adapter < 1e-4, "{losses:e}, {adapter:e}");
    }
    // Resume the last run with one process.
    let last = home.run(&home.glue, 1, options, &format!("killed-{runs}"))?;
    let (losses, adapter) = last.differences(&one)?;
    println!(
        "{kills} kills in {} runs, the others gone within {slowest:?}; {losses:.1e}, {adapter:.1e}",
        runs + 1
    );
    assert!(losses < 1e-5 && adapter < 1e-4, "{losses:e}, {adapter:e}");
    Ok(())
}

fn an_error_of_one_process_ends_all_with_its_words(home: &Home) -> Outcome {
    let said = |options: &str, out: &str| -> Outcome<String> {
        let mut command = home.command(&home.glue, 2, options, &home.out(out));
        let mut run = Guard(command.stderr(Stdio::from(fs::File::create(home.out("said"))?)).spawn()?);
        assert_eq!(run.ends_within(GRACE)?, Some(false), "{options}");
        Ok(fs::read_to_string(home.out("said"))?)
    };
    let few = said("--epochs 1 --limit-train 8 --accumulation 1", "few")?;
    assert!(few.contains("invalid accumulation: expected at least one micro-batch for each of 2"), "{few}");
    // Only rank 0 locks and writes the folder.
    fs::write(home.out("file"), "")?;
    let unwritable = said("--epochs 1 --limit-train 8", "file")?;
    assert!(unwritable.contains("rank 0: error: ") && unwritable.contains("file"), "{unwritable}");
    Ok(())
}
