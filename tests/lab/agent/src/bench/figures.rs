// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a side of a case comes to: medians, percentiles, counts, and how they are reported.

use super::calls::Counts;
use crate::failure::{Attempt, Failure};
use serde_json::{json, Map, Value};
use std::fs;

/// One side of one case, run by run.
#[derive(Default)]
pub struct Figures {
    /// Seconds of each timed run.
    pub runs: Vec<f64>,
    /// Nanoseconds of each request of all timed runs.
    pub requests: Vec<u64>,
    pub counts: Option<Counts>,
    pub slab_bytes: Option<i64>,
    pub facts: Map<String, Value>,
}

impl Figures {
    pub fn fact(&mut self, name: &str, value: impl Into<Value>) {
        self.facts.insert(name.to_string(), value.into());
    }

    /// A fact of which the largest of all runs counts.
    pub fn most(&mut self, name: &str, value: u64) {
        let old = self.facts.get(name).and_then(Value::as_u64).unwrap_or(0);
        self.fact(name, old.max(value));
    }

    /// A fact that adds up over the runs.
    pub fn add(&mut self, name: &str, value: u64) {
        let old = self.facts.get(name).and_then(Value::as_u64).unwrap_or(0);
        self.fact(name, old + value);
    }

    pub fn json(&self) -> Value {
        let mut side = Map::new();
        if !self.runs.is_empty() {
            side.insert("seconds".into(), json!(rounded(median(&self.runs))));
            let runs: Vec<f64> = self.runs.iter().map(|run| rounded(*run)).collect();
            side.insert("runs".into(), json!(runs));
        }
        if !self.requests.is_empty() {
            let mut sorted = self.requests.clone();
            sorted.sort_unstable();
            side.insert(
                "p50_us".into(),
                json!(microseconds(percentile(&sorted, 50))),
            );
            side.insert(
                "p99_us".into(),
                json!(microseconds(percentile(&sorted, 99))),
            );
        }
        if let Some(counts) = &self.counts {
            side.insert("map_ioctls".into(), json!(counts.map));
            side.insert("unmap_ioctls".into(), json!(counts.unmap));
            side.insert("attr_ioctls".into(), json!(counts.attributes));
            side.insert("other_syscalls".into(), json!(counts.other));
        }
        if let Some(bytes) = self.slab_bytes {
            side.insert("slab_bytes".into(), json!(bytes));
        }
        let mut facts = self.facts.clone();
        if let Some(counts) = &self.counts {
            facts.insert("syscalls".into(), json!(counts.by_name));
        }
        side.insert("facts".into(), Value::Object(facts));
        Value::Object(side)
    }
}

fn microseconds(nanoseconds: u64) -> f64 {
    (nanoseconds as f64 / 100.0).round() / 10.0
}

fn rounded(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

/// Of an odd number the one in the middle, of an even one the mean of the two there.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted[(sorted.len() - 1) * percent / 100]
}

/// Bytes in the two caches where iommufd's areas and their pages live.
pub fn slab_bytes() -> Result<i64, Failure> {
    let text = fs::read_to_string("/proc/slabinfo").attempt(|| "reading /proc/slabinfo".into())?;
    ["kmalloc-192", "kmalloc-cg-192"]
        .iter()
        .map(|name| cache(&text, name).attempt(|| format!("/proc/slabinfo has no {name}")))
        .sum()
}

/// Active objects times their size.
fn cache(text: &str, name: &str) -> Option<i64> {
    let line = text
        .lines()
        .find(|line| line.split_ascii_whitespace().next() == Some(name))?;
    let mut numbers = line
        .split_ascii_whitespace()
        .skip(1)
        .map(|word| word.parse::<i64>());
    let active = numbers.next()?.ok()?;
    let size = numbers.nth(1)?.ok()?;
    Some(active * size)
}

#[cfg(test)]
mod tests {
    use super::{cache, median, percentile};

    #[test]
    fn medians_and_percentiles() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        let values: Vec<u64> = (1..=101).collect();
        assert_eq!(percentile(&values, 50), 51);
        assert_eq!(percentile(&values, 99), 100);
        assert_eq!(percentile(&[7], 99), 7);
    }

    #[test]
    fn a_cache_is_found_by_its_whole_name() {
        let text = "slabinfo - version: 2.1\n# name <active_objs> <num_objs> <objsize> …\n\
            kmalloc-cg-192 21 42 192 21 1 : tunables 0 0 0 : slabdata 2 2 0\n\
            kmalloc-192 2000 2100 192 21 1 : tunables 0 0 0 : slabdata 100 100 0\n";
        assert_eq!(cache(text, "kmalloc-192"), Some(2000 * 192));
        assert_eq!(cache(text, "kmalloc-cg-192"), Some(21 * 192));
        assert_eq!(cache(text, "kmalloc-96"), None);
    }
}
