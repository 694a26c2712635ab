// SPDX-License-Identifier: MIT OR Apache-2.0
//! The library by itself, on this machine: `cargo bench --bench growth`, held against its goals.

use super::cases::Limit;
use super::summary::Judged;
use crate::process::Logs;
use crate::{tree::Tree, ui};
use anyhow::{bail, Result};
use serde::{Deserialize, Serialize};
use std::process::Command;

/// A block of 1 TiB with so many private runs.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Point {
    pub runs: u64,
    pub look_up_ns: f64,
    pub convert_4k_ns: f64,
    pub bytes: u64,
}

/// What a guest that alternates pages costs.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Alternating {
    pub block_bytes: u64,
    pub alternating_bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Growth {
    pub points: Vec<Point>,
    pub alternating: Option<Alternating>,
}

const MILLION: u64 = 1_000_000;

/// Builds and runs the benchmark.
pub fn measure(logs: &Logs, tree: &Tree) -> Result<Growth> {
    let step = ui::step("growth", "building");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command
        .current_dir(tree.root())
        .args(["bench", "--package", "gmem", "--bench", "growth"]);
    let mut growth = Growth::default();
    logs.run_lines("bench-growth", &mut command, |line| {
        if growth.take(line) {
            step.update("measuring");
        }
    })?;
    if growth.points.is_empty() {
        bail!("`cargo bench --bench growth` printed no measurement");
    }
    growth.points.sort_by_key(|point| point.runs);
    step.done("growth measured");
    Ok(growth)
}

impl Growth {
    /// Whether the line was one of ours.
    fn take(&mut self, line: &str) -> bool {
        if let Ok(point) = serde_json::from_str(line) {
            self.points.push(point);
            return true;
        }
        if let Ok(alternating) = serde_json::from_str(line) {
            self.alternating = Some(alternating);
            return true;
        }
        false
    }

    pub fn goals(&self) -> Vec<Judged> {
        let million = self.points.iter().find(|point| point.runs == MILLION);
        let small = self.points.iter().min_by_key(|point| point.runs);
        vec![
            Judged {
                what: "planning and bookkeeping of a 4 KiB conversion, ns",
                limit: Limit::AtMost(1000.0),
                measured: small.map(|point| point.convert_4k_ns),
            },
            Judged {
                what: "look-up among a million extents in 1 TiB, ns",
                limit: Limit::AtMost(500.0),
                measured: million.map(|point| point.look_up_ns),
            },
            Judged {
                what: "bytes an extent, a million of them in 1 TiB",
                limit: Limit::AtMost(64.0),
                measured: million.map(|point| point.bytes as f64 / point.runs as f64),
            },
            Judged {
                what: "bookkeeping of a guest that alternates pages, % of the block",
                limit: Limit::AtMost(0.1),
                measured: self.alternating.as_ref().map(|alternating| {
                    100.0 * alternating.alternating_bytes as f64 / alternating.block_bytes as f64
                }),
            },
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_points_and_goals() {
        let mut growth = Growth::default();
        assert!(!growth.take("    Finished `bench` profile"));
        assert!(
            growth.take(r#"{"runs": 1, "look_up_ns": 11.2, "convert_4k_ns": 772.4, "bytes": 352}"#)
        );
        assert!(growth.take(
            r#"{"runs": 1000000, "look_up_ns": 400.5, "convert_4k_ns": 1600.0, "bytes": 32000000}"#
        ));
        assert!(growth.take(r#"{"block_bytes": 1000000, "alternating_bytes": 500}"#));
        let goals: Vec<Option<f64>> = growth.goals().iter().map(|goal| goal.measured).collect();
        assert_eq!(goals, [Some(772.4), Some(400.5), Some(32.0), Some(0.05)]);
    }
}
