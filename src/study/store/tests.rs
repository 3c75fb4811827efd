use serde_json::json;

use super::*;
use crate::metrics::Metrics;
use crate::study::{run, write_report, Shard, Status};

fn keys() -> Vec<CellKey> {
    let key = |(method, lr): (&str, f64)| CellKey {
        task: "rte".to_string(),
        method: method.to_string(),
        lr,
        batch_size: 8,
        seed: 1,
    };
    [("lora", 1e-3), ("monteclora:n=8", 1e-3), ("lora", 1e-4), ("monteclora:n=8", 1e-4)].map(key).to_vec()
}

/// A cell that is done, with an infinite NLL at the lowest learning rate. LoRA keeps its rows.
fn cell(key: &CellKey) -> (CellResult, CellCost, CellRows) {
    let nll = if key.lr < 5e-4 { f64::INFINITY } else { 0.1 + 0.2 };
    let metrics = Metrics { accuracy: Some(key.lr * 700.0), nll: Some(nll), ..Metrics::default() };
    let result = CellResult {
        key: key.clone(),
        status: Status::Done,
        reason: None,
        metric: "accuracy".to_string(),
        arms: [("mean".to_string(), metrics)].into(),
        losses: vec![(1, 0.7), (2, 1.0 / 3.0)],
        reliability: BTreeMap::new(),
        tasks: BTreeMap::new(),
        ood: BTreeMap::new(),
        trainable_parameters: 1,
        steps: 2,
    };
    let mut rows = CellRows { row: vec![3, 5], label: vec![0, 1], ..CellRows::default() };
    if key.method == "lora" {
        rows.add("mean", &[vec![1.0 - key.lr, key.lr], vec![0.5, 0.5]]);
    }
    (result, CellCost { seconds: 1.5, step_seconds_median: key.lr, peak_rss_mb: None }, rows)
}

/// Runs the unfinished cells of these keys. Returns the number of cells that ran and of all finished cells.
fn run_cells(dir: &Path, keys: &[CellKey]) -> Result<(usize, usize)> {
    let mut ran = 0;
    let mut counted = |key: &CellKey| {
        ran += 1;
        cell(key)
    };
    let settings = json!({"epochs": 1});
    let done = run(dir, &settings, keys, Shard::WHOLE, &mut counted, &mut |_, _| ())?.done;
    Ok((ran, done))
}

/// The bytes of all files of a report.
fn report(dir: &Path) -> Result<Vec<Vec<u8>>> {
    write_report(dir, dir)?;
    ["report.md", "report.csv", "cells.csv", "costs.md"]
        .map(|file| bytes(&dir.join(file)))
        .into_iter()
        .collect()
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io(path))
}

/// The number of folders in a folder.
fn folders(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
}

#[test]
fn a_packed_study_reports_the_same_bytes_and_goes_on() -> Result<()> {
    let (home, keys) = (tempfile::tempdir().unwrap(), keys());
    let dir = home.path();
    assert_eq!(run_cells(dir, &keys[..3])?, (3, 3));
    let (cells, want) = (read_cells(dir)?, report(dir)?);
    assert_eq!(pack(dir)?, 3);
    assert_eq!(folders(dir), 0);
    assert_eq!((read_cells(dir)?, report(dir)?), (cells, want));
    let packed = bytes(&dir.join(PACKED))?;
    let first = String::from_utf8_lossy(&packed).lines().next().unwrap().to_string();
    assert!(first.starts_with(r#"{"result":{"key":{"task":"rte","method":"lora","lr":0.0001,"#), "{first}");
    // Packing again changes nothing.
    assert_eq!((pack(dir)?, bytes(&dir.join(PACKED))?), (3, packed.clone()));

    // The study continues with the missing cell, in a folder next to the packed cells.
    assert_eq!(run_cells(dir, &keys)?, (1, 4));
    assert_eq!((folders(dir), bytes(&dir.join(PACKED))?), (1, packed));
    let whole = tempfile::tempdir().unwrap();
    run_cells(whole.path(), &keys)?;
    assert_eq!(report(dir)?, report(whole.path())?);
    assert_eq!(pack(dir)?, 4);
    assert_eq!(report(dir)?, report(whole.path())?);
    // The bytes do not depend on when the study was packed.
    pack(whole.path())?;
    assert_eq!(bytes(&dir.join(PACKED))?, bytes(&whole.path().join(PACKED))?);
    assert_eq!(run_cells(dir, &keys)?, (0, 4));
    Ok(())
}

#[test]
fn rows_of_all_cells_come_into_one_file() -> Result<()> {
    let (home, keys) = (tempfile::tempdir().unwrap(), keys());
    let dir = home.path();
    let want: BTreeMap<String, CellRows> =
        [&keys[0], &keys[2]].map(|key| (key.folder_name(), cell(key).2)).into();
    run_cells(dir, &keys[..2])?;
    assert_eq!(read_rows(dir)?.len(), 1);
    pack(dir)?;
    run_cells(dir, &keys)?;
    // One cell is packed, and the other is in its folder.
    assert_eq!(read_rows(dir)?, want);
    pack(dir)?;
    assert_eq!((folders(dir), read_rows(dir)?), (0, want));
    let damaged = &bytes(&dir.join(ROWS))?[..100];
    fs::write(dir.join(ROWS), damaged).unwrap();
    assert!(read_rows(dir).unwrap_err().to_string().contains(ROWS));
    Ok(())
}

#[test]
fn what_is_damaged_or_not_the_same_is_named() -> Result<()> {
    let (home, keys) = (tempfile::tempdir().unwrap(), keys());
    let dir = home.path();
    let refused = |what: &str| {
        let said = [read_cells(dir).map(|_| ()), run_cells(dir, &keys).map(|_| ()), pack(dir).map(|_| ())];
        for error in said.map(|said| said.unwrap_err().to_string()) {
            assert!(error.contains(what), "{error}");
        }
    };
    assert!(pack(dir).unwrap_err().to_string().contains("no finished cell"));
    assert!(pack(&dir.join("nowhere")).is_err() && !dir.join("nowhere").exists());
    run_cells(dir, &keys)?;
    pack(dir)?;
    let packed = String::from_utf8(bytes(&dir.join(PACKED))?).unwrap();
    let lines: Vec<&str> = packed.lines().collect();
    let write = |lines: [&str; 3]| fs::write(dir.join(PACKED), lines.join("\n")).unwrap();
    write([lines[0], lines[1], &lines[2][..lines[2].len() / 2]]);
    refused("cells.jsonl, line 3: malformed: EOF while parsing");
    write([lines[0], &lines[1].replace("0.001", "one"), lines[2]]);
    refused("cells.jsonl, line 2: malformed");
    write([lines[0], lines[1], lines[0]]);
    refused("cells.jsonl, line 3: rte-lora-lr0.0001-bs8-s1 comes twice");

    fs::write(dir.join(PACKED), &packed).unwrap();
    let (mut other, cost, rows) = cell(&keys[0]);
    let store = Store::open(dir)?;
    store.add(&other, &cost, &rows)?;
    assert_eq!(read_cells(dir)?.len(), 4); // the state after a process was killed while packing
    other.steps += 1;
    store.add(&other, &cost, &rows)?;
    refused("result.json: it differs from the result of this cell in cells.jsonl");
    Ok(())
}

#[test]
fn a_copy_under_another_name_is_refused() -> Result<()> {
    let (home, keys) = (tempfile::tempdir().unwrap(), keys());
    let (dir, name) = (home.path(), keys[0].folder_name());
    run_cells(dir, &keys[..1])?;
    fs::rename(dir.join(&name), dir.join("copy")).unwrap();
    // The cell is run again, and the copy would count twice.
    assert_eq!(run_cells(dir, &keys[..1])?, (1, 1));
    for said in [read_cells(dir).map(|_| ()), pack(dir).map(|_| ())] {
        let error = said.unwrap_err().to_string();
        assert!(error.contains(&format!("copy: it holds the result of {name}")), "{error}");
    }
    Ok(())
}

#[test]
fn a_cell_that_failed_is_run_again_packed_or_not() -> Result<()> {
    let (home, keys) = (tempfile::tempdir().unwrap(), keys());
    let dir = home.path();
    let mut fails = |key: &CellKey| {
        let (result, cost, _) = cell(key);
        let reason = Some("no space left on device".to_string());
        (CellResult { status: Status::Failed, reason, ..result }, cost, CellRows::default())
    };
    let mut run_to_fail =
        || run(dir, &json!({"epochs": 1}), &keys[..2], Shard::WHOLE, &mut fails, &mut |_, _| ());
    assert_eq!(run_to_fail()?.failed, 2);
    assert_eq!(run_cells(dir, &keys[..1])?, (1, 1));
    assert_eq!(pack(dir)?, 2);
    let statuses = || -> Result<Vec<Status>> {
        Ok(read_cells(dir)?.into_iter().map(|cell| cell.result.status).collect())
    };
    assert_eq!(statuses()?, [Status::Done, Status::Failed]);
    // Only the packed failure is run again; its new result replaces it and is then packed.
    assert_eq!(run_cells(dir, &keys[..2])?, (1, 2));
    assert_eq!(statuses()?, [Status::Done, Status::Done]);
    assert_eq!((pack(dir)?, statuses()?), (2, vec![Status::Done, Status::Done]));
    let whole = tempfile::tempdir().unwrap();
    run_cells(whole.path(), &keys[..2])?;
    assert_eq!(report(dir)?, report(whole.path())?);
    Ok(())
}
