// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one run of the benchmark found, case by case, held against the goals: bench.json and the closing table.

use super::cases::{self, Limit};
use super::measure::{number, Case};
use super::native::Growth;
use super::planes::Planes;
use super::plots;
use anyhow::{Context, Result};
use serde_json::{json, Map, Value};
use std::path::Path;

/// A goal, and what was measured of it; nothing is a goal missed.
pub struct Judged {
    pub what: &'static str,
    pub limit: Limit,
    pub measured: Option<f64>,
}

impl Judged {
    pub fn met(&self) -> bool {
        self.measured.is_some_and(|value| self.limit.holds(value))
    }
}

/// A case, or the library by itself.
pub struct Row {
    pub name: String,
    pub case: Option<Case>,
    pub goals: Vec<Judged>,
    /// Why there is no measurement.
    pub error: Option<String>,
}

#[derive(Default)]
pub struct Summary {
    pub rows: Vec<Row>,
    pub growth: Option<Growth>,
    /// The kinds of memory.
    pub planes: Planes,
    /// On what and when, for people.
    pub run: String,
}

pub const LIBRARY: &str = "growth";

impl Summary {
    /// Adds a case, in place of an earlier one of its name.
    pub fn add(&mut self, case: Case) {
        let goals = cases::kind(&case.name).map_or(&[][..], |kind| kind.goals);
        let goals = goals
            .iter()
            .map(|goal| Judged {
                what: goal.what,
                limit: goal.limit,
                measured: (goal.value)(&case),
            })
            .collect();
        self.put(Row {
            name: case.name.clone(),
            case: Some(case),
            goals,
            error: None,
        });
    }

    pub fn add_growth(&mut self, growth: Growth) {
        let goals = growth.goals();
        self.growth = Some(growth);
        self.put(Row {
            name: LIBRARY.into(),
            case: None,
            goals,
            error: None,
        });
    }

    /// Adds a case that could not be measured; goals count as missed.
    pub fn add_failure(&mut self, name: &str, error: &str) {
        let goals = cases::kind(name).map_or(&[][..], |kind| kind.goals);
        let goals = goals
            .iter()
            .map(|goal| Judged {
                what: goal.what,
                limit: goal.limit,
                measured: None,
            })
            .collect();
        self.put(Row {
            name: name.into(),
            case: None,
            goals,
            error: Some(error.into()),
        });
    }

    fn put(&mut self, row: Row) {
        self.rows.retain(|other| other.name != row.name);
        self.rows.push(row);
        let place = |row: &Row| {
            let place = cases::CASES.iter().position(|kind| kind.name == row.name);
            place.unwrap_or(cases::CASES.len())
        };
        self.rows.sort_by_key(place);
    }

    pub fn cases(&self) -> Vec<Case> {
        self.rows
            .iter()
            .filter_map(|row| row.case.clone())
            .collect()
    }

    /// Whether every case could be measured.
    pub fn complete(&self) -> bool {
        self.rows.iter().all(|row| row.error.is_none()) && self.planes.complete()
    }

    /// Reads an earlier bench.json.
    pub fn read(path: &Path) -> Result<Summary> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("can't read {}; nothing was measured yet", path.display()))?;
        let json: Value = serde_json::from_str(&text)
            .with_context(|| format!("{} is no bench.json", path.display()))?;
        let mut summary = Summary {
            run: json["run"].as_str().unwrap_or_default().to_string(),
            planes: Planes::read(&json["planes"]),
            ..Summary::default()
        };
        for told in json["cases"].as_array().into_iter().flatten() {
            match told["error"].as_str() {
                Some(error) => {
                    let name = told["name"].as_str().unwrap_or_default();
                    summary.add_failure(name, error);
                }
                None => summary.add(Case::new(told)?),
            }
        }
        if let Ok(points) = serde_json::from_value(json["library"]["points"].clone()) {
            summary.add_growth(Growth {
                points,
                alternating: serde_json::from_value(json["library"]["alternating"].clone()).ok(),
            });
        }
        Ok(summary)
    }

    pub fn json(&self) -> Value {
        let cases: Vec<Value> = self
            .rows
            .iter()
            .filter(|row| row.name != LIBRARY)
            .map(|row| {
                let mut json = match &row.case {
                    Some(case) => case.json(),
                    None => Map::from_iter([
                        ("name".to_string(), Value::from(row.name.as_str())),
                        ("error".to_string(), row.error.clone().into()),
                    ]),
                };
                json.insert("goal".into(), goal(row));
                json.into()
            })
            .collect();
        let mut json = json!({ "cases": cases, "run": self.run });
        if !self.planes.is_empty() {
            json["planes"] = self.planes.json();
        }
        if let (Some(growth), Some(row)) = (
            &self.growth,
            self.rows.iter().find(|row| row.name == LIBRARY),
        ) {
            json["library"] = json!({
                "points": growth.points, "alternating": growth.alternating, "goal": goal(row),
            });
        }
        json
    }

    /// Whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.json())? + "\n";
        let part = path.with_extension("json.part");
        std::fs::write(&part, text)
            .and_then(|()| std::fs::rename(&part, path))
            .with_context(|| format!("can't write {}", path.display()))
    }

    /// The table at the end of a run, a line for each goal.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for row in &self.rows {
            for goal in &row.goals {
                let mark = if goal.met() { "met   " } else { "MISSED" };
                let measured = goal.measured.map_or("–".into(), plots::short);
                text.push_str(&format!(
                    "{mark}  {:<17} {:>9}  {:<9} {}\n",
                    row.name,
                    measured,
                    goal.limit.text(),
                    goal.what
                ));
            }
            if let Some(error) = &row.error {
                text.push_str(&format!("        {:<17} not measured: {error}\n", row.name));
            }
        }
        text
    }

    /// The last line.
    pub fn line(&self) -> String {
        let goals = || self.rows.iter().flat_map(|row| &row.goals);
        let met = goals().filter(|goal| goal.met()).count();
        let mut missed: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !row.goals.iter().all(Judged::met) {
                missed.push(&row.name);
            }
        }
        let total = goals().count();
        match missed.is_empty() {
            true => format!("all {total} goals met"),
            false => format!(
                "{met} of {total} goals met; missed in: {}",
                missed.join(", ")
            ),
        }
    }
}

fn goal(row: &Row) -> Value {
    let parts: Vec<Value> = row
        .goals
        .iter()
        .map(|goal| {
            json!({
                "what": format!("{} {}", goal.what, goal.limit.text()),
                "measured": number(goal.measured),
                "met": goal.met(),
            })
        })
        .collect();
    let joined = |key: &str| {
        let all: Vec<String> = parts
            .iter()
            .map(|part| match &part[key] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            })
            .collect();
        all.join("; ")
    };
    json!({
        "what": joined("what"),
        "measured": joined("measured"),
        "met": row.error.is_none() && row.goals.iter().all(Judged::met),
        "parts": parts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        let mut summary = Summary {
            run: "somewhere".into(),
            ..Summary::default()
        };
        summary.add(
            Case::new(&json!({
                "name": "tdx-boot",
                "stock": {"runs": [9.0, 8.0]},
                "gmem": {"runs": [3.0], "facts": {"dma_faults": 0}},
            }))
            .unwrap(),
        );
        summary.add_failure("share-1g", "L1 went down");
        summary
    }

    #[test]
    fn cases_are_in_order_and_judged() {
        let json = summary().json();
        assert_eq!(json["cases"][0]["name"], "share-1g");
        assert_eq!(json["cases"][0]["goal"]["met"], false);
        let goal = &json["cases"][1]["goal"];
        assert_eq!(goal["met"], true);
        assert_eq!(goal["parts"][0]["measured"], 2.8333);
        assert_eq!(
            goal["what"],
            "stock's time by ours ≥ 2.5; neighbour faults = 0"
        );
        assert_eq!(summary().line(), "2 of 6 goals met; missed in: share-1g");
        assert!(!summary().complete());
    }

    #[test]
    fn what_was_written_can_be_drawn_again() {
        let path = std::env::temp_dir().join(format!("gmem-lab-bench-{}", std::process::id()));
        let mut summary = summary();
        let growth = Growth {
            points: vec![crate::bench::native::Point {
                runs: 1,
                look_up_ns: 1.0,
                convert_4k_ns: 2.0,
                bytes: 3,
            }],
            alternating: None,
        };
        summary.add_growth(growth);
        summary.write(&path).unwrap();
        assert_eq!(Summary::read(&path).unwrap().json(), summary.json());
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_case_measured_again_takes_its_old_place() {
        let mut summary = summary();
        summary.add(Case::new(&json!({"name": "share-1g", "gmem": {"runs": [1.0]}})).unwrap());
        let names: Vec<&str> = summary.rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["share-1g", "tdx-boot"]);
        assert!(summary.complete());
    }
}
