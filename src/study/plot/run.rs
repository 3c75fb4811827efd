//! Plots the curves of one run from its logs: loss, metrics and learning rate over the steps.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::draw::{self, Ground, Panel, Panels};
use crate::error::{Error, Result};
use crate::util::json;

/// The most points of a curve: longer curves are averaged in groups, and a band shows their extremes.
const POINTS: usize = 400;

/// Curves by name: steps and values, in the order of the steps.
type Curves = BTreeMap<String, Vec<(f64, f64)>>;

/// Plots the run in the folder `run` into the folder `out`, as SVG and as PNG: `loss` (with its parts) and
/// `learning-rate` from `log.jsonl`, `metric` from `evaluations.jsonl`, if the run has them.
///
/// # Errors
/// If a file cannot be read or written, or a line of a log is malformed; the error names the file.
pub fn write_run(run: &Path, out: &Path) -> Result<()> {
    let mut steps = read(&run.join("log.jsonl"))?;
    let rates: Curves =
        steps.remove("lr").map(|rates| ("learning rate".to_string(), rates)).into_iter().collect();
    steps.retain(|name, _| !["epoch", "grad_norm"].contains(&name.as_str()));
    let pictures = [
        ("loss", "training loss", "loss", steps),
        ("metric", "evaluations", "value", read(&run.join("evaluations.jsonl"))?),
        ("learning-rate", "learning rate", "learning rate", rates),
    ];
    for (file, title, y, curves) in pictures {
        let mut panels: Vec<Panel> =
            curves.into_iter().filter_map(|(name, points)| panel(name, &points)).collect();
        // The total loss first, then the task's part of it.
        panels.sort_by_key(|panel| (panel.name != "loss", panel.name != "task"));
        if !panels.is_empty() {
            std::fs::create_dir_all(out).map_err(Error::io(out))?;
            let picture = Panels { title: title.to_string(), axes: ("step", y), ground: Ground::Own, panels };
            draw::write(&picture, out, file)?;
        }
    }
    Ok(())
}

/// The numbers in a log's lines by name; empty if there is no log.
fn read(path: &Path) -> Result<Curves> {
    let text = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Curves::new()),
        text => text.map_err(Error::io(path))?,
    };
    let mut curves = Curves::new();
    for (line, number) in text.split(|byte| *byte == b'\n').zip(1..).filter(|(line, _)| !line.is_empty()) {
        let line: Map<String, Value> = json::parse(line, path).map_err(|error| match error {
            Error::Format { path, reason, .. } => Error::format_at(path, number, reason),
            other => other,
        })?;
        let Some(step) = line.get("step").and_then(Value::as_f64) else {
            return Err(Error::format_at(path, number, "expected a step"));
        };
        for (name, value) in line.iter().filter(|(name, _)| *name != "step") {
            if let Some(value) = value.as_f64() {
                curves.entry(name.clone()).or_default().push((step, value));
            }
        }
    }
    Ok(curves)
}

/// A curve of at most [`POINTS`] points; `None` without points.
fn panel(name: String, points: &[(f64, f64)]) -> Option<Panel> {
    let size = points.len().div_ceil(POINTS).max(1);
    let mean = |part: &[(f64, f64)]| {
        let sum = part.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / part.len() as f64, sum.1 / part.len() as f64)
    };
    let extremes = |part: &[(f64, f64)]| {
        part.iter().fold((f64::MAX, f64::MIN), |(low, high), (_, value)| (low.min(*value), high.max(*value)))
    };
    let band = if size > 1 { points.chunks(size).map(extremes).collect() } else { Vec::new() };
    let points: Vec<(f64, f64)> = points.chunks(size).map(mean).collect();
    // A line through a single point would be invisible.
    let marked = points.len() < 20;
    (!points.is_empty()).then_some(Panel { name, points, band, scatter: Vec::new(), marked })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_s_curves_are_those_of_its_logs() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
        let write =
            |name: &str, text: String| std::fs::write(dir.path().join(name), text).map_err(Error::io(name));
        let out = dir.path().join("plots");
        write_run(dir.path(), &out)?;
        assert!(!out.exists());
        let line = |i: usize| {
            format!(
                "{{\"step\":{i},\"epoch\":0.1,\"lr\":1e-3,\"loss\":{},\"task\":0.5,\"grad_norm\":1.0}}\n",
                i % 7
            )
        };
        let skipped = "{\"step\":3,\"skipped\":\"why\"}\n".to_string();
        write("log.jsonl", (1..=2).map(line).chain([skipped]).chain((4..=2000).map(line)).collect())?;
        write("evaluations.jsonl", "{\"step\":2000,\"dev/accuracy\":0.8,\"dev/nll\":0.5}\n".to_string())?;
        write_run(dir.path(), &out)?;
        for (file, names) in [
            ("loss", &["loss", "task"][..]),
            ("metric", &["dev/accuracy", "dev/nll"]),
            ("learning-rate", &["learning rate"]),
        ] {
            let path = out.join(format!("{file}.svg"));
            let svg = std::fs::read_to_string(&path).map_err(Error::io(&*path))?;
            assert!(svg.starts_with("<svg") && names.iter().all(|name| svg.contains(name)), "{file}");
            assert!(!svg.contains("grad_norm") && svg.len() < 200_000, "{file}: {}", svg.len());
            assert!(out.join(format!("{file}.png")).exists());
        }
        write("log.jsonl", "{\"step\":1}\n{\"loss\":1}\n".to_string())?;
        let error = write_run(dir.path(), &out).unwrap_err().to_string();
        assert!(error.contains("log.jsonl, line 2: expected a step"), "{error}");
        Ok(())
    }

    #[test]
    fn many_points_are_put_together_within_their_extremes() {
        let points: Vec<(f64, f64)> = (0..1000).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        let panel = panel("loss".to_string(), &points).expect("a panel");
        assert_eq!((panel.points.len(), panel.band.len()), (334, 334));
        assert_eq!((panel.points[0], panel.band[0]), ((1.0, 1.0 / 3.0), (0.0, 1.0)));
        assert!(super::panel(String::new(), &[]).is_none());
    }
}
