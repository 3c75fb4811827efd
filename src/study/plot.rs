//! Plots of a study as SVG: box plots over a grid (the paper's figures 1, 4 and 7), training losses
//! (figure 11), reliability diagrams. They are read in black and white: arms are told apart by place
//! and name, curves by dashes. What is not finite is left out.

use std::collections::BTreeMap;
use std::path::Path;

use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::cell::{Bin, CellResult, Status};
use super::stats::quantile;
use crate::error::{Error, Result};
use crate::files;

/// The width of every picture, in points.
const WIDTH: u32 = 720;

/// Numbers by the names of what they belong to.
type Groups = BTreeMap<String, Vec<f64>>;

/// Writes the plots of some results into the folder `out`: for each task `{task}-metric.svg`,
/// `{task}-nll.svg`, `{task}-loss.svg` and `{task}-reliability.svg`, of what there is.
///
/// # Errors
/// If a file cannot be written.
pub fn write_plots(results: &[CellResult], out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(Error::io(out))?;
    let mut tasks: BTreeMap<&str, Vec<&CellResult>> = BTreeMap::new();
    for result in results.iter().filter(|result| result.status == Status::Done) {
        tasks.entry(&result.key.task).or_default().push(result);
    }
    for (task, cells) in tasks {
        let metric = cells.first().map(|cell| cell.metric.as_str()).unwrap_or_default();
        let write = |kind: &str, picture: Option<String>| match picture {
            Some(svg) => files::write(&out.join(format!("{task}-{kind}.svg")), svg.as_bytes()),
            None => Ok(()),
        };
        let of = |value: &dyn Fn(&crate::metrics::Metrics) -> Option<f64>| {
            let mut groups = Groups::new();
            for (cell, (arm, metrics)) in cells.iter().flat_map(|c| c.arms.iter().map(move |arm| (c, arm))) {
                let finite = value(metrics).filter(|value| value.is_finite());
                groups.entry(format!("{} ({arm})", cell.key.method)).or_default().extend(finite);
            }
            groups.retain(|_, values| !values.is_empty());
            groups
        };
        write("metric", boxes(&format!("{task}: {metric}"), &of(&|metrics| metrics.get(metric)))?)?;
        write("nll", boxes(&format!("{task}: NLL"), &of(&|metrics| metrics.nll))?)?;
        write("loss", curves(&format!("{task}: training loss, median of cells"), &cells)?)?;
        write("reliability", reliability(&format!("{task}: reliability"), &cells)?)?;
    }
    Ok(())
}

/// A picture of this height, drawn by `draw`.
fn picture(height: u32, draw: impl FnOnce(&Area) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        draw(&area).map_err(failed)?;
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

fn failed(error: impl std::fmt::Display) -> Error {
    Error::config("plot", error.to_string())
}

/// Horizontal box plots, one a group: whiskers to 1.5 inter-quartile ranges, as plotters has them.
fn boxes(title: &str, groups: &Groups) -> Result<Option<String>> {
    if groups.is_empty() {
        return Ok(None);
    }
    let all = groups.values().flatten();
    let (low, high) = all.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
    let margin = ((high - low) * 0.05).max(1e-3);
    // From top to bottom in the order of names.
    let names: Vec<&String> = groups.keys().rev().collect();
    let height = 90 + 30 * groups.len() as u32;
    let svg = picture(height, |area| {
        let mut chart = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 18))
            .margin(8)
            .x_label_area_size(30)
            .y_label_area_size(230)
            .build_cartesian_2d((low - margin) as f32..(high + margin) as f32, names[..].into_segmented())?;
        let label = |at: &SegmentValue<&&String>| match at {
            SegmentValue::CenterOf(name) | SegmentValue::Exact(name) => name.to_string(),
            SegmentValue::Last => String::new(),
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(names.len())
            .y_label_formatter(&label)
            .light_line_style(WHITE)
            .draw()?;
        chart.draw_series(names.iter().map(|name| {
            let box_plot =
                Boxplot::new_horizontal(SegmentValue::CenterOf(name), &Quartiles::new(&groups[*name]));
            box_plot.width(14).style(BLACK)
        }))?;
        Ok(())
    })?;
    Ok(Some(svg))
}

/// Training losses by method: the median of its cells over the share of training that is done.
fn curves(title: &str, cells: &[&CellResult]) -> Result<Option<String>> {
    const POINTS: usize = 50;
    let mut methods: BTreeMap<&str, Vec<&CellResult>> = BTreeMap::new();
    for cell in cells.iter().filter(|cell| cell.losses.len() > 1) {
        methods.entry(&cell.key.method).or_default().push(cell);
    }
    let at = |cell: &CellResult, i: usize| cell.losses[(i * (cell.losses.len() - 1)) / (POINTS - 1)].1;
    let lines: Vec<(&str, Vec<(f64, f64)>)> = methods
        .iter()
        .map(|(method, cells)| {
            let point = |i: usize| {
                let values: Vec<f64> = cells.iter().map(|cell| at(cell, i)).collect();
                (i as f64 / (POINTS - 1) as f64, quantile(&values, 0.5))
            };
            (*method, (0..POINTS).map(point).filter(|(_, y)| y.is_finite()).collect())
        })
        .collect();
    lined(title, ("share of training", "loss"), SeriesLabelPosition::UpperRight, &lines)
}

/// Accuracy over confidence: bins of all cells of an arm together.
fn reliability(title: &str, cells: &[&CellResult]) -> Result<Option<String>> {
    let mut arms: BTreeMap<String, Vec<Bin>> = BTreeMap::new();
    for (cell, (arm, bins)) in cells.iter().flat_map(|c| c.reliability.iter().map(move |arm| (c, arm))) {
        let sums = arms
            .entry(format!("{} ({arm})", cell.key.method))
            .or_insert_with(|| vec![Bin::default(); bins.len()]);
        for (sum, bin) in sums.iter_mut().zip(bins) {
            sum.count += bin.count;
            sum.confidence += bin.confidence * bin.count as f64;
            sum.accuracy += bin.accuracy * bin.count as f64;
        }
    }
    let point = |bin: &Bin| (bin.confidence / bin.count as f64, bin.accuracy / bin.count as f64);
    let mut lines: Vec<(&str, Vec<(f64, f64)>)> = arms
        .iter()
        .map(|(name, bins)| (name.as_str(), bins.iter().filter(|bin| bin.count > 0).map(point).collect()))
        .collect();
    if !lines.is_empty() {
        lines.push(("calibrated", vec![(0.0, 0.0), (1.0, 1.0)]));
    }
    lined(title, ("confidence", "accuracy"), SeriesLabelPosition::UpperLeft, &lines)
}

/// Lines told apart by their dashes and shades, with a legend.
fn lined(
    title: &str,
    axes: (&str, &str),
    legend: SeriesLabelPosition,
    lines: &[(&str, Vec<(f64, f64)>)],
) -> Result<Option<String>> {
    let points = || lines.iter().flat_map(|(_, points)| points);
    if points().next().is_none() {
        return Ok(None);
    }
    let bounds = |of: fn(&(f64, f64)) -> f64| {
        let (low, high) = points().map(of).fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        low..high.max(low + 1e-6)
    };
    let svg = picture(480, |area| {
        let mut chart = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 18))
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(52)
            .build_cartesian_2d(bounds(|p| p.0), bounds(|p| p.1))?;
        chart.configure_mesh().x_desc(axes.0).y_desc(axes.1).light_line_style(WHITE).draw()?;
        for (i, (name, points)) in lines.iter().enumerate() {
            let shade = RGBColor(0, 0, 0).mix(1.0 - 0.6 * (i % 3) as f64 / 2.0);
            let style = shade.stroke_width(1 + (i % 2) as u32);
            // A solid line first, then shorter and shorter dashes.
            let (dash, gap) = ([1000, 12, 6, 3, 1][i / 2 % 5], if i < 2 { 0 } else { 4 });
            let series = DashedLineSeries::new(points.iter().copied(), dash, gap, style);
            chart.draw_series(series)?.label(*name).legend(move |(x, y)| {
                let ends = [(x, y), (x + 24, y)];
                DashedPathElement::new(ends, dash, gap, style).into_dyn()
            });
        }
        chart
            .configure_series_labels()
            .position(legend)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()?;
        Ok(())
    })?;
    Ok(Some(svg))
}

#[cfg(test)]
mod tests {
    use super::super::cell::CellKey;
    use super::*;
    use crate::metrics::Metrics;

    fn cell(method: &str, accuracy: f64) -> CellResult {
        let metrics = Metrics { accuracy: Some(accuracy), nll: Some(f64::INFINITY), ..Metrics::default() };
        let (task, method) = ("rte".to_string(), method.to_string());
        CellResult {
            key: CellKey { task, method, lr: accuracy, batch_size: 8, seed: 1 },
            status: Status::Done,
            reason: None,
            metric: "accuracy".to_string(),
            arms: [("mean".to_string(), metrics)].into(),
            losses: vec![(1, 0.7), (2, 0.6)],
            reliability: [("mean".to_string(), vec![Bin { count: 4, confidence: 0.7, accuracy: 0.5 }])]
                .into(),
            ood: BTreeMap::new(),
            trainable_parameters: 1,
            steps: 2,
        }
    }

    #[test]
    fn pictures_name_what_they_show_and_what_is_not_finite_has_none() -> Result<()> {
        let dir = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
        let cells: Vec<CellResult> =
            [0.5, 0.6, 0.9].into_iter().flat_map(|a| [cell("lora", a), cell("monteclora", a)]).collect();
        write_plots(&cells, dir.path())?;
        for kind in ["metric", "loss", "reliability"] {
            let path = dir.path().join(format!("rte-{kind}.svg"));
            let svg = std::fs::read_to_string(&path).map_err(Error::io(&*path))?;
            assert!(svg.starts_with("<svg") && svg.contains("monteclora") && svg.contains("rte"), "{kind}");
        }
        assert!(!dir.path().join("rte-nll.svg").exists());
        write_plots(&[], dir.path())
    }
}
