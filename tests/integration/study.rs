//! Studies: every recipe on a toy model, cells that go wrong, and a grid that is killed and begun again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use candle_core::{DType, Device};
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::Batcher;
use monteclora::data::task::Task;
use monteclora::inject::Targets;
use monteclora::models::hub::ModelFiles;
use monteclora::noise::Noise;
use monteclora::study::{self, CellKey, Grid, Shard, Status, Trial};
use monteclora::train::{self, Classification, Classifier, Method, MethodInit, TrainConfig};
use serde_json::json;

use crate::finetune::{checkpoint, rows, Log};
use crate::support::Outcome;

fn trial(files: &ModelFiles, run: impl FnOnce(&Trial) -> Outcome) -> Outcome {
    let all = rows(120, false);
    run(&Trial {
        files,
        task: Task::Rte,
        train: &all[..64],
        held_out: &all[64..80],
        dev: &all[80..],
        foreign: &all[..8],
        epochs: 2,
        draws: 3,
        device: &Device::Cpu,
    })
}

fn key(method: &str, lr: f64) -> CellKey {
    CellKey { task: "rte".to_string(), method: method.to_string(), lr, batch_size: 8, seed: 3 }
}

#[test]
fn every_recipe_is_trained_and_measured_and_repeats_itself() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    trial(&files, |trial| {
        for name in study::recipe::NAMES {
            let method = if name == "full" { name.to_string() } else { format!("{name}:rank=4:alpha=8") };
            let (result, cost) = trial.run(&key(&method, 5e-3));
            assert_eq!((result.status, &result.reason), (Status::Done, &None), "{name}");
            let mean = &result.arms["mean"];
            assert!(mean.nll.is_some_and(f64::is_finite) && mean.accuracy.is_some(), "{name}: {mean:?}");
            let draws =
                ["ivon", "blob", "monteclora", "monteclora-sparse", "monteclora-posthoc"].contains(&name);
            assert_eq!(result.arms.contains_key("3 draws"), draws, "{name}");
            let of_lora = [
                "temperature",
                "tfb",
                "tfb held-out",
                "mc dropout",
                "checkpoints",
                "last-layer laplace",
                "laplace",
            ];
            let plain = ["lora", "rslora", "loraplus"].contains(&name);
            assert!(of_lora.iter().all(|arm| result.arms.contains_key(*arm) == plain), "{name}");
            let told = if draws { 3 } else { 1 };
            assert_eq!(result.ood.len(), told, "{name}");
            let steps = if name == "monteclora-posthoc" { 32 } else { 16 };
            assert_eq!((result.steps, result.losses.len()), (steps, 16), "{name}");
            let rows: usize = result.reliability["mean"].iter().map(|bin| bin.count).sum();
            assert_eq!(rows, 40, "{name}");
            assert!(cost.seconds > 0.0 && result.trainable_parameters > 0);
            assert_eq!(result, trial.run(&key(&method, 5e-3)).0, "{name}");
        }
        Ok(())
    })
}

#[test]
fn a_posterior_is_put_on_an_adapter_made_elsewhere() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    trial(&files, |trial| {
        let (here, _) = trial.run(&key("monteclora-posthoc:rank=4:alpha=8", 5e-3));
        // The same LoRA as the first phase of that, by hand.
        let method = Method::Lora(LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() });
        let start = MethodInit::Fresh(method, Targets::default());
        let classifier = Classifier::load(&files, 2, &start, Noise::new(3), DType::F32, &Device::Cpu)?;
        let batcher = Batcher::new(8, false, Noise::new(3))?;
        let objective = Classification { classifier: &classifier, rows: trial.train, batcher };
        let config =
            TrainConfig { epochs: trial.epochs, lr: 5e-3, keep_best: false, ..TrainConfig::default() };
        train::fit(&objective, &classifier.params, &config, &mut Log::default())?;
        classifier.save("toy", dir.path())?;

        let adapter = dir.path().join("adapter");
        let recipe = format!("monteclora-posthoc:adapter={}", adapter.display());
        let (elsewhere, _) = trial.run(&key(&recipe, 5e-3));
        assert_eq!((elsewhere.status, &elsewhere.reason), (Status::Done, &None));
        assert_eq!((&elsewhere.arms, &elsewhere.ood), (&here.arms, &here.ood));
        // Its own training alone, of rho and c of six layers alone.
        assert_eq!((elsewhere.steps, here.steps), (16, 32));
        assert_eq!(elsewhere.trainable_parameters, 6 * (4 + 4));

        let absent = format!("monteclora-posthoc:adapter={}", dir.path().join("absent").display());
        let (failed, _) = trial.run(&key(&absent, 5e-3));
        assert_eq!(failed.status, Status::Failed);
        assert!(failed.reason.is_some_and(|reason| reason.contains("absent")));
        Ok(())
    })
}

#[test]
fn draws_of_a_posterior_without_width_predict_what_the_mean_does() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    trial(&files, |trial| {
        let (result, _) = trial.run(&key("monteclora:rank=4:alpha=8:eps=1e-9", 5e-3));
        let (mean, draws) = (&result.arms["mean"], &result.arms["3 draws"]);
        let (mean, draws) = (mean.nll.ok_or("no NLL")?, draws.nll.ok_or("no NLL")?);
        // It is told apart from a softmax of probabilities: the mean has learnt something.
        assert!((mean - draws).abs() < 1e-5 && mean < 2f64.ln() - 0.02, "{mean} {draws}");
        Ok(())
    })
}

#[test]
fn a_cell_that_goes_wrong_is_a_result() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    trial(&files, |trial| {
        let (diverged, _) = trial.run(&key("lora:rank=4", 1e30));
        assert_eq!(diverged.status, Status::Diverged, "{:?}", diverged.reason);
        assert!(!diverged.losses.is_empty() && diverged.arms.is_empty());
        let (failed, _) = trial.run(&key("lora:rank=4000", 1e-3));
        assert_eq!(failed.status, Status::Failed);
        assert!(failed.reason.is_some_and(|reason| reason.contains("rank")));
        Ok(())
    })
}

/// Where the child of the kill test finds its model and leaves its study.
const CHILD: &str = "MONTECLORA_TEST_STUDY";

/// No test of its own: what the kill test runs in a process of its own.
#[test]
fn child_of_the_kill_test() -> Outcome {
    match std::env::var_os(CHILD) {
        Some(dir) => run_grid(Path::new(&dir), Shard::WHOLE),
        None => Ok(()),
    }
}

fn run_grid(dir: &Path, shard: Shard) -> Outcome {
    let text = dir.join("model");
    let files = ModelFiles::locate(text.to_str().ok_or("a path")?, None)?;
    let methods =
        ["lora:rank=4", "monteclora:rank=4", "monteclora-posthoc:rank=4"].map(String::from).to_vec();
    let grid = Grid {
        lrs: vec![5e-3, 1e30],
        batch_sizes: vec![8, 16],
        seeds: vec![1, 2],
        ..Grid::paper(vec!["rte".to_string()], methods)
    };
    trial(&files, |trial| {
        let settings = json!({"epochs": trial.epochs});
        let mut cell = |key: &CellKey| trial.run(key);
        study::run(&dir.join("study"), &settings, &grid.cells()?, shard, &mut cell, &mut |_, _| ())?;
        Ok(())
    })
}

/// A new folder with the toy model in it.
fn home() -> Outcome<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    std::fs::create_dir(dir.path().join("model"))?;
    checkpoint(&dir.path().join("model"))?;
    Ok(dir)
}

/// The bytes of all results, by their path below the study.
fn results(dir: &Path) -> Outcome<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir.join("study"))? {
        let path = entry?.path().join("result.json");
        if path.is_file() {
            found.insert(path.strip_prefix(dir)?.to_path_buf(), std::fs::read(&path)?);
        }
    }
    Ok(found)
}

#[test]
fn a_grid_that_is_killed_again_and_again_ends_as_one_that_was_not() -> Outcome {
    let (whole, killed) = (home()?, home()?);
    run_grid(whole.path(), Shard::WHOLE)?;
    let want = results(whole.path())?;
    assert_eq!(want.len(), 3 * 2 * 2 * 2);

    let mut kills = 0;
    for attempt in 0u64.. {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "study::child_of_the_kill_test"])
            .env(CHILD, killed.path())
            .stdout(std::process::Stdio::null())
            .spawn()?;
        // Other moments each time, and in the end all the time it wants.
        let patience = Duration::from_millis(if attempt < 25 { 20 + attempt * 53 % 170 } else { 60_000 });
        let clock = std::time::Instant::now();
        let status = loop {
            match child.try_wait()? {
                Some(status) => break status,
                None if clock.elapsed() > patience => {
                    child.kill()?; // SIGKILL
                    kills += 1;
                    break child.wait()?;
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        // Whatever there is by now is whole.
        for cell in study::read_cells(&killed.path().join("study")).unwrap_or_default() {
            let name = cell.result.key.folder_name();
            assert!(want.contains_key(&Path::new("study").join(name).join("result.json")));
        }
        if status.success() {
            break;
        }
    }
    println!("{kills} kills");
    assert!(kills >= 1, "it was never killed");
    assert_eq!(results(killed.path())?, want);
    Ok(())
}

#[test]
fn shards_that_share_a_folder_make_the_whole_and_other_settings_are_refused() -> Outcome {
    let (whole, shared) = (home()?, home()?);
    run_grid(whole.path(), Shard::WHOLE)?;
    for shard in ["2/3", "1/3", "3/3"] {
        run_grid(shared.path(), shard.parse()?)?;
    }
    assert_eq!(results(shared.path())?, results(whole.path())?);

    let study = shared.path().join("study");
    let mut cell = |_: &CellKey| panic!("every cell has a result");
    let cells: Vec<CellKey> = study::read_cells(&study)?.into_iter().map(|cell| cell.result.key).collect();
    let again = study::run(&study, &json!({"epochs": 2}), &cells, Shard::WHOLE, &mut cell, &mut |_, _| ())?;
    assert_eq!((again.total, again.done, again.failed), (24, 24, 12));
    let other = study::run(&study, &json!({"epochs": 3}), &cells, Shard::WHOLE, &mut cell, &mut |_, _| ());
    assert!(other.is_err_and(|error| error.to_string().contains("other settings")));
    Ok(())
}
