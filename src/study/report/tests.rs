use super::*;
use crate::metrics::Metrics;
use crate::study::store::Store;
use crate::study::CellRows;

/// A cell with these accuracies and NLLs by treatment; diverged if there are none.
fn cell(task: &str, method: &str, lr: f64, arms: &[(&str, f64, f64)]) -> CellResult {
    let metrics = |(treatment, accuracy, nll): &(&str, f64, f64)| {
        let (accuracy, nll) = (Some(*accuracy), Some(*nll));
        (treatment.to_string(), Metrics { accuracy, nll, ece: Some(0.1), ..Metrics::default() })
    };
    let (task, method) = (task.to_string(), method.to_string());
    CellResult {
        key: CellKey { task, method, lr, batch_size: 8, seed: 1 },
        status: if arms.is_empty() { Status::Diverged } else { Status::Done },
        reason: None,
        metric: "accuracy".to_string(),
        arms: arms.iter().map(metrics).collect(),
        losses: vec![(1, 0.7)],
        reliability: BTreeMap::new(),
        tasks: BTreeMap::new(),
        ood: BTreeMap::new(),
        trainable_parameters: 3,
        steps: 1,
    }
}

fn study() -> Vec<CellResult> {
    let mut cells = Vec::new();
    for (i, lr) in [1e-3, 1e-4, 1e-5].into_iter().enumerate() {
        let i = i as f64;
        for task in ["mrpc", "rte"] {
            cells.push(cell(task, "lora", lr, &[("mean", 0.8 - 0.1 * i, 0.5 + 0.25 * i)]));
            let bayes = [("mean", 0.81 - 0.05 * i, 0.4), ("10 draws", 0.8, f64::INFINITY)];
            cells.push(cell(task, "monteclora", lr, &bayes));
        }
    }
    cells.push(cell("mrpc", "lora", 1.0, &[]));
    cells.push(cell("rte", "full", 1.0, &[]));
    cells
}

fn written(cells: &[CellResult]) -> Result<BTreeMap<&'static str, String>> {
    let dir = tempfile::tempdir().map_err(crate::Error::io("a temporary folder"))?;
    let store = Store::open(dir.path())?;
    let cost = CellCost { seconds: 1.0, step_seconds_median: 2.0, peak_rss_mb: Some(3.0) };
    cells.iter().try_for_each(|cell| store.add(cell, &cost, &CellRows::default()))?;
    write_report(dir.path(), dir.path())?;
    let read = |name| {
        let path = dir.path().join(name);
        Ok((name, std::fs::read_to_string(&path).map_err(crate::Error::io(&*path))?))
    };
    ["report.md", "report.csv", "cells.csv", "costs.md"].into_iter().map(read).collect()
}

#[test]
fn statistics_are_those_of_the_done_cells_and_others_are_counted() -> Result<()> {
    let report = written(&study())?;
    let text = &report["report.md"];
    // best, median, spread, IQR, 1/NLL, NLL, ECE, Brier, done, diverged, failed
    for line in [
        "| lora (mean) | 0.8000 | 0.7000 | 0.2000 | 0.1000 | 1.3333 | 0.7500 | 0.1000 | - | 3 | 1 | 0 |",
        "| lora (mean) | 0.8000 | 0.7000 | 0.2000 | 0.1000 | 1.3333 | 0.7500 | 0.1000 | - | 3 | 0 | 0 |",
        "| monteclora (mean) | 0.8100 | 0.7600 | 0.1000 | 0.0500 | 2.5000 | 0.4000 | 0.1000 | - | 3 | 0 | 0 |",
        "| monteclora (10 draws) | 0.8000 | 0.8000 | 0.0000 | 0.0000 | 0.0000 | inf | 0.1000 | - | 3 | 0 | 0 |",
        "| full (mean) | - | - | - | - | - | - | - | - | 0 | 1 | 0 |",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(text.contains("| full (mean) | no pair | no pair | no pair | no pair | no pair |"), "{text}");
    let claim = text.split("The paper's claim").nth(1).unwrap_or_default();
    // settings, spreads, medians, how the cells of both arms ended
    for line in [
        "monteclora (mean) has a smaller spread than lora (mean) at no lower median on 2 of 2 tasks, 0 undecided.",
        "| mrpc | 3 | 0.1000 | 0.2000 | 0.7600 | 0.7000 | 3/3 | 3/4, 1 diverged | yes |",
        "| rte | 3 | 0.1000 | 0.2000 | 0.7600 | 0.7000 | 3/3 | 3/3 | yes |",
        "| median, over tasks | p 0.500, n 2, +0.0600 (0.500) | p 0.500, n 2, -0.3500 (0.500) |",
        "| spread, over tasks | p 0.500, n 2, -0.1000 (0.500) | p 0.500, n 2, -0.5000 (0.500) |",
        "| settings of all tasks | p 0.031, n 6, +0.0600 (0.031) | p 0.031, n 6, -0.3500 (0.031) |",
    ] {
        assert!(claim.contains(line), "{line}\n{text}");
    }
    let over_tasks = text.split("Mean over 2 tasks").nth(1).unwrap_or_default();
    assert!(over_tasks.contains("| lora (mean) | 0.8000 | 0.7000 | 0.2000 |"), "{text}");
    // Both tasks have +0.06 and -0.1; the six cells have +0.01, +0.06 and +0.11 twice each.
    let line =
        "| lora (mean) | p 0.500, n 2, +0.0600 (0.500) | p 0.500, n 2, -0.3500 (0.500) | p 0.500, n 2, -0.1000 \
                (0.500) | p 0.031, n 6, +0.0600 (0.031) | p 0.031, n 6, -0.3500 (0.031) |";
    assert!(text.contains(line), "{text}");
    assert!(
        report["costs.md"].contains("| monteclora | 6 | 1.0000 | 1.0000 | 1.0000 |"),
        "{}",
        report["costs.md"]
    );
    let csv = &report["cells.csv"];
    assert_eq!(csv.lines().count(), 1 + 6 + 12 + 2);
    assert!(csv.contains("mrpc,lora,1,8,1,diverged,,accuracy,,,,\n"), "{csv}");
    assert!(csv.contains("mrpc,monteclora,0.001,8,1,done,10 draws,accuracy,0.8,inf,0.1,\n"), "{csv}");
    assert!(report["report.csv"].lines().all(|line| line.split(',').count() == 15));
    Ok(())
}

#[test]
fn the_report_does_not_depend_on_the_order_in_which_cells_ended() -> Result<()> {
    let mut cells = study();
    let report = written(&cells)?;
    cells.reverse();
    assert_eq!(written(&cells)?, report);
    Ok(())
}

#[test]
fn what_went_wrong_has_no_score_and_a_comma_moves_no_column() -> Result<()> {
    let method = "monteclora:targets=query,value";
    let mut cells = vec![cell("rte", method, 1e-3, &[("mean", 0.7, 0.5)])];
    // As an older version may have stored it: with the arms measured before the failure.
    cells.push(CellResult { status: Status::Failed, ..cell("rte", method, 1e-4, &[("mean", 0.1, 9.0)]) });
    cells.push(cell("rte", "lora", 1e-3, &[("mean", 0.6, 0.5)]));
    let report = written(&cells)?;
    let text = &report["report.md"];
    let line =
        "| rte | 1 | 0.0000 | 0.0000 | 0.7000 | 0.6000 | 1/2, 1 failed | 1/1 | undecided: fewer than two \
                settings |";
    assert!(text.contains(line), "{text}");
    assert!(text.contains(&format!("| {method} (mean) | 0.7000 | 0.7000 | 0.0000 |")), "{text}");
    // The tested method is the only MonteCLoRA of the study; its NLL equals LoRA's.
    let line =
        "| lora (mean) | p 1.000, n 1, +0.1000 (1.000) | 1 equal pairs | 1 equal pairs | p 1.000, n 1, +0.1000 \
                (1.000) | 1 equal pairs |";
    assert!(text.contains(line), "{text}");
    assert!(report["report.csv"].contains(&format!("rte,\"{method}\",mean,accuracy,0.7,")));
    assert!(report["cells.csv"].contains(&format!("rte,\"{method}\",0.001,8,1,done,mean,")));
    Ok(())
}

/// The line of the claim's table about the task of these cells.
fn claimed(cells: &[CellResult]) -> Result<String> {
    let text = written(cells)?.remove("report.md").unwrap_or_default();
    let claim = text.split("The paper's claim").nth(1).unwrap_or_default();
    let start = format!("| {} |", cells[0].key.task);
    let line = claim.lines().find(|line| line.starts_with(&start));
    Ok(line.map(str::to_string).unwrap_or(text))
}

/// Cells of MonteCLoRA and LoRA with these accuracies at decreasing learning rates; `None` is a diverged
/// cell.
fn arms_of(own: &[Option<f64>], other: &[Option<f64>]) -> Vec<CellResult> {
    let of = |method: &str, scores: &[Option<f64>]| -> Vec<CellResult> {
        let one = |(i, score): (usize, &Option<f64>)| {
            let arms: Vec<_> = score.iter().map(|score| ("mean", *score, 0.5)).collect();
            cell("rte", method, 0.1f64.powi(i as i32), &arms)
        };
        scores.iter().enumerate().map(one).collect()
    };
    [of("monteclora", own), of("lora", other)].concat()
}

#[test]
fn rounding_decides_no_claim_and_what_learns_nothing_neither() -> Result<()> {
    // In f64 0.85 - 0.8 is less than 0.8 - 0.75.
    let line = claimed(&arms_of(&[Some(0.85), Some(0.8)], &[Some(0.8), Some(0.75)]))?;
    assert!(line.ends_with("| 2/2 | 2/2 | no |"), "{line}");
    let line = claimed(&arms_of(&[Some(0.7), Some(0.7)], &[Some(0.7), Some(0.7)]))?;
    assert!(line.ends_with("| undecided: every setting gives the same |"), "{line}");
    Ok(())
}

#[test]
fn divergence_makes_no_claim_hold_and_refutes_none() -> Result<()> {
    let (high, low) = (Some(0.8), Some(0.5));
    // Over done cells, the spreads are 0.05 and 0.3 (LoRA), but MonteCLoRA's worst cell has no score.
    let mut cells = arms_of(&[None, Some(0.75), high], &[low, Some(0.75), high]);
    assert_eq!(
        claimed(&cells)?,
        "| rte | 2 | 0.0500 | 0.0500 | 0.7750 | 0.7750 | 2/3, 1 diverged | 3/3 | no: more of its cells diverged |"
    );
    // The failed setting has no result, and the others alone would say yes.
    cells = arms_of(&[None, Some(0.78), high], &[low, Some(0.7), high]);
    cells[0].status = Status::Failed;
    let line = claimed(&cells)?;
    assert!(line.ends_with("| 2/3, 1 failed | 3/3 | undecided: more of its cells have no score |"), "{line}");
    // LoRA's worst cell has no score: its spread is too small, rather than MonteCLoRA's too large.
    let line = claimed(&arms_of(&[low, Some(0.7), high], &[None, Some(0.75), high]))?;
    assert!(line.ends_with("| undecided: more of the other's cells diverged |"), "{line}");
    // The same number of diverged cells for both, in different settings.
    let line = claimed(&arms_of(&[None, Some(0.78), high, high], &[low, Some(0.7), high, None]))?;
    assert_eq!(
        line,
        "| rte | 2 | 0.0200 | 0.1000 | 0.7900 | 0.7500 | 3/4, 1 diverged | 3/4, 1 diverged | yes |"
    );
    // A half-finished grid: MonteCLoRA's divergence does not count in a setting that LoRA did not run.
    let line = claimed(&arms_of(&[Some(0.7), Some(0.78), None], &[low, high]))?;
    assert!(
        line.ends_with("| 2/3, 1 diverged | 2/2 | undecided: more of its cells have no score |"),
        "{line}"
    );
    // Only LoRA has scores.
    let line = claimed(&arms_of(&[None, None], &[low, high]))?;
    assert_eq!(line, "| rte | 0 | - | - | - | - | 0/2, 2 diverged | 2/2 | no: more of its cells diverged |");
    Ok(())
}

#[test]
fn draws_are_compared_with_the_mean_and_each_treatment_in_common_settings() -> Result<()> {
    let mut cells = Vec::new();
    for (task, shift) in [("mrpc", 0.0), ("rte", 0.1)] {
        for (i, lr) in [1e-3, 1e-4, 1e-5].into_iter().enumerate() {
            let nll = 0.5 + shift + 0.1 * i as f64;
            cells.push(cell(
                task,
                "monteclora:rank=4",
                lr,
                &[("mean", 0.8, nll + 0.02), ("10 draws", 0.8, nll)],
            ));
            let lora = [("mean", 0.8, nll), ("temperature", 0.8, nll - 0.2), ("laplace", 0.8, nll + 1.0)];
            cells.push(cell(task, "lora:rank=4", lr, &lora[..if i < 2 { 3 } else { 1 }]));
        }
    }
    let text = written(&cells)?.remove("report.md").unwrap_or_default();
    let table = text.split("## Calibration: monteclora:rank=4 (10 draws)").nth(1).unwrap_or_default();
    // task, against, settings, NLL of both and test, ECE of both and test
    for line in [
        "| mrpc | monteclora:rank=4 (mean) | 3 | 0.6000 | 0.6200 | p 0.250, n 3, -0.0200 (0.250) | 0.1000 | \
         0.1000 | 3 equal pairs |",
        "| rte | lora:rank=4 (temperature) | 2 | 0.6500 | 0.4500 | p 0.500, n 2, +0.2000 (0.500) |",
        "| rte | lora:rank=4 (laplace) | 2 | 0.6500 | 1.6500 | p 0.500, n 2, -1.0000 (0.500) |",
        "| all | lora:rank=4 (temperature) | 4 | - | - | p 0.125, n 4, +0.2000 (0.125) | - | - | 4 equal pairs |",
        "| all | lora:rank=4 (mean) | 6 | - | - | 6 equal pairs |",
    ] {
        assert!(table.contains(line), "{line}\n{text}");
    }
    assert!(!table.contains("mc dropout"), "{text}");
    Ok(())
}
