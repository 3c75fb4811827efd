//! Draws box plots and panels of curves as SVG and PNG, readable in black and white. The font comes with the
//! crate, so plots are the same on every machine.

use std::ops::Range;
use std::path::Path;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{register_font, FontStyle};

use crate::error::{Error, Result};
use crate::metrics::quantile;
use crate::util::files;

/// Roboto Regular (Copyright 2015 Google Inc., Apache License 2.0), reduced to printable ASCII.
const FONT: &[u8] = include_bytes!("roboto-ascii.ttf");

/// The width of every plot, in points.
const WIDTH: u32 = 720;
/// Pixels per point in a PNG.
const SCALE: u32 = 2;
/// The number of panels per row.
const COLUMNS: usize = 3;

type Drawn<DB> =
    std::result::Result<(), DrawingAreaErrorKind<<DB as plotters::backend::DrawingBackend>::ErrorType>>;

/// A plot that can be drawn on any backend.
pub trait Draw {
    /// The height in points.
    fn height(&self) -> u32;

    /// Draws the plot with `scale` pixels per point.
    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, scale: u32) -> Drawn<DB>
    where
        DB::ErrorType: 'static;
}

/// Writes `{name}.svg` and `{name}.png` into the folder `out`.
///
/// # Errors
/// If a file cannot be written.
pub fn write(picture: &impl Draw, out: &Path, name: &str) -> Result<()> {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        register_font("sans-serif", FontStyle::Normal, FONT).ok(); // on failure only text is missing
    });
    files::write(&out.join(format!("{name}.svg")), svg(picture)?.as_bytes())?;
    files::write(&out.join(format!("{name}.png")), &png(picture)?)
}

fn svg(picture: &impl Draw) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, (WIDTH, picture.height())).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        picture.draw(&area, 1).map_err(failed)?;
        area.present().map_err(failed)?;
    }
    Ok(text)
}

fn png(picture: &impl Draw) -> Result<Vec<u8>> {
    let (width, height) = (WIDTH * SCALE, picture.height() * SCALE);
    let mut pixels = vec![0; (width * height * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        picture.draw(&area, SCALE).map_err(failed)?;
        area.present().map_err(failed)?;
    }
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels)).map_err(failed)?;
    Ok(bytes)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::config("plot", error.to_string())
}

/// The font at this size in points.
fn font(points: u32, scale: u32) -> (&'static str, u32) {
    ("sans-serif", points * scale)
}

/// Horizontal box plots, one below the other: quartiles, and whiskers from minimum to maximum.
pub struct Boxes {
    /// The title of the plot.
    pub title: String,
    /// From top to bottom: a name and its values, which are finite and at least one.
    pub groups: Vec<(String, Vec<f64>)>,
}

impl Draw for Boxes {
    fn height(&self) -> u32 {
        80 + 22 * self.groups.len() as u32
    }

    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, scale: u32) -> Drawn<DB>
    where
        DB::ErrorType: 'static,
    {
        let Range { start: low, end: high } =
            bounds(self.groups.iter().flat_map(|(_, values)| values).copied());
        let margin = ((high - low) * 0.05).max(1e-3);
        // The axis points upwards.
        let names: Vec<&String> = self.groups.iter().map(|(name, _)| name).rev().collect();
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, font(16, scale))
            .margin(8 * scale)
            .x_label_area_size(26 * scale)
            .y_label_area_size(250 * scale)
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
            .label_style(font(11, scale))
            .axis_style(BLACK.stroke_width(scale))
            .light_line_style(WHITE)
            .draw()?;
        // Drawn in pixels: plotters' own whiskers end at positions that are no value.
        let (style, half) = (BLACK.stroke_width(scale), 6 * scale as i32);
        for (name, (_, values)) in names.iter().zip(self.groups.iter().rev()) {
            let at =
                |q: f64| chart.backend_coord(&(quantile(values, q) as f32, SegmentValue::CenterOf(name)));
            let [least, low, middle, high, most] = [0.0, 0.25, 0.5, 0.75, 1.0].map(at);
            let tick = |(x, y): (i32, i32), half| vec![(x, y - half), (x, y + half)];
            let whiskers = [vec![least, low], vec![high, most], tick(least, half / 2), tick(most, half / 2)];
            for line in whiskers.into_iter().chain([tick(middle, half)]) {
                area.draw(&PathElement::new(line, style))?;
            }
            area.draw(&Rectangle::new([(low.0, low.1 - half), (high.0, high.1 + half)], style))?;
        }
        Ok(())
    }
}

/// Curves, one per panel, on shared axes or on individual ones.
pub struct Panels {
    /// The title of the plot.
    pub title: String,
    /// The labels of the x and y axes.
    pub axes: (&'static str, &'static str),
    /// The kind of axes.
    pub ground: Ground,
    /// The panels, row by row.
    pub panels: Vec<Panel>,
}

/// The kind of axes that curves are drawn on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// Shared axes from the minimum to the maximum.
    Plain,
    /// Individual axes from minimum to maximum per panel; few panels fill the width.
    Own,
    /// Axes from 0 to 1 with a dashed diagonal.
    Diagonal,
    /// The x values are decimal logarithms; the labels are the original values.
    Logarithmic,
}

/// A curve with a name.
pub struct Panel {
    /// The caption of the panel.
    pub name: String,
    /// The points of the curve, finite and from left to right.
    pub points: Vec<(f64, f64)>,
    /// The lower and upper edge of a band around the curve, one per point; empty for no band.
    pub band: Vec<(f64, f64)>,
    /// Additional points, finite.
    pub scatter: Vec<(f64, f64)>,
    /// Whether the points of the curve are marked.
    pub marked: bool,
}

impl Draw for Panels {
    fn height(&self) -> u32 {
        40 + 190 * self.panels.len().div_ceil(COLUMNS) as u32
    }

    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, scale: u32) -> Drawn<DB>
    where
        DB::ErrorType: 'static,
    {
        let common = self.axes_of(&self.panels);
        let label = |x: &f64| format!("{:.1e}", 10f64.powf(*x));
        let area = area.titled(&self.title, font(16, scale))?;
        let columns = if self.ground == Ground::Own { COLUMNS.min(self.panels.len()) } else { COLUMNS };
        let places = area.split_evenly((self.panels.len().div_ceil(COLUMNS), columns));
        for (panel, place) in self.panels.iter().zip(places) {
            let (xs, ys) = match self.ground {
                Ground::Own => self.axes_of(std::slice::from_ref(panel)),
                _ => common.clone(),
            };
            let mut chart = ChartBuilder::on(&place)
                .caption(&panel.name, font(12, scale))
                .margin(6 * scale)
                .x_label_area_size(32 * scale)
                .y_label_area_size(44 * scale)
                .build_cartesian_2d(xs, ys)?;
            let mut mesh = chart.configure_mesh();
            mesh.x_desc(self.axes.0)
                .y_desc(self.axes.1)
                .x_labels(5)
                .y_labels(5)
                .label_style(font(10, scale))
                .axis_style(BLACK.stroke_width(scale))
                .bold_line_style(BLACK.mix(0.1))
                .light_line_style(WHITE);
            if self.ground == Ground::Logarithmic {
                mesh.x_label_formatter(&label);
            }
            mesh.draw()?;
            let over = panel.points.iter().zip(&panel.band);
            let upper = over.clone().map(|((x, _), (_, high))| (*x, *high));
            let lower = over.rev().map(|((x, _), (low, _))| (*x, *low));
            let band: Vec<_> = upper.chain(lower).collect();
            chart.draw_series((!band.is_empty()).then(|| Polygon::new(band, BLACK.mix(0.2))))?;
            if self.ground == Ground::Diagonal {
                let ends = [(0.0, 0.0), (1.0, 1.0)];
                let (dash, style) = (4 * scale, BLACK.mix(0.6).stroke_width(scale));
                chart.draw_series(DashedLineSeries::new(ends, dash, dash, style))?;
            }
            chart.draw_series(LineSeries::new(panel.points.iter().copied(), BLACK.stroke_width(scale)))?;
            chart.draw_series(panel.scatter.iter().map(|point| Circle::new(*point, 2 * scale, BLACK)))?;
            let marks = panel.points.iter().filter(|_| panel.marked);
            chart.draw_series(marks.map(|point| Circle::new(*point, 2 * scale, BLACK.filled())))?;
        }
        Ok(())
    }
}

impl Panels {
    /// The ranges of the axes of some panels.
    fn axes_of(&self, panels: &[Panel]) -> (Range<f64>, Range<f64>) {
        let xs = panels.iter().flat_map(|panel| &panel.points).map(|(x, _)| *x);
        let all = panels.iter().flat_map(|panel| panel.points.iter().chain(&panel.scatter));
        let ys = all.map(|(_, y)| *y);
        let edges = panels.iter().flat_map(|panel| &panel.band).flat_map(|(low, high)| [*low, *high]);
        match self.ground {
            Ground::Plain | Ground::Own => (bounds(xs), bounds(ys.chain(edges))),
            Ground::Diagonal => (0.0..1.0, 0.0..1.0),
            Ground::Logarithmic => {
                let (xs, ys) = (bounds(xs), bounds(ys.chain(edges)));
                let margin = 0.05 * (ys.end - ys.start);
                (xs.start - 0.1..xs.end + 0.1, ys.start - margin..ys.end + margin)
            }
        }
    }
}

/// The minimum and maximum of some numbers, kept apart so that the range is not empty.
fn bounds(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
    low..high.max(low + 1e-6)
}
