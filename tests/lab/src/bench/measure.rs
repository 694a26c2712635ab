// SPDX-License-Identifier: MIT OR Apache-2.0
//! From what L1 measured of one case to its part of bench.json: medians, spread, ratios.

use anyhow::{Context, Result};
use serde_json::{Map, Number, Value};

/// What a side may have, in the order of bench.json.
pub const FIGURES: &[&str] = &[
    "map_ioctls",
    "unmap_ioctls",
    "attr_ioctls",
    "other_syscalls",
    "seconds",
    "p50_us",
    "p99_us",
    "slab_bytes",
];

/// One case, with the sides `stock`, `gmem` and `bare` as the agent reports them: `runs` are the seconds of each run, the
/// other figures are of all runs together or of a run that the kernel traced. A figure that does not exist is absent.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    told: Map<String, Value>,
}

impl Case {
    pub fn new(told: &Value) -> Result<Case> {
        let told = told.as_object().context("a case is no JSON object")?;
        let name = told.get("name").and_then(Value::as_str);
        Ok(Case {
            name: name.context("a case has no name")?.to_string(),
            told: told.clone(),
        })
    }

    fn seconds(&self, side: &str) -> Vec<f64> {
        let runs = self.told.get(side).and_then(|side| side["runs"].as_array());
        let runs = runs.map(|runs| runs.iter().filter_map(Value::as_f64).collect());
        runs.unwrap_or_default()
    }

    /// A figure of a side; of seconds, the median over the runs.
    pub fn figure(&self, side: &str, figure: &str) -> Option<f64> {
        let told = || self.told.get(side)?.get(figure)?.as_f64();
        match figure {
            "seconds" => median(self.seconds(side)).or_else(told),
            _ => told(),
        }
    }

    /// Stock's figure by ours: how many times better ours is.
    pub fn ratio(&self, figure: &str) -> Option<f64> {
        quotient(self.figure("stock", figure), self.figure("gmem", figure))
    }

    /// Our figure by that of the same kernel calls without us.
    pub fn bare_ratio(&self, figure: &str) -> Option<f64> {
        quotient(self.figure("gmem", figure), self.figure("bare", figure))
    }

    /// A fact that is a number.
    pub fn fact(&self, side: &str, name: &str) -> Option<f64> {
        self.told.get(side)?.get("facts")?.get(name)?.as_f64()
    }

    /// Requests of one run.
    pub fn requests(&self) -> Option<f64> {
        self.told.get("requests")?.as_f64()
    }

    /// Requests of all runs whose time was taken.
    pub fn requests_in_all(&self, side: &str) -> Option<f64> {
        Some(self.requests()? * self.seconds(side).len() as f64)
    }

    /// The case as bench.json has it, but for its goals.
    pub fn json(&self) -> Map<String, Value> {
        let mut case = Map::new();
        case.insert("name".into(), self.name.as_str().into());
        for side in ["stock", "gmem"] {
            case.insert(side.into(), self.side(side).into());
        }
        let ratio = FIGURES
            .iter()
            .map(|figure| ((*figure).to_string(), number(self.ratio(figure))));
        case.insert("ratio".into(), ratio.collect::<Map<_, _>>().into());
        case.insert("bare_ratio".into(), number(self.bare_ratio("seconds")));
        if let Some(bare) = self.told.get("bare") {
            let mut bare = bare.clone();
            bare["seconds"] = number(self.figure("bare", "seconds"));
            case.insert("bare".into(), bare);
        }
        let rest = self.told.iter().filter(|(name, _)| {
            ![
                "name",
                "stock",
                "gmem",
                "bare",
                "ratio",
                "goal",
                "bare_ratio",
            ]
            .contains(&name.as_str())
        });
        for (name, value) in rest {
            case.insert(name.clone(), value.clone());
        }
        case
    }

    fn side(&self, side: &str) -> Map<String, Value> {
        let mut figures: Map<String, Value> = FIGURES
            .iter()
            .map(|figure| ((*figure).to_string(), number(self.figure(side, figure))))
            .collect();
        let seconds = self.seconds(side);
        if !seconds.is_empty() {
            let least = seconds.iter().copied().reduce(f64::min);
            let most = seconds.iter().copied().reduce(f64::max);
            figures.insert("seconds_min".into(), number(least));
            figures.insert("seconds_max".into(), number(most));
            figures.insert("runs".into(), seconds.into());
        }
        let facts = self.told.get(side).and_then(|side| side.get("facts"));
        let facts = facts.cloned().unwrap_or_else(|| Map::new().into());
        figures.insert("facts".into(), facts);
        figures
    }
}

/// The middle one, or the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    Some(if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    })
}

/// None where a side has no such figure or the second is nothing: no number would be true.
fn quotient(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    let (a, b) = (a?, b?);
    (b > 0.0).then(|| a / b)
}

/// Whole numbers without a point, others with five significant digits.
pub fn number(value: Option<f64>) -> Value {
    let Some(value) = value.filter(|value| value.is_finite()) else {
        return Value::Null;
    };
    if value.fract() == 0.0 && value.abs() < 9e15 {
        return Value::from(value as i64);
    }
    let digits = (4 - value.abs().log10().floor() as i32).clamp(0, 9) as usize;
    let short = format!("{value:.digits$}").parse().ok();
    short
        .and_then(Number::from_f64)
        .map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn case() -> Case {
        Case::new(&json!({
            "name": "a",
            "stock": {"seconds": 99.0, "runs": [4.0, 8.0, 6.0], "map_ioctls": 512},
            "gmem": {"runs": [2.0], "map_ioctls": 0, "slab_bytes": 7, "facts": {"how": "cut", "faults": 3}},
            "bare": {"seconds": 1.6, "calls": {"map": 1}},
            "requests": 5,
        }))
        .unwrap()
    }

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_case_gets_its_medians_spread_and_ratios() {
        let json = Value::Object(case().json());
        assert_eq!(json["stock"]["seconds"], 6);
        assert_eq!(json["stock"]["seconds_min"], 4);
        assert_eq!(json["stock"]["seconds_max"], 8);
        assert_eq!(json["stock"]["runs"], json!([4.0, 8.0, 6.0]));
        assert_eq!(json["ratio"]["seconds"], 3);
        assert_eq!(json["bare_ratio"], 1.25);
        assert_eq!(json["gmem"]["facts"]["how"], "cut");
        assert_eq!(json["bare"]["calls"]["map"], 1);
        assert_eq!(json["requests"], 5);
        assert_eq!(case().requests_in_all("stock"), Some(15.0));
    }

    #[test]
    fn a_ratio_is_null_where_ours_is_nothing_or_a_figure_is_missing() {
        let json = Value::Object(case().json());
        assert_eq!(json["ratio"]["map_ioctls"], Value::Null);
        assert_eq!(json["ratio"]["slab_bytes"], Value::Null);
        assert_eq!(json["ratio"]["p99_us"], Value::Null);
        assert_eq!(json["stock"]["slab_bytes"], Value::Null);
        let alone = Case::new(&json!({"name": "b", "gmem": {"runs": [1.5]}})).unwrap();
        let json = Value::Object(alone.json());
        assert_eq!(json["stock"]["seconds"], Value::Null);
        assert_eq!(json["bare_ratio"], Value::Null);
        assert!(json.get("bare").is_none());
    }

    #[test]
    fn what_was_written_reads_as_the_same() {
        let json = Value::Object(case().json());
        let again = Case::new(&json).unwrap();
        assert_eq!(Value::Object(again.json()), json);
        assert_eq!(again.fact("gmem", "faults"), Some(3.0));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(number(Some(512.0)), json!(512));
        assert_eq!(number(Some(0.123456)), json!(0.12346));
        assert_eq!(number(Some(123.456789)), json!(123.46));
        assert_eq!(number(Some(f64::NAN)), Value::Null);
        assert_eq!(number(None), Value::Null);
    }
}
