use serde_json::{json, Value};

use super::*;
use crate::metrics::{ece_debiased, nll, Metrics};
use crate::noise::{Noise, Purpose};
use crate::study::plan::Plan;
use crate::study::store::Store;

const ROWS: usize = 150;
const RATES: [f64; 2] = [1e-3, 3e-3];

/// A study of two tasks whose labels are 1 with probability sigmoid(1.5 z). MonteCLoRA predicts about that;
/// LoRA is overconfident, the more so at the higher learning rate, and its temperature halves the logits.
fn study() -> Vec<(CellResult, CellRows)> {
    let mut cells = Vec::new();
    for (t, task) in ["cola", "mrpc"].into_iter().enumerate() {
        let (mut z, mut u) = ([0.0; ROWS], [0.0; ROWS]);
        Noise::new(1).stream("z", Purpose::Predict).fill_normal(t as u64, &mut z);
        Noise::new(1).stream("labels", Purpose::Predict).fill_uniform(t as u64, &mut u);
        let share = |z: f64| 1.0 / (1.0 + (-z).exp());
        let label: Vec<u32> = z.iter().zip(&u).map(|(z, u)| u32::from(*u < share(1.5 * z))).collect();
        for seed in [1, 2, 3] {
            for (rate, lr) in RATES.into_iter().enumerate() {
                let mut own = [0.0; ROWS];
                let draw = 100 * t as u64 + 10 * seed + rate as u64;
                Noise::new(2).stream("own", Purpose::Predict).fill_normal(draw, &mut own);
                let predicted = |slope: f64| -> Vec<Vec<f64>> {
                    let p = |(z, e): (&f64, &f64)| share(1.5 * slope * z + 0.1 * e);
                    z.iter().zip(&own).map(p).map(|p| vec![1.0 - p, p]).collect()
                };
                let steep = 3.0 + 2.0 * rate as f64;
                for (method, arms) in [
                    ("lora", vec![("mean", predicted(steep))]),
                    (
                        "lora:held-out=0.15",
                        vec![("mean", predicted(steep)), ("temperature", predicted(steep / 2.0))],
                    ),
                    ("monteclora", vec![("mean", predicted(1.1)), ("5 draws", predicted(1.0))]),
                ] {
                    let mut rows = CellRows { row: (0..ROWS as u32).collect(), ..CellRows::default() };
                    rows.label.clone_from(&label);
                    let mut result = CellResult {
                        key: CellKey {
                            task: task.to_string(),
                            method: method.to_string(),
                            lr,
                            batch_size: 8,
                            seed,
                        },
                        status: Status::Done,
                        reason: None,
                        metric: if t == 0 { "matthews" } else { "accuracy" }.to_string(),
                        arms: BTreeMap::new(),
                        losses: vec![(1, 0.7)],
                        reliability: BTreeMap::new(),
                        tasks: BTreeMap::new(),
                        ood: BTreeMap::new(),
                        trainable_parameters: 3,
                        steps: 1,
                    };
                    for (treatment, probabilities) in arms {
                        let metrics = Metrics::classification(&probabilities, &label);
                        result.arms.insert(treatment.to_string(), metrics.unwrap_or_default());
                        rows.add(treatment, &probabilities);
                    }
                    cells.push((result, rows));
                }
            }
        }
    }
    cells
}

fn plan() -> Value {
    json!({
        "name": "few rows", "model": "toy", "tasks": ["cola", "mrpc"],
        "methods": [{"recipes": ["lora", "lora:held-out=0.15", "monteclora"], "lrs": RATES}],
        "batch_sizes": [8], "seeds": [1, 2, 3], "epochs": 2, "draws": 5,
        "families": {
            "primary": [
                {"arm": "monteclora (5 draws)", "against": "lora (mean)", "scores": ["nll", "ece"]},
                {"arm": "monteclora (5 draws)", "against": "lora:held-out=0.15 (temperature)", "scores": ["nll"]},
            ],
            "accuracy": [{"arm": "monteclora (5 draws)", "against": "lora (mean)", "scores": ["accuracy"]}],
        },
        "success": [
            {"better": {"family": "primary", "p": 0.05}},
            {"sensitivity": {"arm": "monteclora (5 draws)", "against": "lora (mean)", "most": 0.5, "of": "deviation"}},
            {"not_worse": {
                "arm": "monteclora (5 draws)", "against": "lora (mean)", "score": "accuracy", "lr": 1e-3, "by": 0.02,
            }},
        ],
    })
}

/// The report of these cells, with a plan if one is given.
fn report(cells: &[(CellResult, CellRows)], plan: Option<&Value>) -> Result<String> {
    let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
    let store = Store::open(dir.path())?;
    let cost = CellCost { seconds: 1.0, step_seconds_median: 2.0, peak_rss_mb: None };
    cells.iter().try_for_each(|(result, rows)| store.add(result, &cost, rows))?;
    if let Some(plan) = plan {
        let path = dir.path().join("plan");
        std::fs::write(&path, plan.to_string()).map_err(Error::io(&*path))?;
        let (plan, crc) = Plan::read(&path)?;
        let settings = plan.settings(&crc)?.to_string();
        std::fs::write(settings_path(dir.path()), settings).map_err(Error::io(&*path))?;
    }
    write_report(dir.path(), dir.path())?;
    std::fs::read_to_string(dir.path().join("report.md")).map_err(Error::io(dir.path()))
}

/// The lines of a section that begin with `start`.
fn lines<'a>(text: &'a str, section: &str, start: &str) -> Vec<&'a str> {
    let section = text.split(section).nth(1).unwrap_or_default().split("\n## ").next().unwrap_or_default();
    section.lines().filter(|line| line.starts_with(start)).collect()
}

#[test]
fn differences_are_means_over_settings_and_tasks_and_cells_without_rows_add_nothing() -> Result<()> {
    let cells = study();
    let text = report(&cells, None)?;
    // The definition of the table: means over the cells of a task, and then over tasks.
    for (score, of) in
        [("NLL", nll as fn(&[Vec<f64>], &[u32]) -> Result<f64>), ("ECE, debiased", ece_debiased)]
    {
        let mean = |task: &str, method: &str, treatment: &str| -> Result<f64> {
            let own =
                cells.iter().filter(|(result, _)| result.key.task == task && result.key.method == method);
            let scores = own.map(|(_, rows)| {
                let (p, classes) = rows.probabilities(treatment).unwrap_or_default();
                of(&p.chunks(classes).map(<[f64]>::to_vec).collect::<Vec<_>>(), &rows.label)
            });
            let scores: Vec<f64> = scores.collect::<Result<_>>()?;
            Ok(scores.iter().sum::<f64>() / scores.len() as f64)
        };
        let difference = |task| Ok(mean(task, "monteclora", "5 draws")? - mean(task, "lora", "mean")?);
        let both: [Result<f64>; 2] = ["cola", "mrpc"].map(difference);
        let [cola, mrpc] = both;
        let want = format!("{:+.4}", (cola? + mrpc?) / 2.0);
        let start = format!("| monteclora (5 draws) | lora (mean) | {score} | 12 | 3 | ");
        let found = lines(&text, "## Paired comparisons by rows", &start);
        assert!(found.len() == 1 && found[0].starts_with(&format!("{start}{want} | ")), "{want}\n{text}");
    }
    let against = "| monteclora (5 draws) | lora:held-out=0.15 (temperature) | ECE, debiased | 12 | 3 | -";
    assert_eq!(lines(&text, "## Paired comparisons by rows", against).len(), 1, "{text}");

    // 3 pairs of seeds at 2 learning rates; LoRA is far from MonteCLoRA in every cell.
    let chance = lines(&text, "## Chance: lora (mean) against itself", "| cola | NLL | 6 | ");
    assert!(chance.len() == 1 && chance[0].ends_with("| 6 of 6 |"), "{text}");
    let rates = lines(&text, "## Dependence on the learning rate", "| monteclora (5 draws) |");
    assert_eq!(rates.len(), 1, "{text}");
    assert!(lines(&text, "## Scores by rows", "| cola | monteclora (mean) | 6 | ").len() == 1, "{text}");
    assert!(
        lines(
            &text,
            "## Calibration: monteclora (5 draws)",
            "| mrpc | lora:held-out=0.15 (temperature) | 6 |"
        )
        .len()
            == 1
    );

    let without: Vec<_> = cells.iter().map(|(result, _)| (result.clone(), CellRows::default())).collect();
    let short = report(&without, None)?;
    assert!(text.starts_with(&short) && !short.contains("by rows"), "{short}");
    Ok(())
}

#[test]
fn a_plan_is_judged_by_what_it_says_and_open_while_cells_are_missing() -> Result<()> {
    let verdicts = |cells: &[(CellResult, CellRows)], plan: &Value| -> Result<Vec<String>> {
        let text = report(cells, Some(plan))?;
        let section = text.split("### Success").nth(1).unwrap_or_default();
        let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
        let mut found: Vec<String> = rows
            .filter_map(|line| Some(line.trim_end_matches(" |").rsplit_once("| ")?.1.to_string()))
            .collect();
        found.extend(section.lines().filter(|line| line.starts_with("**")).map(str::to_string));
        // The differences of the two tasks add up to twice their mean.
        let row = "| monteclora (5 draws) | lora (mean) | accuracy | ";
        let figures = |line: &str| -> Vec<f64> {
            line.trim_start_matches(row)
                .split(" | ")
                .filter_map(|cell| cell.trim_end_matches(" |").parse().ok())
                .collect()
        };
        let differences = lines(&text, "### Family: accuracy", row);
        let (all, tasks) = (figures(differences[0])[2], figures(differences[1]));
        assert!(tasks.len() == 2 && (tasks[0] + tasks[1] - 2.0 * all).abs() < 2e-4, "{differences:?}");
        assert!(text
            .contains(&format!("CRC-32 of the file: {:08x}", crc32fast::hash(plan.to_string().as_bytes()))));
        Ok(found)
    };
    let cells = study();
    let found = "**All criteria for success in the plan are met.**";
    assert_eq!(verdicts(&cells, &plan())?, ["met", "met", "met", found]);
    // With the arms swapped, nothing is better, and the arm is too sensitive to the learning rate.
    let mut other = plan();
    for pointer in ["/families/primary/0", "/families/primary/1", "/success/1/sensitivity"] {
        let pair = other.pointer_mut(pointer).unwrap();
        let (arm, against) = (pair["arm"].take(), pair["against"].take());
        (pair["arm"], pair["against"]) = (against, arm);
    }
    other["success"][2]["not_worse"]["by"] = json!(-0.5);
    let not = "**Not all criteria for success in the plan are met.**";
    assert_eq!(
        verdicts(&cells, &other)?,
        [
            "not met: not every test finds it better",
            "not met: it depends more on the learning rate",
            "not met: it is worse by more",
            not
        ]
    );
    // The last criterion covers only one learning rate: a cell at the other does not affect it.
    let place = |method: &str| {
        cells.iter().position(|(result, _)| result.key.method == method && result.key.lr > 2e-3)
    };
    let mut fewer = cells.clone();
    fewer.remove(place("lora").unwrap_or_default());
    let open = "undecided: 1 of its cells have not run, or failed";
    let undecided = "**Whether the criteria for success in the plan are met is undecided.**";
    assert_eq!(verdicts(&fewer, &plan())?, [open, open, "met", undecided]);
    // A diverged cell of the tested arm has no score, and would have had a bad one.
    let mut diverged = cells.clone();
    let own = &mut diverged[place("monteclora").unwrap_or_default()];
    (own.0.status, own.1) = (Status::Diverged, CellRows::default());
    own.0.arms.clear();
    let bad = "not met: 1 of its cells diverged";
    assert_eq!(verdicts(&diverged, &plan())?, [bad, bad, "met", not]);
    Ok(())
}

#[test]
fn cells_of_a_task_that_were_measured_on_other_rows_are_no_pair() -> Result<()> {
    let mut cells = study();
    cells[0].1.row[0] = 7777;
    let error = report(&cells, None).map(drop).unwrap_err().to_string();
    assert!(error.contains("not measured on the rows of the other cells"), "{error}");
    Ok(())
}
