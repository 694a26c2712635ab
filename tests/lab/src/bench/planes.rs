// SPDX-License-Identifier: MIT OR Apache-2.0
//! The same guest on memory of each kind: what two boots of L1 read, side by side.
//!
//! A boot has either split memory or memory that converts in place. Times are given in round trips into a guest that does
//! nothing, taken in the same boot by the same scenario; so a column of one boot can stand beside one of the other.

use super::cases::{PLANE_CASES, PLANE_SCENARIOS};
use super::measure::{median, number};
use super::plots;
use crate::mode::{Mode, Run};
use crate::report::Outcome;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::collections::BTreeMap;

/// Kinds of memory, in the order of the tables: the agent's name, the mode of L1 that has it, the head of its column.
const COLUMNS: &[(&str, Mode, &str)] = &[
    ("split", Mode::Split, "split"),
    ("split-2m", Mode::Split, "split, shared of 2 MiB"),
    ("in-place", Mode::InPlace, "in place"),
    ("in-place-2m", Mode::InPlace, "in place, 2 MiB"),
];

/// Yardsticks, by the agent's name.
const YARDSTICKS: &[(&str, &str)] = &[
    ("round_trip", "into a guest and out again"),
    ("system_call", "a system call that does nothing"),
    ("guest_step", "a guest that computes"),
];

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Reading {
    case: String,
    measure: String,
    column: String,
    /// `time`, `bytes`, `count` or `ratio`.
    kind: String,
    values: Vec<f64>,
    /// What times are multiples of, of the same boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    yardstick: Option<f64>,
}

/// The kernel's count of what some requests came to.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Calls {
    case: String,
    measure: String,
    column: String,
    requests: u64,
    calls: BTreeMap<String, u64>,
}

/// Nanoseconds, each time that they were taken by a scenario in a mode.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Yardsticks {
    scenario: String,
    in_place: bool,
    values: BTreeMap<String, Vec<f64>>,
}

/// A column that a kernel could not give, or a scenario that failed.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Lack {
    scenario: String,
    in_place: bool,
    what: String,
    why: String,
    /// It should have been there.
    failed: bool,
}

/// What both boots read so far.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Planes {
    readings: Vec<Reading>,
    calls: Vec<Calls>,
    yardsticks: Vec<Yardsticks>,
    lacks: Vec<Lack>,
}

impl Planes {
    /// Enters what a scenario found, in place of what it found before.
    pub fn take(&mut self, run: &Run, outcome: &Outcome) -> Result<()> {
        let in_place = run.mode == Mode::InPlace;
        let scenario = run.scenario;
        self.forget(scenario, in_place);
        let list = |name: &str| {
            let list = outcome.facts.get(name).cloned();
            list.unwrap_or_else(|| Value::Array(Vec::new()))
        };
        let what = |name: &str| format!("{scenario}'s {name}");
        let readings: Vec<Reading> =
            serde_json::from_value(list("readings")).with_context(|| what("readings"))?;
        let calls: Vec<Calls> =
            serde_json::from_value(list("calls")).with_context(|| what("calls"))?;
        self.readings.extend(readings);
        self.calls.extend(calls);
        if let Some(values) = outcome.facts.get("yardsticks") {
            self.yardsticks.push(Yardsticks {
                scenario: scenario.into(),
                in_place,
                values: serde_json::from_value(values.clone())
                    .with_context(|| what("yardsticks"))?,
            });
        }
        for missing in list("missing").as_array().into_iter().flatten() {
            let word = |name: &str| missing[name].as_str().unwrap_or_default().to_string();
            let what = head(&word("column")).to_string();
            self.lack(run, &what, &word("why"), false);
        }
        if !outcome.ok {
            let why = outcome.error.as_deref().unwrap_or("no reason given");
            self.lack(run, run.mode.name(scenario).as_str(), why, true);
        }
        Ok(())
    }

    /// Enters that a scenario can't run, and why.
    pub fn skip(&mut self, run: &Run, why: &str) {
        self.forget(run.scenario, run.mode == Mode::InPlace);
        self.lack(run, &run.name(), why, false);
    }

    fn lack(&mut self, run: &Run, what: &str, why: &str, failed: bool) {
        self.lacks.push(Lack {
            scenario: run.scenario.into(),
            in_place: run.mode == Mode::InPlace,
            what: what.into(),
            why: why.lines().next().unwrap_or_default().into(),
            failed,
        });
    }

    fn forget(&mut self, scenario: &str, in_place: bool) {
        let cases = PLANE_SCENARIOS
            .iter()
            .find(|(name, ..)| *name == scenario)
            .map_or(&[][..], |(_, _, cases)| cases);
        let old =
            |case: &str, column: &str| cases.contains(&case) && is_in_place(column) == in_place;
        self.readings
            .retain(|reading| !old(&reading.case, &reading.column));
        self.calls.retain(|calls| !old(&calls.case, &calls.column));
        self.yardsticks
            .retain(|taken| taken.scenario != scenario || taken.in_place != in_place);
        self.lacks
            .retain(|lack| lack.scenario != scenario || lack.in_place != in_place);
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether no scenario failed.
    pub fn complete(&self) -> bool {
        self.lacks.iter().all(|lack| !lack.failed)
    }

    /// As bench.json has it: with medians, so that nobody has to make them again.
    pub fn json(&self) -> Value {
        let mut json = json!(self);
        for (reading, told) in self.readings.iter().zip(
            json["readings"]
                .as_array_mut()
                .into_iter()
                .flat_map(|list| list.iter_mut()),
        ) {
            let middle = median(reading.values.clone());
            told["median"] = number(middle);
            if let (Some(middle), Some(yardstick)) = (middle, reading.yardstick) {
                told["by_yardstick"] = number(Some(middle / yardstick));
            }
        }
        json
    }

    pub fn read(json: &Value) -> Planes {
        serde_json::from_value(json.clone()).unwrap_or_default()
    }

    /// For docs/bench.md.
    pub fn markdown(&self) -> String {
        if self.is_empty() {
            return "Not measured.\n".into();
        }
        let mut text = String::new();
        for table in self.tables() {
            text.push_str(&format!("{}\n\n{}\n", table.title, table.markdown()));
        }
        for line in self.notes() {
            text.push_str(&format!("- {line}\n"));
        }
        text
    }

    /// For the end of a run: without the calls, which are wider than any terminal.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for table in self.tables().iter().filter(|table| table.title != CALLS) {
            text.push_str(&format!(
                "\n{}\n{}",
                table.title.replace('`', ""),
                table.text()
            ));
        }
        for line in self.notes() {
            text.push_str(&format!("{}\n", line.replace('`', "")));
        }
        text
    }

    fn notes(&self) -> Vec<String> {
        self.lacks
            .iter()
            .map(|lack| {
                format!(
                    "`{}` not measured by {}: {}",
                    lack.what, lack.scenario, lack.why
                )
            })
            .collect()
    }

    fn tables(&self) -> Vec<Table> {
        let mut tables = vec![self.yardstick_table()];
        for (title, kind, cases) in GROUPS {
            tables.push(self.reading_table(title, kind, cases));
        }
        tables.push(self.calls_table());
        tables.retain(|table| !table.rows.is_empty());
        tables
    }

    fn yardstick_table(&self) -> Table {
        let mut rows = Vec::new();
        for (scenario, ..) in PLANE_SCENARIOS {
            let taken = |in_place: bool| {
                self.yardsticks
                    .iter()
                    .find(|taken| taken.scenario == *scenario && taken.in_place == in_place)
            };
            let (Some(split), Some(in_place)) = (taken(false), taken(true)) else {
                continue;
            };
            for (name, what) in YARDSTICKS {
                let values = |of: &Yardsticks| of.values.get(*name).cloned().unwrap_or_default();
                let Some(unit) = median(values(split)) else {
                    continue;
                };
                let cell = |of: &Yardsticks| spread(&values(of), unit);
                rows.push(vec![
                    format!("`{scenario}`"),
                    (*what).to_string(),
                    cell(split),
                    cell(in_place),
                ]);
            }
        }
        Table {
            title: "Yardsticks: the split boot's median is 1".into(),
            heads: ["scenario", "yardstick", "split boot", "in-place boot"]
                .map(String::from)
                .to_vec(),
            rows,
        }
    }

    fn reading_table(&self, title: &str, kinds: &[&str], cases: &[&str]) -> Table {
        let own: Vec<&Reading> = self
            .readings
            .iter()
            .filter(|reading| {
                cases.contains(&reading.case.as_str()) && kinds.contains(&reading.kind.as_str())
            })
            .collect();
        let columns: Vec<&str> = COLUMNS
            .iter()
            .map(|(name, ..)| *name)
            .filter(|name| own.iter().any(|reading| reading.column == *name))
            .collect();
        let quotients = kinds.iter().any(|kind| ["time", "bytes"].contains(kind));
        let mut heads = vec!["case".to_string(), "what".to_string()];
        heads.extend(columns.iter().map(|column| head(column).to_string()));
        if quotients {
            heads.extend(QUOTIENTS.map(|(_, _, name)| name.to_string()));
        }
        let mut rows = Vec::new();
        for case in cases {
            let mut measures: Vec<&str> = Vec::new();
            for reading in own.iter().filter(|reading| reading.case == *case) {
                if !measures.contains(&reading.measure.as_str()) {
                    measures.push(&reading.measure);
                }
            }
            for (index, measure) in measures.into_iter().enumerate() {
                let of = |column: &str| {
                    own.iter().copied().find(|reading| {
                        reading.case == *case
                            && reading.measure == measure
                            && reading.column == column
                    })
                };
                let name = match index {
                    0 => format!("`{case}`: {}", what(case)),
                    _ => String::new(),
                };
                let mut row = vec![name, measure.to_string()];
                row.extend(
                    columns
                        .iter()
                        .map(|column| of(column).map_or("–".into(), cell)),
                );
                if quotients {
                    row.extend(QUOTIENTS.map(|(above, below, _)| {
                        let value = of(above)
                            .and_then(scaled)
                            .zip(of(below).and_then(scaled))
                            .filter(|(_, below)| *below > 0.0)
                            .map(|(above, below)| above / below);
                        value.map_or("–".into(), plots::short)
                    }));
                }
                rows.push(row);
            }
        }
        Table {
            title: title.into(),
            heads,
            rows,
        }
    }

    /// Of guests: what the library makes by itself is in bench.json.
    fn calls_table(&self) -> Table {
        let columns: Vec<&str> = COLUMNS
            .iter()
            .map(|(name, ..)| *name)
            .filter(|name| self.calls.iter().any(|calls| calls.column == *name))
            .collect();
        let mut rows: Vec<(String, String, Vec<String>)> = Vec::new();
        for case in GROUPS.first().map_or(&[][..], |(_, _, cases)| cases) {
            for calls in self.calls.iter().filter(|calls| calls.case == *case) {
                let known = |row: &&mut (String, String, Vec<String>)| {
                    row.0 == calls.case && row.1 == calls.measure
                };
                let at = columns.iter().position(|column| *column == calls.column);
                let Some(at) = at else { continue };
                let row = match rows.iter_mut().find(known) {
                    Some(row) => row,
                    None => {
                        let cells = vec!["–".to_string(); columns.len()];
                        rows.push((calls.case.clone(), calls.measure.clone(), cells));
                        rows.last_mut().expect("a row was just pushed")
                    }
                };
                row.2[at] = calls.text();
            }
        }
        let mut heads = vec!["case".to_string(), "what".to_string()];
        heads.extend(columns.iter().map(|column| head(column).to_string()));
        let mut last = String::new();
        let rows = rows
            .into_iter()
            .map(|(case, measure, cells)| {
                let name = match case == last {
                    true => String::new(),
                    false => format!("`{case}`"),
                };
                last = case;
                [name, measure].into_iter().chain(cells).collect()
            })
            .collect();
        Table {
            title: CALLS.into(),
            heads,
            rows,
        }
    }
}

const CALLS: &str = "System calls of one request, counted by the kernel";

/// Tables: title, kinds of readings, cases.
const GROUPS: &[(&str, &[&str], &[&str])] = &[
    (
        "Conversions, in round trips into a guest: median (fastest to slowest run)",
        &["time"],
        &[
            "inplace-2m",
            "inplace-128m",
            "inplace-churn",
            "inplace-lend",
        ],
    ),
    (
        "The library by itself, against the same kernel calls: median (least to most)",
        &["ratio"],
        &["inplace-library"],
    ),
    (
        "Memory of the host that a guest of 1 GiB takes",
        &["bytes"],
        &["inplace-footprint"],
    ),
    (
        "A guest's private memory, in round trips: median (fastest to slowest run)",
        &["time"],
        &["inplace-access"],
    ),
    (
        "How KVM mapped it, from its page statistics",
        &["count"],
        &["inplace-access"],
    ),
];

/// Columns to divide.
const QUOTIENTS: [(&str, &str, &str); 2] = [
    ("in-place", "split", "in place by split"),
    ("in-place-2m", "in-place", "in place, 2 MiB by 4 KiB"),
];

struct Table {
    title: String,
    heads: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut text = line(&self.heads);
        text.push_str(&line(&vec!["---".to_string(); self.heads.len()]));
        for row in &self.rows {
            text.push_str(&line(row));
        }
        text
    }

    fn text(&self) -> String {
        let plain = |cell: &String| cell.replace('`', "");
        let all = || [&self.heads].into_iter().chain(&self.rows);
        let widths: Vec<usize> = (0..self.heads.len())
            .map(|at| {
                let lengths = all().map(|row| plain(&row[at]).chars().count());
                lengths.max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for row in all() {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{:<width$}", plain(cell)))
                .collect();
            text.push_str(&format!("  {}\n", cells.join("  ").trim_end()));
        }
        text
    }
}

impl Calls {
    fn text(&self) -> String {
        if self.calls.is_empty() {
            return "none".into();
        }
        let requests = self.requests.max(1) as f64;
        let parts: Vec<String> = self
            .calls
            .iter()
            .map(|(name, &count)| format!("{} {name}", plots::short(count as f64 / requests)))
            .collect();
        parts.join(", ")
    }
}

fn head(column: &str) -> &str {
    let known = COLUMNS.iter().find(|(name, ..)| *name == column);
    known.map_or(column, |(_, _, head)| head)
}

fn is_in_place(column: &str) -> bool {
    COLUMNS
        .iter()
        .any(|(name, mode, _)| *name == column && *mode == Mode::InPlace)
}

fn what(case: &str) -> &'static str {
    let known = PLANE_CASES.iter().find(|(name, _)| *name == case);
    known.map_or("", |(_, what)| what)
}

/// The median, of times in round trips.
fn scaled(reading: &Reading) -> Option<f64> {
    let value = median(reading.values.clone())?;
    match reading.kind.as_str() {
        "time" => Some(value / reading.yardstick?),
        _ => Some(value),
    }
}

fn cell(reading: &Reading) -> String {
    match reading.kind.as_str() {
        "time" => match reading.yardstick {
            Some(unit) => spread(&reading.values, unit),
            None => "–".into(),
        },
        "ratio" => spread(&reading.values, 1.0),
        "bytes" => median(reading.values.clone()).map_or("–".into(), mebibytes),
        _ => median(reading.values.clone()).map_or("–".into(), plots::thousands),
    }
}

/// `1,029.3 MiB`: a few more or less of a thousand are what counts.
fn mebibytes(value: f64) -> String {
    let tenths = (value / f64::from(1 << 20) * 10.0).round();
    let sign = if tenths < 0.0 { "-" } else { "" };
    let tenths = tenths.abs();
    let whole = plots::thousands((tenths / 10.0).floor());
    format!("{sign}{whole}.{} MiB", tenths as u64 % 10)
}

/// `3.10 (2.95 to 4.02)`, in units.
fn spread(values: &[f64], unit: f64) -> String {
    let Some(middle) = median(values.to_vec()) else {
        return "–".into();
    };
    let show = |value: f64| significant(value / unit);
    let least = values.iter().copied().reduce(f64::min);
    let most = values.iter().copied().reduce(f64::max);
    match (least, most) {
        (Some(least), Some(most)) if values.len() > 1 => {
            format!("{} ({} to {})", show(middle), show(least), show(most))
        }
        _ => show(middle),
    }
}

/// Three digits, small numbers too.
fn significant(value: f64) -> String {
    match value.abs() {
        size if size >= 0.1 || size == 0.0 => plots::short(value),
        size => {
            let digits = (2 - size.log10().floor() as i32).clamp(0, 9) as usize;
            format!("{value:.digits$}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(mode: Mode) -> Run {
        Run::new("bench-inplace-convert", mode)
    }

    fn outcome(facts: Value, error: Option<&str>) -> Outcome {
        Outcome {
            name: "bench-inplace-convert".into(),
            ok: error.is_none(),
            seconds: 1.0,
            facts: facts.as_object().unwrap().clone(),
            error: error.map(str::to_string),
            console: None,
        }
    }

    fn reading(column: &str, values: &[f64], yardstick: f64) -> Value {
        json!({
            "case": "inplace-2m", "measure": "to shared", "column": column, "kind": "time",
            "values": values, "yardstick": yardstick,
        })
    }

    fn both() -> Planes {
        let mut planes = Planes::default();
        let split = json!({
            "readings": [reading("split", &[400.0, 300.0, 500.0], 100.0)],
            "calls": [{
                "case": "inplace-2m", "measure": "to shared", "column": "split", "requests": 16,
                "calls": {"fallocate": 16, "futex": 8},
            }],
            "yardsticks": {"round_trip": [100.0, 110.0, 90.0]},
        });
        planes
            .take(&run(Mode::Split), &outcome(split, None))
            .unwrap();
        let in_place = json!({
            "readings": [reading("in-place", &[400.0], 200.0)],
            "yardsticks": {"round_trip": [200.0]},
            "missing": [{"column": "in-place-2m", "why": "not in this kernel"}],
        });
        planes
            .take(&run(Mode::InPlace), &outcome(in_place, None))
            .unwrap();
        planes
    }

    #[test]
    fn times_of_two_boots_are_multiples_of_each_boots_own_yardstick() {
        let text = both().markdown();
        assert!(
            text.contains("| to shared | 4 (3 to 5) | 2 | 0.50 | – |"),
            "{text}"
        );
        assert!(
            text.contains("| into a guest and out again | 1 (0.90 to 1.10) | 2 |"),
            "{text}"
        );
        assert!(text.contains("1 fallocate, 0.50 futex"), "{text}");
    }

    #[test]
    fn what_a_kernel_lacks_is_said_and_no_failure() {
        let planes = both();
        assert!(planes.complete());
        assert!(planes
            .text()
            .contains("in place, 2 MiB not measured by bench-inplace-convert: not in this kernel"));
    }

    #[test]
    fn a_failed_scenario_is_incomplete_until_it_is_measured_again() {
        let mut planes = both();
        let failed = outcome(json!({}), Some("L1 went down\nand more"));
        planes.take(&run(Mode::Split), &failed).unwrap();
        assert!(!planes.complete());
        assert!(!planes.markdown().contains("4 (3 to 5)"));
        assert!(planes.text().contains(": L1 went down\n"));
        let again = json!({"readings": [reading("split", &[1.0], 1.0)]});
        planes
            .take(&run(Mode::Split), &outcome(again, None))
            .unwrap();
        assert!(planes.complete());
    }

    #[test]
    fn what_was_written_reads_as_the_same() {
        let planes = both();
        let json = planes.json();
        assert_eq!(json["readings"][0]["by_yardstick"], 4);
        assert_eq!(Planes::read(&json), planes);
        assert!(Planes::read(&Value::Null).is_empty());
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(mebibytes(1029.25 * 1048576.0), "1,029.3 MiB");
        assert_eq!(mebibytes(-1048576.0), "-1.0 MiB");
        assert_eq!(significant(0.001234), "0.00123");
        assert_eq!(significant(12.34), "12.3");
    }
}
