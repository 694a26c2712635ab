// SPDX-License-Identifier: MIT OR Apache-2.0
//! What was read, by case, measure and kind of memory, in the order in which it is shown.

use super::yardstick::Yardsticks;
use super::Column;
use crate::scenario::Scenario;
use serde_json::{json, Value};
use std::collections::BTreeMap;

/// What a number is.
#[derive(Clone, Copy)]
pub enum Kind {
    /// Nanoseconds of one of whatever it is, a value for each run.
    Time,
    Bytes,
    Count,
    Ratio,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Time => "time",
            Kind::Bytes => "bytes",
            Kind::Count => "count",
            Kind::Ratio => "ratio",
        }
    }
}

struct Reading {
    case: &'static str,
    measure: String,
    column: Column,
    kind: Kind,
    values: Vec<f64>,
}

#[derive(Default)]
pub struct Readings {
    readings: Vec<Reading>,
    calls: Vec<Value>,
}

impl Readings {
    /// One more value of a measure.
    pub fn add(
        &mut self,
        case: &'static str,
        measure: impl Into<String>,
        column: Column,
        kind: Kind,
        value: f64,
    ) {
        let measure = measure.into();
        let known = self.readings.iter_mut().find(|reading| {
            reading.case == case && reading.measure == measure && reading.column == column
        });
        match known {
            Some(reading) => reading.values.push(value),
            None => self.readings.push(Reading {
                case,
                measure,
                column,
                kind,
                values: vec![value],
            }),
        }
    }

    /// The kernel's count of a request's calls, by name; `requests` were made.
    pub fn calls(
        &mut self,
        case: &'static str,
        measure: impl Into<String>,
        column: Column,
        requests: u64,
        by_name: &BTreeMap<String, u64>,
    ) {
        self.calls.push(json!({
            "case": case, "measure": measure.into(), "column": column.name(),
            "requests": requests, "calls": by_name,
        }));
    }

    /// Reports everything so far.
    pub fn tell(
        &self,
        scenario: &mut Scenario,
        yardsticks: Option<&Yardsticks>,
        missing: &[(Column, String)],
    ) {
        let yardstick = yardsticks.map(Yardsticks::round_trip_ns);
        let readings: Vec<Value> = self
            .readings
            .iter()
            .map(|reading| {
                let mut told = json!({
                    "case": reading.case,
                    "measure": reading.measure,
                    "column": reading.column.name(),
                    "kind": reading.kind.name(),
                    "values": reading.values,
                });
                if let (Kind::Time, Some(yardstick)) = (reading.kind, yardstick) {
                    told["yardstick"] = json!(yardstick);
                }
                told
            })
            .collect();
        scenario.fact("readings", readings);
        scenario.fact("calls", self.calls.clone());
        if let Some(yardsticks) = yardsticks {
            scenario.fact("yardsticks", yardsticks.json());
        }
        let missing: Vec<Value> = missing
            .iter()
            .map(|(column, why)| json!({"column": column.name(), "why": why}))
            .collect();
        scenario.fact("missing", missing);
    }
}
