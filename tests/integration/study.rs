//! Studies: every recipe on a toy model, cells that fail, and a grid that is killed and restarted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use candle_core::{DType, Device};
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::Batcher;
use monteclora::data::split::{self, Subset};
use monteclora::data::task::Task;
use monteclora::inject::Targets;
use monteclora::metrics;
use monteclora::models::hub::ModelFiles;
use monteclora::noise::Noise;
use monteclora::study::{self, CellKey, Grid, Plan, Shard, Status, Trial};
use monteclora::train::{self, Classification, Classifier, Method, MethodInit, TrainConfig};
use serde_json::json;

use crate::support::checkpoints::{checkpoint, rows, Log};
use crate::support::{small, Outcome};

fn trial(files: &ModelFiles, run: impl FnOnce(&Trial) -> Outcome) -> Outcome {
    let all = rows(120, false);
    run(&Trial {
        files,
        task: Task::Rte,
        train: &all[..80],
        limit_train: Some(64),
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
            let method = small(name);
            let (result, cost, kept) = trial.run(&key(&method, 5e-3));
            assert_eq!((result.status, &result.reason), (Status::Done, &None), "{name}");
            let mean = &result.arms["mean"];
            assert!(mean.nll.is_some_and(f64::is_finite) && mean.accuracy.is_some(), "{name}: {mean:?}");
            let bayesian = name.starts_with("monteclora") && name != "monteclora-released";
            let drawn = bayesian || ["ivon", "blob"].contains(&name);
            assert_eq!(result.arms.contains_key("3 draws"), drawn, "{name}");
            assert!(!result.arms.contains_key("temperature"), "{name}: nothing was held out");
            let of_lora = ["mc dropout", "checkpoints", "last-layer laplace"];
            let plain = ["lora", "map", "rslora", "loraplus"].contains(&name);
            assert!(of_lora.iter().all(|own| result.arms.contains_key(*own) == plain), "{name}");
            let of_posterior = ["linearised", "refitted"];
            assert!(of_posterior.iter().all(|own| result.arms.contains_key(*own) == bayesian), "{name}");
            assert_eq!(result.arms.contains_key("laplace"), plain || bayesian, "{name}");
            let told = match name {
                _ if plain => 5,
                _ if bayesian => 7,
                _ if drawn => 3,
                _ => 1,
            };
            assert_eq!(result.ood.len(), told, "{name}");
            // Also with the post-hoc recipe: LoRA and posterior share the steps.
            assert_eq!((result.steps, result.losses.len()), (16, 16), "{name}");
            let rows: usize = result.reliability["mean"].iter().map(|bin| bin.count).sum();
            assert_eq!(rows, 40, "{name}");
            assert!(cost.seconds > 0.0 && result.trainable_parameters > 0);
            let again = trial.run(&key(&method, 5e-3));
            assert_eq!((&result, &kept), (&again.0, &again.2), "{name}");
            // The scores can be computed again from the rows that are kept.
            assert_eq!(kept.row, (80..120).collect::<Vec<u32>>(), "{name}");
            assert!(kept.arms.keys().eq(result.arms.keys()), "{name}");
            for (treatment, metrics) in &result.arms {
                let (probabilities, classes) = kept.probabilities(treatment).ok_or("no rows")?;
                let rows: Vec<Vec<f64>> = probabilities.chunks(classes).map(<[f64]>::to_vec).collect();
                let again = metrics::nll(&rows, &kept.label)?;
                assert!(
                    metrics.nll.is_some_and(|nll| (nll / again - 1.0).abs() < 1e-6),
                    "{name} {treatment}"
                );
            }
        }
        Ok(())
    })
}

#[test]
fn a_posterior_is_put_on_an_adapter_made_elsewhere() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    trial(&files, |trial| {
        let (here, ..) = trial.run(&key("monteclora-posthoc:rank=4:alpha=8", 5e-3));
        // The LoRA of the first half of that recipe, trained by hand.
        let method = Method::Lora(LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() });
        let start = MethodInit::Fresh(method, Targets::default());
        let classifier = Classifier::load(&files, 2, &start, Noise::new(3), DType::F32, &Device::Cpu)?;
        let batcher = Batcher::new(8, false, Noise::new(3))?;
        let own = split::stratified(&split::strata(trial.train), 64, Noise::new(3), Subset::Training);
        let rows = split::at(trial.train, &own);
        let objective = Classification::new(&classifier, &rows, batcher);
        let config = TrainConfig { epochs: 1, lr: 5e-3, keep_best: false, ..TrainConfig::default() };
        train::fit(&objective, &classifier.params, &config, &mut Log::default())?;
        classifier.save("toy", dir.path())?;

        let adapter = dir.path().join("adapter");
        let recipe = format!("monteclora-posthoc:adapter={}", adapter.display());
        let (elsewhere, ..) = trial.run(&key(&recipe, 5e-3));
        assert_eq!((elsewhere.status, &elsewhere.reason), (Status::Done, &None));
        // The mean is that of the LoRA, whatever the training of its posterior; the draws differ.
        assert_eq!(elsewhere.arms["mean"], here.arms["mean"]);
        assert_ne!(elsewhere.arms["3 draws"], here.arms["3 draws"]);
        // Counts only the training of the posterior: rho and c of six layers.
        assert_eq!((elsewhere.steps, here.steps, trial.epochs), (16, 16, 2));
        assert_eq!(elsewhere.trainable_parameters, 6 * (4 + 4));
        let both = classifier.params.trainable_count() + elsewhere.trainable_parameters;
        assert_eq!(here.trainable_parameters, both);

        let absent = format!("monteclora-posthoc:adapter={}", dir.path().join("absent").display());
        let (failed, ..) = trial.run(&key(&absent, 5e-3));
        assert_eq!(failed.status, Status::Failed);
        assert!(failed.reason.is_some_and(|reason| reason.contains("absent")));
        Ok(())
    })
}

#[test]
fn what_is_held_out_comes_out_of_the_seed_s_own_rows() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    trial(&files, |trial| {
        let (held, ..) = trial.run(&key("lora:rank=4:alpha=8:held-out=0.25", 5e-3));
        assert_eq!((held.status, &held.reason), (Status::Done, &None));
        assert_eq!(held.arms.keys().collect::<Vec<_>>(), ["mean", "temperature", "tfb", "tfb held-out"]);
        // 48 rows in batches of 8, two epochs; without held-out rows there are 64.
        let (whole, ..) = trial.run(&key("lora:rank=4:alpha=8", 5e-3));
        assert_eq!((held.steps, whole.steps), (12, 16));
        let other = CellKey { seed: 4, ..key("lora:rank=4:alpha=8:held-out=0.25", 5e-3) };
        assert_ne!(trial.run(&other).0.losses, held.losses);

        // One temperature for all rows is fitted to the mean, and one to the average of the draws.
        let (bayes, _, rows) = trial.run(&key("monteclora:rank=4:alpha=8:held-out=0.25", 5e-3));
        let arms = ["3 draws", "3 draws, temperature", "mean", "temperature"];
        assert_eq!(bayes.arms.keys().collect::<Vec<_>>(), arms);
        let margins = |arm: &str| rows.arms[arm].chunks(2).map(|row| row[1] - row[0]).collect::<Vec<f32>>();
        for (arm, tempered) in [("mean", "temperature"), ("3 draws", "3 draws, temperature")] {
            let (own, tempered) = (margins(arm), margins(tempered));
            let inverse = tempered.iter().sum::<f32>() / own.iter().sum::<f32>();
            assert!((inverse - 1.0).abs() > 0.01, "{arm}: nothing was fitted");
            for (own, tempered) in own.iter().zip(&tempered) {
                assert!((own * inverse - tempered).abs() < 1e-3, "{arm}: {own} {inverse} {tempered}");
            }
        }
        Ok(())
    })
}

#[test]
fn draws_of_a_posterior_without_width_predict_what_the_mean_does() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    trial(&files, |trial| {
        let (result, ..) = trial.run(&key("monteclora:rank=4:alpha=8:eps=1e-9", 5e-3));
        let (mean, draws) = (&result.arms["mean"], &result.arms["3 draws"]);
        let (mean, draws) = (mean.nll.ok_or("no NLL")?, draws.nll.ok_or("no NLL")?);
        // The mean has learnt something: otherwise a softmax of probabilities would give the same NLL.
        assert!((mean - draws).abs() < 1e-5 && mean < 2f64.ln() - 0.02, "{mean} {draws}");
        Ok(())
    })
}

#[test]
fn a_cell_that_goes_wrong_is_a_result() -> Outcome {
    let dir = tempfile::tempdir()?;
    let files = checkpoint(dir.path())?;
    trial(&files, |trial| {
        let (diverged, _, rows) = trial.run(&key("lora:rank=4", 1e30));
        assert!(rows.is_empty());
        assert_eq!(diverged.status, Status::Diverged, "{:?}", diverged.reason);
        assert!(!diverged.losses.is_empty() && diverged.arms.is_empty());
        let (failed, ..) = trial.run(&key("lora:targets=absent", 1e-3));
        assert_eq!(failed.status, Status::Failed);
        assert!(failed.reason.is_some_and(|reason| reason.contains("absent")));
        Ok(())
    })
}

/// The environment variable with the folder of the model and the study of the kill test's child process.
const CHILD: &str = "MONTECLORA_TEST_STUDY";

/// Not a test itself: the kill test runs it in a child process.
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

/// The bytes of all results, by their path below `dir`.
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
        // Killed at different moments; after 25 attempts it may run to the end.
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
        // Every result that exists is complete.
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
    // A study of a version that did not record its constants, and one of a version that did.
    let now = json!({"epochs": 2, "constants": {"lora": "1"}});
    study::run(&study, &now, &cells, Shard::WHOLE, &mut cell, &mut |_, _| ())?;
    let later = shared.path().join("later");
    study::run(&later, &now, &cells[..0], Shard::WHOLE, &mut cell, &mut |_, _| ())?;
    let changed = json!({"epochs": 2, "constants": {"lora": "2"}});
    let changed = study::run(&later, &changed, &cells[..0], Shard::WHOLE, &mut cell, &mut |_, _| ());
    assert!(changed.is_err_and(|error| error.to_string().contains("with other settings (constants)")));
    // A further method does not make it another study; its constants are checked from then on.
    let more = json!({"epochs": 2, "constants": {"dora": "3"}});
    study::run(&later, &more, &cells[..0], Shard::WHOLE, &mut cell, &mut |_, _| ())?;
    for (constants, same) in [(json!({"lora": "1", "dora": "3"}), true), (json!({"dora": "4"}), false)] {
        let settings = json!({"epochs": 2, "constants": constants});
        let run = study::run(&later, &settings, &cells[..0], Shard::WHOLE, &mut cell, &mut |_, _| ());
        assert_eq!(run.is_ok(), same, "{settings}");
    }
    // The same holds for the rows of a task, which older studies did not record.
    let tasks = shared.path().join("tasks");
    for (data, same) in [
        (json!({"sst2": "1"}), true),
        (json!({"cola": "2"}), true),
        (json!({"sst2": "1", "cola": "2"}), true),
        (json!({"sst2": "1", "cola": "3"}), false),
    ] {
        let settings = json!({"epochs": 2, "data": data});
        let run = study::run(&tasks, &settings, &cells[..0], Shard::WHOLE, &mut cell, &mut |_, _| ());
        assert_eq!(run.is_ok(), same, "{settings}");
    }
    let other = study::run(&study, &json!({"epochs": 3}), &cells, Shard::WHOLE, &mut cell, &mut |_, _| ());
    assert!(other.is_err_and(|error| error.to_string().contains("with other settings (epochs)")));
    Ok(())
}

#[test]
fn a_plan_is_run_reported_and_judged_from_its_folder_alone() -> Outcome {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/plan_bundled.json");
    let (bundled, crc) = Plan::read(&path)?;
    assert_eq!((bundled.cells()?.len(), crc.len()), (3 * (3 * 3 + 1), 8));

    let home = home()?;
    let files = ModelFiles::locate(home.path().join("model").to_str().ok_or("a path")?, None)?;
    let own = "monteclora:rank=4:alpha=8 (3 draws)";
    let plan = json!({
        "name": "toy", "model": "toy", "tasks": ["rte"],
        "methods": [{
            "recipes": ["lora:rank=4:alpha=8", "lora:rank=4:alpha=8:held-out=0.25", "monteclora:rank=4:alpha=8"],
            "lrs": [1e-3, 5e-3],
        }],
        "batch_sizes": [8], "seeds": [1, 2], "limit_train": 64, "epochs": "2", "draws": 3,
        "families": {"primary": [
            {"arm": own, "against": "lora:rank=4:alpha=8 (mean)", "scores": ["nll", "ece"]},
            {"arm": own, "against": "lora:rank=4:alpha=8:held-out=0.25 (temperature)", "scores": ["accuracy"]},
        ]},
        "success": [
            {"sensitivity": {"arm": own, "against": "lora:rank=4:alpha=8 (mean)", "most": 1e6, "of": "variance"}},
        ],
    });
    std::fs::write(home.path().join("plan.json"), plan.to_string())?;
    let (plan, crc) = Plan::read(&home.path().join("plan.json"))?;
    let study = home.path().join("study");
    trial(&files, |trial| {
        let settings = plan.settings(&crc)?;
        let mut cell = |key: &CellKey| trial.run(key);
        study::run(&study, &settings, &plan.cells()?, Shard::WHOLE, &mut cell, &mut |_, _| ())?;
        Ok(())
    })?;
    let report = || -> Outcome<String> {
        study::write_report(&study, &study)?;
        Ok(std::fs::read_to_string(study.join("report.md"))?)
    };
    let text = report()?;
    let start = "Of 12 planned cells 12 are done, 0 diverged, 0 failed, 0 have not run.";
    assert!(text.contains(start) && text.contains(&format!("CRC-32 of the file: {crc}.")), "{text}");
    assert!(text.contains(&format!("| {own} | lora:rank=4:alpha=8 (mean) | NLL | 4 | 2 | ")), "{text}");
    assert!(text.contains("**All criteria for success in the plan are met.**"), "{text}");
    // A decision that needs the rows of a cell stays open without them.
    let rows = study.join(plan.cells()?[0].folder_name()).join("rows.safetensors");
    std::fs::rename(&rows, home.path().join("rows"))?;
    assert!(report()?.contains("undecided: 1 of its cells lack their rows"), "{}", report()?);
    std::fs::rename(home.path().join("rows"), &rows)?;
    study::pack(&study)?;
    assert_eq!((report()?, study::read_rows(&study)?.len()), (text, 12));
    Ok(())
}

#[test]
fn reports_of_studies_that_kept_no_rows_are_as_they_were() -> Outcome {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/results");
    for name in ["bundled", "minilm", "minilm-ablation"] {
        let (dir, out) = (results.join(name), tempfile::tempdir()?);
        assert!(study::read_rows(&dir)?.is_empty(), "{name}");
        study::write_report(&dir, out.path())?;
        for file in ["report.md", "report.csv", "cells.csv"] {
            let [now, before] = [out.path(), &dir].map(|at| std::fs::read_to_string(at.join(file)));
            assert!(now? == before?, "{name}/{file}");
        }
    }
    Ok(())
}
