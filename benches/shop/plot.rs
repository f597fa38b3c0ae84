//! Line charts as SVG files.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Result;

const SIZE: (u32, u32) = (820, 460);
/// Told apart by people who see colours differently, too.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
    RGBColor(120, 60, 160),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    Linear,
    /// By powers of ten; what is not above 0 is left out.
    Log,
}

#[derive(Clone, Debug)]
pub struct Plot {
    /// Of the file, without `.svg`.
    pub name: String,
    pub title: String,
    pub x: (String, Scale),
    pub y: (String, Scale),
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

impl Scale {
    fn place(self, value: f64) -> Option<f64> {
        match self {
            Self::Linear => Some(value),
            Self::Log => (value > 0.0).then(|| value.log10()),
        }
    }

    fn label(self, place: f64) -> String {
        let value = if self == Self::Log { 10f64.powf(place) } else { place };
        let short = |value: f64| {
            if value.fract().abs() < 1e-9 || value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
        };
        match value.abs() {
            at if at >= 1e6 => format!("{} M", short(value / 1e6)),
            at if at >= 1e4 => format!("{} k", short(value / 1e3)),
            _ => short(value),
        }
    }

    /// From a little below the least to a little above the greatest; whole powers of ten. `headroom` is a share of it.
    fn range(self, places: impl Iterator<Item = f64>, headroom: f64) -> std::ops::Range<f64> {
        let (least, most) = places.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), place| (a.min(place), b.max(place)));
        if !least.is_finite() {
            return 0.0..1.0;
        }
        match self {
            Self::Linear => least.min(0.0)..if most > least.min(0.0) { most * (1.05 + headroom) } else { 1.0 },
            Self::Log => {
                least.floor()..if most > least.floor() { most.ceil().max(least.floor() + 1.0) } else { least.floor() + 1.0 }
            }
        }
    }
}

impl Plot {
    pub fn draw(&self, folder: &Path) -> Result<()> {
        let path = folder.join(format!("{}.svg", self.name));
        let place = |&(x, y): &(f64, f64)| Some((self.x.1.place(x)?, self.y.1.place(y)?));
        let lines: Vec<Vec<(f64, f64)>> = self.lines.iter().map(|(_, points)| points.iter().filter_map(place).collect()).collect();
        let x = self.x.1.range(lines.iter().flatten().map(|point| point.0), 0.0);
        // The names of the lines stand above them.
        let y = self.y.1.range(lines.iter().flatten().map(|point| point.1), 0.08 * lines.len() as f64);
        let ticks =
            |scale, range: &std::ops::Range<f64>| if scale == Scale::Log { (range.end - range.start) as usize + 1 } else { 9 };
        let (ticks_x, ticks_y) = (ticks(self.x.1, &x), ticks(self.y.1, &y));
        let area = SVGBackend::new(&path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(x, y)?;
        let (label_x, label_y) = (|place: &f64| self.x.1.label(*place), |place: &f64| self.y.1.label(*place));
        chart
            .configure_mesh()
            .x_desc(&self.x.0)
            .y_desc(&self.y.0)
            .x_labels(ticks_x)
            .y_labels(ticks_y)
            .x_label_formatter(&label_x)
            .y_label_formatter(&label_y)
            .x_label_style(("sans-serif", 12).with_anchor::<RGBColor>(Pos::new(HPos::Center, VPos::Top)))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        for (at, ((name, _), points)) in self.lines.iter().zip(&lines).enumerate() {
            let colour = COLOURS[at % COLOURS.len()];
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(3)));
            if points.len() < 40 {
                chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
            }
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.2))
            .position(SeriesLabelPosition::UpperLeft)
            .draw()?;
        area.present()?;
        Ok(())
    }
}
