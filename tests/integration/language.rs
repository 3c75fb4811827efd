//! Studies of language models, on the bundled stories260K: every recipe, results against the same computed by
//! hand, a study that stops and is resumed, and its report.

use std::path::Path;

use candle_core::{DType, Device};
use monteclora::adapters::LoraConfig;
use monteclora::data::batch::Batcher;
use monteclora::data::causal::{PromptEncoder, Tokens};
use monteclora::data::instruct::{read, read_from, Format, Prompted};
use monteclora::eval::{score_choices, Benchmark, Normalize};
use monteclora::inject::Targets;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::generate::GenerateConfig;
use monteclora::models::hub::ModelFiles;
use monteclora::study::{self, CellKey, CellResult, EvaluatedTask, Grid, LanguageTrial, Shard, Status};
use monteclora::train::{fit, held_out_loss, CausalTuning, Method, MethodInit, TrainConfig};
use monteclora::{Noise, Params, Pass};
use serde_json::{json, Value};

use crate::support::checkpoints::Log;
use crate::support::{asset, small, Outcome};

/// Questions with a choice of two or three numbers, in the format of instruction data.
fn questions(count: usize) -> Outcome<Vec<Prompted>> {
    let question = |i: usize| -> Value {
        let (a, b) = (2 + i % 5, 1 + i % 3);
        let mut names = vec![format!("{}", a + b), format!("{}", a + b + 1)];
        names.extend(i.is_multiple_of(2).then(|| format!("{}", a + b + 2)));
        names.rotate_left(i % 2);
        let instruction =
            format!("Tom has {a} and {b} cats. How many?\n\nAnswer format: {}", names.join("/"));
        let answer = format!("{}", a + b);
        json!({"instruction": instruction, "output": format!("He has {answer}"), "answer": answer})
    };
    let text = Value::from((0..count).map(question).collect::<Vec<_>>()).to_string();
    Ok(read_from(text.as_bytes(), Path::new("questions.json"), Format::Instruct)?)
}

/// The bundled model, with training rows of both kinds and three tasks.
struct Home {
    files: ModelFiles,
    config: DecoderConfig,
    encoder: PromptEncoder,
    rows: Vec<Prompted>,
    train: Vec<Tokens>,
    tasks: Vec<EvaluatedTask>,
}

impl Home {
    fn new() -> Outcome<Self> {
        let (dir, gsm8k) = (asset("stories260k"), asset("gsm8k"));
        let files = ModelFiles::locate(&dir.display().to_string(), None)?;
        let config = DecoderConfig::from_file(files.config_path())?;
        let tokenizer = monteclora::data::tokenizer::read(&dir.join("tokenizer.json"))?;
        let ends = config.eos_token_ids.clone();
        let encoder = PromptEncoder::new(tokenizer, 500, 512, ends, false)?;
        let mut rows = questions(32)?;
        let measured = rows.split_off(24);
        let problems = |file: &str, count| -> Outcome<Vec<Prompted>> {
            Ok(read(&gsm8k.join(file), Format::Gsm8k)?.into_iter().take(count).collect())
        };
        rows.extend(problems("train.jsonl", 8)?);
        let train = encoder.encode(&rows)?.rows;
        let task = |name: &str, benchmark, rows: &[Prompted]| EvaluatedTask {
            name: name.to_string(),
            benchmark,
            rows: rows.to_vec(),
            generation: GenerateConfig { max_new_tokens: 8, ..GenerateConfig::default() },
        };
        let tasks = vec![
            task("cats", Benchmark::Choice(Normalize::No), &measured),
            task("cats-by-name", Benchmark::ChoiceByName, &measured[..2]),
            task("gsm8k", Benchmark::Gsm8k, &problems("test.jsonl", 2)?),
        ];
        Ok(Self { files, config, encoder, rows, train, tasks })
    }

    fn trial(&self) -> LanguageTrial<'_> {
        LanguageTrial {
            files: &self.files,
            rows: &self.rows,
            train: &self.train,
            limit_train: None,
            tasks: &self.tasks,
            encoder: &self.encoder,
            epochs: 2,
            draws: 2,
            base_dtype: DType::F32,
            checkpoint_layers: false,
            device: &Device::Cpu,
        }
    }
}

fn key(method: &str, lr: f64) -> CellKey {
    CellKey { task: "numbers".to_string(), method: method.to_string(), lr, batch_size: 8, seed: 3 }
}

/// The tasks in a result.
const TASKS: [&str; 4] = ["cats", "cats-by-name", "gsm8k-flexible_extract", "gsm8k-strict_match"];

#[test]
fn every_recipe_is_trained_once_and_measured_on_every_task() -> Outcome {
    let home = Home::new()?;
    let trial = LanguageTrial { epochs: 1, limit_train: Some(16), ..home.trial() };
    for name in study::recipe::NAMES {
        let method = small(name);
        let (result, cost, rows) = trial.run(&key(&method, 2e-3));
        assert_eq!((result.status, &result.reason), (Status::Done, &None), "{name}");
        assert!(result.tasks.keys().eq(TASKS) && result.arms.is_empty(), "{name}: {:?}", result.tasks);
        for (task, found) in &result.tasks {
            let [mean, draws, temperature] =
                ["mean", "2 draws", "temperature"].map(|arm| found.arms.get(arm));
            assert!(mean.is_some_and(|metrics| metrics.accuracy.is_some()), "{name}, {task}");
            let drawn = name.starts_with("monteclora") && name != "monteclora-released";
            assert_eq!(draws.is_some(), drawn || name == "blob", "{name}, {task}");
            assert!(temperature.is_none(), "{name}, {task}: nothing was held out");
            let likelihoods = mean.is_some_and(|metrics| metrics.nll.is_some_and(|nll| nll > 0.0));
            assert_eq!(
                likelihoods,
                ["cats", "gsm8k-strict_match"].contains(&task.as_str()),
                "{name}, {task}"
            );
            let binned: usize =
                found.reliability.get("mean").into_iter().flatten().map(|bin| bin.count).sum();
            assert_eq!(binned, if task == "cats" { 8 } else { 0 }, "{name}, {task}");
        }
        // The scores can be computed again from the rows that are kept.
        assert!(rows.tasks.keys().eq(["cats"]) && rows.tasks["cats"].row.len() == 8, "{name}");
        let (cats, kept) = (&result.tasks["cats"].arms, &rows.tasks["cats"]);
        assert!(kept.arms.keys().eq(cats.keys()), "{name}");
        for (arm, metrics) in cats {
            let (probabilities, classes) = kept.probabilities(arm).ok_or("no rows")?;
            let rows: Vec<Vec<f64>> = probabilities.chunks(classes).map(<[f64]>::to_vec).collect();
            let again = monteclora::metrics::nll(&rows, &kept.label)?;
            assert!(metrics.nll.is_some_and(|nll| (nll / again - 1.0).abs() < 1e-6), "{name} {arm}");
        }
        assert_eq!((result.steps, result.losses.len()), (2, 2), "{name}");
        assert!(cost.seconds > 0.0 && result.trainable_parameters > 0, "{name}");
    }
    Ok(())
}

#[test]
fn a_cell_says_what_the_same_training_says_by_hand() -> Outcome {
    let home = Home::new()?;
    let (result, ..) = home.trial().run(&key("lora:rank=4:alpha=8", 5e-3));

    let noise = Noise::new(3);
    let params = Params::new(noise, &Device::Cpu);
    let base = home.files.var_builder(DType::F32, &Device::Cpu)?;
    let mut model = DecoderForCausalLM::load(base, &home.config, noise)?;
    let method = Method::Lora(LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() });
    let hooks = MethodInit::Fresh(method, Targets::default()).inject(&mut model, &params)?;
    let [cats, _, gsm8k] = &home.tasks[..] else { return Err("three tasks".into()) };
    let score = |model: &DecoderForCausalLM| -> Outcome<_> {
        Ok(score_choices(model, &home.encoder, &cats.rows, 4, Normalize::No, &[Pass::Mean])?.evaluate()?)
    };
    let before = score(&model)?;
    let (batcher, pad_id) = (Batcher::new(8, false, noise)?, home.config.pad_id());
    let objective = CausalTuning::new(&model, hooks, &home.train, batcher, pad_id);
    let config = TrainConfig { epochs: 2, lr: 5e-3, keep_best: false, ..TrainConfig::default() };
    fit(&objective, &params, &config, &mut Log::default())?;

    let near = |got: Option<f64>, want: Option<f64>| {
        got.zip(want).is_some_and(|(got, want)| (got - want).abs() < 1e-4 * want.abs().max(1.0))
    };
    let (got, want) = (&result.tasks["cats"].arms["mean"], score(&model)?);
    assert_eq!(got.accuracy, want.accuracy);
    assert!(near(got.nll, want.nll) && near(got.brier, want.brier), "{got:?}, {want:?}");
    assert!(!near(got.nll, before.nll), "it has learnt nothing: {got:?}, {before:?}");
    let answers = home.encoder.encode(&gsm8k.rows)?.rows;
    let loss = held_out_loss(&model, &answers, 1, &[Pass::Mean])?;
    assert!(near(result.tasks["gsm8k-strict_match"].arms["mean"].nll, Some(loss)), "{loss}");
    Ok(())
}

#[test]
fn a_temperature_is_fitted_on_rows_that_the_recipe_holds_out() -> Outcome {
    let home = Home::new()?;
    // 24 questions and 8 problems; a quarter of 24 drawn rows is held out.
    let trial = LanguageTrial { limit_train: Some(24), ..home.trial() };
    let (result, ..) = trial.run(&key("lora:rank=4:alpha=8:held-out=0.25", 5e-3));
    assert_eq!((result.status, &result.reason, result.steps), (Status::Done, &None, 2 * 3));
    let [cats, gsm8k] = ["cats", "gsm8k-strict_match"].map(|task| &result.tasks[task].arms);
    assert!(cats.keys().eq(["mean", "temperature"]) && gsm8k.keys().eq(["mean"]));
    // A temperature changes the confidence of a choice, not the choice itself.
    let (mean, warm) = (&cats["mean"], &cats["temperature"]);
    assert!(warm.accuracy == mean.accuracy && warm.nll != mean.nll, "{warm:?}, {mean:?}");
    let other = CellKey { seed: 4, ..result.key.clone() };
    assert_ne!(trial.run(&other).0.losses, result.losses);
    // With any method, as for classifiers.
    let (dora, ..) = trial.run(&key("dora:rank=4:alpha=8:held-out=0.25", 5e-3));
    assert!(dora.tasks["cats"].arms.keys().eq(["mean", "temperature"]), "{:?}", dora.reason);
    Ok(())
}

#[test]
fn draws_without_width_say_what_the_mean_does() -> Outcome {
    let home = Home::new()?;
    let (result, ..) = home.trial().run(&key("monteclora:rank=4:alpha=8:eps=1e-9", 5e-3));
    for task in ["cats", "gsm8k-strict_match"] {
        let [mean, draws] = ["mean", "2 draws"].map(|arm| result.tasks[task].arms[arm].nll);
        let (mean, draws) = (mean.ok_or("no NLL")?, draws.ok_or("no NLL")?);
        assert!((mean - draws).abs() < 1e-4 && mean > 0.01, "{task}: {mean} {draws}");
    }
    Ok(())
}

/// Runs the cells of a small grid that have no result in `dir` yet; returns their number.
fn run_grid(home: &Home, dir: &Path, shard: Shard) -> Outcome<usize> {
    let methods = ["lora:rank=4:alpha=8", "monteclora:rank=4:alpha=8"].map(String::from).to_vec();
    let (lrs, batch_sizes) = (vec![5e-3, 1e30], vec![16]);
    let grid = Grid { lrs, batch_sizes, ..Grid::paper_llama(vec!["numbers".to_string()], methods) };
    let (trial, mut ran) = (home.trial(), 0);
    let mut cell = |key: &CellKey| {
        ran += 1;
        trial.run(key)
    };
    study::run(dir, &json!({"epochs": 2}), &grid.cells()?, shard, &mut cell, &mut |_, _| ())?;
    Ok(ran)
}

#[test]
fn a_study_that_was_killed_goes_on_and_its_report_has_every_task() -> Outcome {
    let home = Home::new()?;
    let (whole, killed) = (tempfile::tempdir()?, tempfile::tempdir()?);
    assert_eq!(run_grid(&home, whole.path(), Shard::WHOLE)?, 4);
    assert_eq!(run_grid(&home, killed.path(), "1/2".parse()?)?, 2);
    // As after a kill: the cell has its cost, which is written first, but no result.
    let cut = killed.path().join(key("lora:rank=4:alpha=8", 5e-3).folder_name().replace("bs8-s3", "bs16-s1"));
    std::fs::remove_file(cut.join("result.json"))?;
    assert_eq!(run_grid(&home, killed.path(), Shard::WHOLE)?, 3);
    assert_eq!(run_grid(&home, killed.path(), Shard::WHOLE)?, 0);
    let rows = study::read_rows(killed.path())?;
    let kept: Vec<&str> = rows.keys().map(String::as_str).collect();
    let cats = |method| format!("cats-{method}_rank=4_alpha=8-lr0.005-bs16-s1");
    assert_eq!(kept, [cats("lora"), cats("monteclora")]);
    let results = |dir: &Path| -> Outcome<Vec<CellResult>> {
        Ok(study::read_cells(dir)?.into_iter().map(|cell| cell.result).collect())
    };
    let cells = results(whole.path())?;
    assert_eq!(results(killed.path())?, cells);

    // The report of the packed study has the same bytes.
    let report = |dir: &Path| -> Outcome<String> {
        study::write_report(dir, dir)?;
        Ok(["report.md", "cells.csv"]
            .map(|file| std::fs::read_to_string(dir.join(file)))
            .into_iter()
            .collect::<std::io::Result<String>>()?)
    };
    let text = report(whole.path())?;
    study::pack(killed.path())?;
    assert_eq!(study::read_rows(killed.path())?, rows);
    assert_eq!(report(killed.path())?, text);
    for task in TASKS {
        assert!(text.contains(&format!("## {task} (accuracy)")), "{task}: {text}");
    }
    let done = cells.iter().filter(|cell| cell.status == Status::Done);
    let accuracy = done.clone().map(|cell| cell.tasks["cats"].arms["mean"].accuracy.unwrap_or(f64::NAN));
    assert_eq!(accuracy.clone().count(), 2);
    for accuracy in accuracy {
        let row = format!("(mean) | {accuracy:.4} | {accuracy:.4} | 0.0000");
        assert!(text.contains(&row), "{row}: {text}");
    }
    // A diverged cell counts as diverged on every task: one done, one diverged, none failed.
    let diverged: Vec<_> = cells.iter().filter(|cell| cell.status == Status::Diverged).collect();
    assert!(diverged.iter().all(|cell| cell.tasks.keys().eq(TASKS)) && diverged.len() == 2);
    for method in ["lora", "monteclora"] {
        let mean = format!("| {method}:rank=4:alpha=8 (mean) |");
        let counted = |line: &&str| line.starts_with(&mean) && line.ends_with("| 1 | 1 | 0 |");
        assert_eq!(text.lines().filter(counted).count(), TASKS.len(), "{text}");
    }
    Ok(())
}
