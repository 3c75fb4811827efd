//! Plots of a study: scores against the learning rate with a point per seed or, for a single seed, box plots
//! over a grid (the paper's figures 1, 4 and 7); training losses (figure 11); and reliability diagrams.
//! Values that are not finite are left out; plots of scores say how many.

mod draw;
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use draw::{Boxes, Ground, Panel, Panels};
pub use run::write_run;

use super::arm::Arm;
use super::cell::{Bin, CellResult, Status};
use super::store::StoredCell;
use crate::error::{Error, Result};
use crate::metrics::{median, quantile, Metrics};

/// Reads a score from the metrics of an arm, if they have it.
type Score<'a> = dyn Fn(&Metrics) -> Option<f64> + 'a;

/// The number of points of a loss curve.
const POINTS: usize = 50;

/// Writes the plots of some cells into the folder `out`, each as SVG and as PNG: for each task
/// `{task}-metric`, `{task}-nll`, `{task}-loss` and `{task}-reliability`, if the cells have data for them.
///
/// # Errors
/// If a file cannot be written.
pub fn write_plots(cells: &[StoredCell], out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(Error::io(out))?;
    let done = cells.iter().map(|cell| &cell.result).filter(|result| result.status == Status::Done);
    let done: Vec<CellResult> = done.flat_map(CellResult::by_task).collect();
    let mut tasks: BTreeMap<&str, Vec<&CellResult>> = BTreeMap::new();
    for result in &done {
        tasks.entry(&result.key.task).or_default().push(result);
    }
    for (task, cells) in tasks {
        let metric = cells.first().map(|cell| cell.metric.as_str()).unwrap_or_default();
        let seeds: BTreeSet<u64> = cells.iter().map(|cell| cell.key.seed).collect();
        let of_metric = |metrics: &Metrics| metrics.get(metric);
        let scores: [(&str, &str, &Score); 2] =
            [("metric", metric, &of_metric), ("nll", "NLL", &|metrics| metrics.nll)];
        for (kind, name, value) in scores {
            let (file, title) = (format!("{task}-{kind}"), format!("{task}: {name}"));
            if seeds.len() > 1 {
                // A box plot would hide the individual cells: with several seeds, draw each as a point.
                let panels = rates(&cells, value);
                if !panels.is_empty() {
                    let title = format!("{title}, a point for each cell, the line through medians");
                    let axes = ("learning rate", "");
                    draw::write(&Panels { title, axes, ground: Ground::Logarithmic, panels }, out, &file)?;
                }
                continue;
            }
            let groups = groups(&cells, value);
            if !groups.is_empty() {
                draw::write(&Boxes { title, groups }, out, &file)?;
            }
        }
        let curves = [
            (
                "loss",
                "training loss, median and quartiles of cells",
                ("share of training", "loss"),
                losses(&cells),
            ),
            (
                "reliability",
                "reliability, all cells together",
                ("confidence", "accuracy"),
                reliability(&cells),
            ),
        ];
        for (kind, name, axes, panels) in curves {
            if !panels.is_empty() {
                let title = format!("{task}: {name}");
                let ground = if kind == "reliability" { Ground::Diagonal } else { Ground::Plain };
                let picture = Panels { title, axes, ground, panels };
                draw::write(&picture, out, &format!("{task}-{kind}"))?;
            }
        }
    }
    Ok(())
}

/// The values of the cells by method and arm, sorted by name.
fn groups(cells: &[&CellResult], value: &Score) -> Vec<(String, Vec<f64>)> {
    let mut groups: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (cell, (treatment, metrics)) in
        cells.iter().flat_map(|c| c.arms.iter().map(move |scored| (c, scored)))
    {
        let name = Arm::new(&cell.key.method, treatment).to_string();
        groups.entry(name).or_default().extend(value(metrics));
    }
    let finite = |(name, values): (String, Vec<f64>)| {
        let finite: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
        match values.len() - finite.len() {
            0 => (name, finite),
            more => (format!("{name}, {more} not finite"), finite),
        }
    };
    groups.into_iter().map(finite).filter(|(_, values)| !values.is_empty()).collect()
}

/// The values of the cells against the learning rate by method and arm, sorted by name.
fn rates(cells: &[&CellResult], value: &Score) -> Vec<Panel> {
    let mut arms: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for (cell, (treatment, metrics)) in
        cells.iter().flat_map(|c| c.arms.iter().map(move |scored| (c, scored)))
    {
        let name = Arm::new(&cell.key.method, treatment).to_string();
        arms.entry(name).or_default().extend(value(metrics).map(|value| (cell.key.lr.log10(), value)));
    }
    let panel = |(name, values): (String, Vec<(f64, f64)>)| {
        let mut scatter: Vec<(f64, f64)> =
            values.iter().copied().filter(|(_, value)| value.is_finite()).collect();
        scatter.sort_by(|a, b| a.0.total_cmp(&b.0));
        let middle = |rate: &[(f64, f64)]| {
            (rate[0].0, median(&rate.iter().map(|(_, value)| *value).collect::<Vec<f64>>()))
        };
        let points = scatter.chunk_by(|a, b| a.0 == b.0).map(middle).collect();
        let name = match values.len() - scatter.len() {
            0 => name,
            more => format!("{name}, {more} not finite"),
        };
        Panel { name, points, band: Vec::new(), scatter, marked: false }
    };
    arms.into_iter().map(panel).filter(|panel| !panel.points.is_empty()).collect()
}

/// The training losses by method over the completed fraction of training.
fn losses(cells: &[&CellResult]) -> Vec<Panel> {
    let mut methods: BTreeMap<&str, Vec<&CellResult>> = BTreeMap::new();
    for cell in cells.iter().filter(|cell| cell.losses.len() > 1) {
        methods.entry(&cell.key.method).or_default().push(cell);
    }
    let panel = |(method, cells): (&str, Vec<&CellResult>)| {
        let at = |cell: &CellResult, i: usize| cell.losses[(i * (cell.losses.len() - 1)) / (POINTS - 1)].1;
        let (mut points, mut band) = (Vec::new(), Vec::new());
        for i in 0..POINTS {
            let values: Vec<f64> = cells.iter().map(|cell| at(cell, i)).collect();
            let [low, median, high] = [0.25, 0.5, 0.75].map(|share| quantile(&values, share));
            if [low, median, high].iter().all(|value| value.is_finite()) {
                points.push((i as f64 / (POINTS - 1) as f64, median));
                band.push((low, high));
            }
        }
        Panel { name: method.to_string(), points, band, scatter: Vec::new(), marked: false }
    };
    methods.into_iter().map(panel).collect()
}

/// Accuracy over confidence by method and arm, with the bins of all cells combined.
fn reliability(cells: &[&CellResult]) -> Vec<Panel> {
    let mut arms: BTreeMap<String, Vec<Bin>> = BTreeMap::new();
    let diagrams = cells.iter().flat_map(|c| c.reliability.iter().map(move |diagram| (c, diagram)));
    for (cell, (treatment, bins)) in diagrams {
        let name = Arm::new(&cell.key.method, treatment).to_string();
        let sums = arms.entry(name).or_insert_with(|| vec![Bin::default(); bins.len()]);
        for (sum, bin) in sums.iter_mut().zip(bins) {
            sum.count += bin.count;
            sum.confidence += bin.confidence * bin.count as f64;
            sum.accuracy += bin.accuracy * bin.count as f64;
        }
    }
    let point = |bin: &Bin| (bin.confidence / bin.count as f64, bin.accuracy / bin.count as f64);
    let panel = |(name, bins): (String, Vec<Bin>)| {
        let points = bins.iter().filter(|bin| bin.count > 0).map(point).collect();
        Panel { name, points, band: Vec::new(), scatter: Vec::new(), marked: true }
    };
    arms.into_iter().map(panel).collect()
}

#[cfg(test)]
mod tests {
    use super::super::cell::CellKey;
    use super::*;
    use crate::metrics::Metrics;

    fn cell(method: &str, accuracy: f64, seed: u64) -> StoredCell {
        let metrics = Metrics { accuracy: Some(accuracy), nll: Some(f64::INFINITY), ..Metrics::default() };
        let (task, method) = ("rte".to_string(), method.to_string());
        let result = CellResult {
            key: CellKey { task, method, lr: accuracy, batch_size: 8, seed },
            status: Status::Done,
            reason: None,
            metric: "accuracy".to_string(),
            arms: [("mean".to_string(), metrics)].into(),
            losses: vec![(1, 0.7), (2, 0.6)],
            reliability: [("mean".to_string(), vec![Bin { count: 4, confidence: 0.7, accuracy: 0.5 }])]
                .into(),
            tasks: BTreeMap::new(),
            ood: BTreeMap::new(),
            trainable_parameters: 1,
            steps: 2,
        };
        StoredCell { result, cost: None }
    }

    #[test]
    fn pictures_name_what_they_show_and_what_is_not_finite_has_none() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
        let cells: Vec<StoredCell> = [0.5, 0.6, 0.9]
            .into_iter()
            .flat_map(|a| [cell("lora", a, 1), cell("monteclora", a, 1)])
            .collect();
        write_plots(&cells, dir.path())?;
        for kind in ["metric", "loss", "reliability"] {
            let path = dir.path().join(format!("rte-{kind}.svg"));
            let svg = std::fs::read_to_string(&path).map_err(Error::io(&*path))?;
            assert!(svg.starts_with("<svg") && svg.contains("monteclora") && svg.contains("rte"), "{kind}");
        }
        assert!(!dir.path().join("rte-nll.svg").exists());
        write_plots(&[], dir.path())
    }

    #[test]
    fn of_several_seeds_every_cell_is_a_point_over_its_rate() -> Result<()> {
        let stored =
            [(0.5, 1), (0.5, 2), (0.6, 1), (0.6, 2), (0.6, 3)].map(|(a, seed)| cell("lora", a, seed));
        let cells: Vec<&CellResult> = stored.iter().map(|cell| &cell.result).collect();
        let panels = rates(&cells, &|metrics| metrics.accuracy);
        assert_eq!((panels.len(), panels[0].name.as_str()), (1, "lora (mean)"));
        assert_eq!(panels[0].scatter.len(), 5);
        assert_eq!(panels[0].points, [(0.5f64.log10(), 0.5), (0.6f64.log10(), 0.6)]);
        // Without finite values there is no plot.
        assert!(rates(&cells, &|metrics| metrics.nll).is_empty());
        let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
        write_plots(&stored, dir.path())?;
        let path = dir.path().join("rte-metric.svg");
        let svg = std::fs::read_to_string(&path).map_err(Error::io(&*path))?;
        assert!(svg.contains("learning rate") && svg.matches("<circle").count() == 5, "{svg}");
        Ok(())
    }
}
