// SPDX-License-Identifier: MIT OR Apache-2.0
//! bench.json as pictures. Colours are from Okabe and Ito's set, which colour-blind readers can tell apart.

use super::cases;
use super::measure::Case;
use super::native::Growth;
use anyhow::{anyhow, Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

const STOCK: RGBColor = RGBColor(213, 94, 0);
const OURS: RGBColor = RGBColor(0, 114, 178);
const BARE: RGBColor = RGBColor(128, 128, 128);
const INK: RGBColor = RGBColor(34, 34, 34);
const FAINT: RGBColor = RGBColor(221, 221, 221);
const FONT: &str = "sans-serif";

const WIDTH: i32 = 860;
const LEFT: i32 = 150;
/// Room for the number behind the longest bar.
const RIGHT: i32 = 90;
const TOP: i32 = 84;
const BOTTOM: i32 = 54;
const BAR: i32 = 14;
const GAP: i32 = 16;
/// Width of a number.
const NUMBER: i32 = 52;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

struct Series {
    name: &'static str,
    colour: RGBColor,
}

const SIDES: &[Series] = &[
    Series {
        name: "stock QEMU",
        colour: STOCK,
    },
    Series {
        name: "gmem",
        colour: OURS,
    },
    Series {
        name: "the same kernel calls, bare",
        colour: BARE,
    },
];

/// Horizontal bars, a group for each row.
struct Bars<'a> {
    title: &'a str,
    axis: &'a str,
    series: &'a [Series],
    /// What a black tick in a row stands for.
    tick: Option<&'a str>,
    scale: Scale,
    rows: Vec<Row>,
    number: fn(f64) -> String,
}

#[derive(Clone, Copy, PartialEq)]
enum Scale {
    /// From nothing.
    Linear,
    /// From a power of ten below all values.
    Log,
    /// From 1 to both sides.
    LogAroundOne,
}

struct Row {
    label: String,
    /// One for each series; what a side doesn't have has no bar.
    values: Vec<Option<f64>>,
    tick: Option<f64>,
}

/// Draws every picture that there are figures for; returns their names and captions.
pub fn draw(
    cases: &[Case],
    growth: Option<&Growth>,
    folder: &Path,
) -> Result<Vec<(&'static str, &'static str)>> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("can't create {}", folder.display()))?;
    let mut drawn = Vec::new();
    for (name, caption, bars) in [
        (
            "speed.svg",
            "How many times faster than stock",
            speed(cases),
        ),
        ("map-ioctls.svg", "Map ioctls", map_ioctls(cases)),
        (
            "latency-p50.svg",
            "Latency, median",
            latency(cases, "p50_us"),
        ),
        (
            "latency-p99.svg",
            "Latency, 99th percentile",
            latency(cases, "p99_us"),
        ),
        ("slab.svg", "Kernel memory", slab(cases)),
        ("bare.svg", "What the library adds", bare(cases)),
    ] {
        let path = folder.join(name);
        let _ = std::fs::remove_file(&path);
        if !bars.rows.is_empty() {
            bars.draw(&path)?;
            drawn.push((name, caption));
        }
    }
    if let Some(growth) = growth {
        let name = "growth.svg";
        draw_growth(growth, &folder.join(name))?;
        drawn.push((name, "Growth with fragmentation"));
    }
    Ok(drawn)
}

fn speed(cases: &[Case]) -> Bars<'static> {
    Bars {
        title: "Time: how many times faster than stock QEMU",
        axis: "stock's median time by ours (higher is better)",
        series: &SIDES[1..2],
        tick: Some("goal"),
        scale: Scale::LogAroundOne,
        rows: rows(cases, |case| {
            let goal = goal(case, "stock's time by ours");
            (vec![case.ratio("seconds")], goal)
        }),
        number: |value| format!("{} ×", short(value)),
    }
}

fn map_ioctls(cases: &[Case]) -> Bars<'static> {
    Bars {
        title: "Map ioctls in one run",
        axis:
            "IOMMU_IOAS_MAP_FILE and IOMMU_IOAS_MAP calls, counted by the kernel (lower is better)",
        series: &SIDES[..2],
        tick: None,
        scale: Scale::Log,
        rows: rows(cases, |case| {
            let values = ["stock", "gmem"].map(|side| case.figure(side, "map_ioctls"));
            (values.to_vec(), None)
        }),
        number: thousands,
    }
}

fn latency(cases: &[Case], figure: &'static str) -> Bars<'static> {
    let (title, axis) = if figure == "p50_us" {
        (
            "Time of a request, median",
            "from KVM's exit to re-entry, half are faster (lower is better)",
        )
    } else {
        (
            "Time of a request, 99th percentile",
            "from KVM's exit to re-entry, 99 of 100 are faster (lower is better)",
        )
    };
    Bars {
        title,
        axis,
        series: SIDES,
        tick: None,
        scale: Scale::Log,
        rows: rows(cases, |case| {
            let values = ["stock", "gmem", "bare"].map(|side| case.figure(side, figure));
            (values.to_vec(), None)
        }),
        number: microseconds,
    }
}

fn slab(cases: &[Case]) -> Bars<'static> {
    Bars {
        title: "Kernel memory for mappings",
        axis: "growth of kmalloc-192 and kmalloc-cg-192 in one run (lower is better)",
        series: &SIDES[..2],
        tick: None,
        scale: Scale::Log,
        rows: rows(cases, |case| {
            // No growth is as good as a page.
            let values = ["stock", "gmem"].map(|side| {
                case.figure(side, "slab_bytes")
                    .map(|bytes| bytes.max(4096.0))
            });
            (values.to_vec(), None)
        }),
        number: bytes,
    }
}

fn bare(cases: &[Case]) -> Bars<'static> {
    Bars {
        title: "Time by that of the same kernel calls without QEMU and library",
        axis: "our median time by the bare calls' (1 is the floor)",
        series: &SIDES[1..2],
        tick: Some("goal: not beyond"),
        scale: Scale::Linear,
        rows: rows(cases, |case| {
            let goal = goal(case, "bare").or_else(|| goal(case, "kernel calls"));
            (vec![case.bare_ratio("seconds")], goal)
        }),
        number: |value| format!("{value:.2} ×"),
    }
}

/// A row for each case with something to show.
fn rows(cases: &[Case], row: impl Fn(&Case) -> (Vec<Option<f64>>, Option<f64>)) -> Vec<Row> {
    cases
        .iter()
        .filter_map(|case| {
            let (values, tick) = row(case);
            let some = values.iter().flatten().any(|value| *value > 0.0);
            some.then(|| Row {
                label: case.name.clone(),
                values,
                tick,
            })
        })
        .collect()
}

/// The limit of the case's goal with these words in it.
fn goal(case: &Case, words: &str) -> Option<f64> {
    let goals = cases::kind(&case.name)?.goals;
    let goal = goals.iter().find(|goal| goal.what.contains(words))?;
    Some(goal.limit.value())
}

impl Bars<'_> {
    fn draw(&self, path: &Path) -> Result<()> {
        let shown = self.shown();
        let group = BAR * shown.len() as i32 + GAP;
        let height = TOP + group * self.rows.len() as i32 + BOTTOM;
        let root = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
        self.paint(&root, &shown, group, height)
            .and_then(|()| root.present().map_err(wrong))
            .with_context(|| format!("can't draw {}", path.display()))
    }

    /// The series that have a value at all.
    fn shown(&self) -> Vec<usize> {
        let has = |&index: &usize| self.rows.iter().any(|row| row.values[index].is_some());
        (0..self.series.len()).filter(has).collect()
    }

    fn paint(&self, root: &Area, shown: &[usize], group: i32, height: i32) -> Result<()> {
        root.fill(&WHITE).map_err(wrong)?;
        let axis = Axis::around(
            self.scale,
            self.rows
                .iter()
                .flat_map(|row| row.values.iter().flatten().copied().chain(row.tick)),
        );
        text(root, self.title, (16, 26), 19, HPos::Left)?;
        self.legend(root, shown)?;
        let end = TOP + group * self.rows.len() as i32;
        for (value, labelled) in axis.ticks() {
            let x = axis.x(value);
            line(root, (x, TOP - 4), (x, end), FAINT)?;
            if labelled {
                text(root, &(self.number)(value), (x, end + 14), 12, HPos::Center)?;
            }
        }
        for (index, row) in self.rows.iter().enumerate() {
            let top = TOP + group * index as i32 + GAP / 2;
            let middle = top + (group - GAP) / 2;
            text(root, &row.label, (LEFT - 10, middle), 14, HPos::Right)?;
            for (place, &series) in shown.iter().enumerate() {
                let y = top + BAR * place as i32;
                let Some(value) = row.values[series] else {
                    continue;
                };
                let (from, to) = (axis.x(axis.base), axis.x(value));
                // Even the least value has a bar.
                let right = from.max(to).max(from.min(to) + 2);
                let bar = Rectangle::new(
                    [(from.min(to), y + 1), (right, y + BAR - 1)],
                    self.series[series].colour.filled(),
                );
                root.draw(&bar).map_err(wrong)?;
                let tick = row.tick.map(|tick| axis.x(tick));
                // Not under the tick.
                let behind = tick.filter(|tick| (right - 2..right + NUMBER).contains(tick));
                let at = (behind.unwrap_or(right) + 6, y + BAR / 2);
                text(root, &(self.number)(value), at, 12, HPos::Left)?;
            }
            if let Some(tick) = row.tick {
                let x = axis.x(tick);
                let mark = Rectangle::new(
                    [(x - 1, top - 3), (x + 1, top + group - GAP + 3)],
                    INK.filled(),
                );
                root.draw(&mark).map_err(wrong)?;
            }
        }
        let base = axis.x(axis.base);
        line(root, (base, TOP - 4), (base, end), INK)?;
        text(root, self.axis, (LEFT, height - 14), 13, HPos::Left)
    }

    fn legend(&self, root: &Area, shown: &[usize]) -> Result<()> {
        let (mut x, y) = (LEFT, 54);
        for &series in shown {
            let Series { name, colour } = &self.series[series];
            let swatch = Rectangle::new([(x, y - 6), (x + 14, y + 6)], colour.filled());
            root.draw(&swatch).map_err(wrong)?;
            text(root, name, (x + 20, y), 13, HPos::Left)?;
            x += 48 + name.len() as i32 * 7;
        }
        if let Some(name) = self.tick {
            let mark = Rectangle::new([(x + 6, y - 8), (x + 8, y + 8)], INK.filled());
            root.draw(&mark).map_err(wrong)?;
            text(root, name, (x + 20, y), 13, HPos::Left)?;
        }
        Ok(())
    }
}

/// An axis in pixels.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    /// Where bars begin.
    base: f64,
}

impl Axis {
    fn around(scale: Scale, values: impl Iterator<Item = f64>) -> Axis {
        let (mut low, mut high) = (f64::MAX, f64::MIN_POSITIVE);
        for value in values.filter(|value| *value > 0.0) {
            low = low.min(value);
            high = high.max(value);
        }
        if low > high {
            (low, high) = (1.0, 1.0);
        }
        let (low, high, base) = match scale {
            Scale::Linear => (0.0, high, 0.0),
            Scale::Log => {
                let low = 10f64.powf(low.log10().floor());
                (low, high.max(low * 2.0), low)
            }
            Scale::LogAroundOne => (low.min(0.9), high.max(2.0), 1.0),
        };
        Axis {
            scale,
            low,
            high,
            base,
        }
    }

    fn x(&self, value: f64) -> i32 {
        let share = match self.scale {
            Scale::Linear => value / self.high,
            _ => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
        };
        LEFT + (share * f64::from(WIDTH - LEFT - RIGHT)).round() as i32
    }

    /// Where lines go, and which of them say what they are.
    fn ticks(&self) -> Vec<(f64, bool)> {
        if self.scale == Scale::Linear {
            let rough = self.high / 5.0;
            let power = 10f64.powf(rough.log10().floor());
            let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
            let step = steps.into_iter().find(|step| *step >= rough);
            let step = step.unwrap_or(power * 10.0);
            let count = (self.high / step * 1.001) as i32;
            return (0..=count)
                .map(|index| (f64::from(index) * step, true))
                .collect();
        }
        let decades = (self.high / self.low).log10();
        let steps: &[f64] = if decades < 2.0 {
            &[1.0, 2.0, 5.0]
        } else {
            &[1.0]
        };
        let every = if decades > 6.0 { 2 } else { 1 };
        let first = self.low.log10().floor() as i32;
        let last = self.high.log10().ceil() as i32;
        let values = (first..=last).flat_map(|power| {
            let values = steps.iter().map(move |step| step * 10f64.powi(power));
            values.map(move |value| (value, (power - first) % every == 0))
        });
        values
            .filter(|(value, _)| (self.low * 0.999..=self.high * 1.001).contains(value))
            .collect()
    }
}

fn draw_growth(growth: &Growth, path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, (WIDTH as u32, 380)).into_drawing_area();
    paint_growth(growth, &root)
        .and_then(|()| root.present().map_err(wrong))
        .with_context(|| format!("can't draw {}", path.display()))
}

fn paint_growth(growth: &Growth, root: &Area) -> Result<()> {
    root.fill(&WHITE).map_err(wrong)?;
    text(
        root,
        "The library's books in a block of 1 TiB, by number of private runs",
        (16, 26),
        19,
        HPos::Left,
    )?;
    let (_, below) = root.split_vertically(44);
    let (left, right) = below.split_horizontally(WIDTH / 2);
    let points = &growth.points;
    let last = points.iter().map(|point| point.runs).max().unwrap_or(1) as f64 * 1.5;
    let lines = |value: fn(&super::native::Point) -> f64| {
        points
            .iter()
            .map(move |point| (point.runs as f64, value(point)))
            .collect::<Vec<_>>()
    };
    curves(
        &left,
        "nanoseconds",
        last,
        &[
            ("conversion of 4 KiB", OURS, lines(|p| p.convert_4k_ns)),
            ("look-up", STOCK, lines(|p| p.look_up_ns)),
        ],
        &[
            ("goal for a conversion: 1 µs", 1000.0),
            ("goal for a look-up among a million: 500 ns", 500.0),
        ],
        SeriesLabelPosition::UpperLeft,
    )?;
    let sizable: Vec<_> = points.iter().filter(|point| point.runs >= 16).collect();
    curves(
        &right,
        "bytes for a run",
        last,
        &[(
            "memory",
            OURS,
            sizable
                .iter()
                .map(|p| (p.runs as f64, p.bytes as f64 / p.runs as f64))
                .collect(),
        )],
        &[("goal for a million: 64 bytes", 64.0)],
        SeriesLabelPosition::UpperRight,
    )
}

type Curve = (&'static str, RGBColor, Vec<(f64, f64)>);

fn curves(
    area: &Area,
    unit: &str,
    last: f64,
    curves: &[Curve],
    goals: &[(&str, f64)],
    legend: SeriesLabelPosition,
) -> Result<()> {
    let values = curves.iter().flat_map(|(_, _, points)| points);
    let goals_high = goals.iter().map(|(_, value)| *value);
    let high = values
        .map(|(_, y)| *y)
        .chain(goals_high)
        .fold(0.0, f64::max)
        * 1.25;
    let mut chart = ChartBuilder::on(area)
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(58)
        .build_cartesian_2d((1f64..last).log_scale(), 0f64..high)
        .map_err(wrong)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .x_desc("private runs")
        .y_desc(unit)
        .label_style((FONT, 12, &INK))
        .axis_desc_style((FONT, 13, &INK))
        .x_label_formatter(&|value| count(*value))
        .y_label_formatter(&|value| thousands(*value))
        .draw()
        .map_err(wrong)?;
    for (name, value) in goals {
        let line = DashedLineSeries::new([(1.0, *value), (last, *value)], 6, 4, INK.into());
        chart.draw_series(line).map_err(wrong)?;
        let style = TextStyle::from((FONT, 12)).color(&INK);
        let at = (1.15, value + high * 0.035);
        let style = style.pos(Pos::new(HPos::Left, VPos::Center));
        chart
            .draw_series([Text::new((*name).to_string(), at, style)])
            .map_err(wrong)?;
    }
    for (name, colour, points) in curves {
        let (name, colour) = (*name, *colour);
        chart
            .draw_series(LineSeries::new(
                points.iter().copied(),
                colour.stroke_width(2),
            ))
            .map_err(wrong)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(3)));
        chart
            .draw_series(points.iter().map(|at| Circle::new(*at, 3, colour.filled())))
            .map_err(wrong)?;
    }
    chart
        .configure_series_labels()
        .position(legend)
        .background_style(WHITE)
        .border_style(FAINT)
        .label_font((FONT, 13, &INK))
        .draw()
        .map_err(wrong)
}

fn text(root: &Area, what: &str, at: (i32, i32), size: i32, side: HPos) -> Result<()> {
    let style = TextStyle::from((FONT, size))
        .color(&INK)
        .pos(Pos::new(side, VPos::Center));
    root.draw(&Text::new(what.to_string(), at, style))
        .map_err(wrong)
}

fn line(root: &Area, from: (i32, i32), to: (i32, i32), colour: RGBColor) -> Result<()> {
    root.draw(&PathElement::new([from, to], colour.stroke_width(1)))
        .map_err(wrong)
}

fn wrong(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}

/// At most three digits that count.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => thousands(value),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// `262,144`
pub fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 {
        text.insert(0, '-');
    }
    text
}

fn count(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{} M", short(value / 1e6)),
        value if value >= 1e3 => format!("{} k", short(value / 1e3)),
        value => thousands(value),
    }
}

pub fn microseconds(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{} s", short(value / 1e6)),
        value if value >= 1e3 => format!("{} ms", short(value / 1e3)),
        value => format!("{} µs", short(value)),
    }
}

pub fn bytes(value: f64) -> String {
    match value.abs() {
        size if size >= f64::from(1 << 30) => format!("{} GiB", short(value / f64::from(1 << 30))),
        size if size >= f64::from(1 << 20) => format!("{} MiB", short(value / f64::from(1 << 20))),
        size if size >= 1024.0 => format!("{} KiB", short(value / 1024.0)),
        _ => format!("{} B", thousands(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::native::Point;
    use serde_json::json;

    #[test]
    fn numbers_read_well() {
        assert_eq!(thousands(262144.0), "262,144");
        assert_eq!(thousands(-1000.0), "-1,000");
        assert_eq!(thousands(12.0), "12");
        assert_eq!(microseconds(1500.0), "1.50 ms");
        assert_eq!(microseconds(2.5e6), "2.50 s");
        assert_eq!(bytes(97.0 * f64::from(1 << 20)), "97 MiB");
        assert_eq!(bytes(512.0), "512 B");
        assert_eq!(count(1e6), "1 M");
    }

    #[test]
    fn an_axis_holds_all_values() {
        let axis = Axis::around(Scale::Log, [3.0, 700.0].into_iter());
        assert_eq!(axis.x(1.0), LEFT);
        assert_eq!(axis.x(700.0), WIDTH - RIGHT);
        assert!(axis.ticks().contains(&(10.0, true)));
        let axis = Axis::around(Scale::LogAroundOne, [0.5, 20.0].into_iter());
        assert!(axis.x(0.5) < axis.x(1.0) && axis.x(1.0) < axis.x(20.0));
        let axis = Axis::around(Scale::Linear, [1.2].into_iter());
        assert_eq!(axis.x(0.0), LEFT);
        assert!(axis.ticks().contains(&(1.0, true)));
    }

    #[test]
    fn an_axis_of_one_value_or_none_divides_by_nothing() {
        for scale in [Scale::Linear, Scale::Log, Scale::LogAroundOne] {
            for values in [&[][..], &[1.0], &[0.0]] {
                let axis = Axis::around(scale, values.iter().copied());
                assert!((0..=WIDTH).contains(&axis.x(1.0)), "{values:?}");
                assert!(axis.ticks().len() < 100);
            }
        }
    }

    #[test]
    fn pictures_are_drawn_of_what_was_measured() {
        let folder = std::env::temp_dir().join(format!("gmem-lab-plots-{}", std::process::id()));
        let case = Case::new(&json!({
            "name": "share-1g",
            "stock": {"runs": [9.0], "map_ioctls": 262144, "p50_us": 9000.0},
            "gmem": {"runs": [3.0], "map_ioctls": 512, "p50_us": 3000.0, "slab_bytes": 0},
        }))
        .unwrap();
        let growth = Growth {
            points: vec![
                Point {
                    runs: 1,
                    look_up_ns: 10.0,
                    convert_4k_ns: 500.0,
                    bytes: 100,
                },
                Point {
                    runs: 1000,
                    look_up_ns: 50.0,
                    convert_4k_ns: 600.0,
                    bytes: 30000,
                },
            ],
            alternating: None,
        };
        let drawn = draw(&[case], Some(&growth), &folder).unwrap();
        let names: Vec<&str> = drawn.iter().map(|(name, _)| *name).collect();
        assert_eq!(
            names,
            [
                "speed.svg",
                "map-ioctls.svg",
                "latency-p50.svg",
                "slab.svg",
                "growth.svg"
            ]
        );
        let text = std::fs::read_to_string(folder.join("map-ioctls.svg")).unwrap();
        assert!(text.contains("262,144") && text.contains("stock QEMU"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
