use super::*;

/// A cell with these accuracies and NLLs by arm; without any it diverged.
fn cell(task: &str, method: &str, lr: f64, arms: &[(&str, f64, f64)]) -> CellResult {
    let metrics = |(arm, accuracy, nll): &(&str, f64, f64)| {
        let (accuracy, nll) = (Some(*accuracy), Some(*nll));
        (arm.to_string(), Metrics { accuracy, nll, ece: Some(0.1), ..Metrics::default() })
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
    for cell in cells {
        cell.write(dir.path())?;
        CellCost { seconds: 1.0, step_seconds_median: 2.0, peak_rss_mb: Some(3.0) }
            .write(dir.path(), &cell.key)?;
    }
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
    assert!(text.contains("| full (mean) | no pair | no pair | no pair | no pair |"), "{text}");
    let claim = text.split("The paper's claim").nth(1).unwrap_or_default();
    for line in [
        "monteclora (mean) has a smaller spread than lora (mean) at no lower median on 2 of 2 tasks.",
        "metric: p 0.031, n 6, +0.0600 (0.031); NLL: p 0.031, n 6, -0.3500 (0.031).",
        "| rte | 0.1000 | 0.2000 | 0.7600 | 0.7000 | yes |",
    ] {
        assert!(claim.contains(line), "{line}\n{text}");
    }
    let over_tasks = text.split("Mean over 2 tasks").nth(1).unwrap_or_default();
    assert!(over_tasks.contains("| lora (mean) | 0.8000 | 0.7000 | 0.2000 |"), "{text}");
    // Two tasks, both +0.06 and -0.1; six cells of +0.01, +0.06 and +0.11 twice.
    let line =
        "| lora (mean) | p 0.500, n 2, +0.0600 (0.500) | p 0.500, n 2, -0.1000 (0.500) | p 0.031, n 6, \
                +0.0600 (0.031) | p 0.031, n 6, -0.3500 (0.031) |";
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
    // As an older version may have left it: with the arms that came before the failure.
    cells.push(CellResult { status: Status::Failed, ..cell("rte", method, 1e-4, &[("mean", 0.1, 9.0)]) });
    cells.push(cell("rte", "lora", 1e-3, &[("mean", 0.6, 0.5)]));
    let report = written(&cells)?;
    let text = &report["report.md"];
    assert!(text.contains("| rte | 0.0000 | 0.0000 | 0.7000 | 0.6000 | no |"), "{text}");
    assert!(text.contains(&format!("| {method} (mean) | 0.7000 | 0.7000 | 0.0000 |")), "{text}");
    // The tested method is the one that there is; its NLL equals the other's.
    let line =
        "| lora (mean) | p 1.000, n 1, +0.1000 (1.000) | 1 equal pairs | p 1.000, n 1, +0.1000 (1.000) | \
                1 equal pairs |";
    assert!(text.contains(line), "{text}");
    assert!(report["report.csv"].contains(&format!("rte,\"{method}\",mean,accuracy,0.7,")));
    assert!(report["cells.csv"].contains(&format!("rte,\"{method}\",0.001,8,1,done,mean,")));
    Ok(())
}
