// SPDX-License-Identifier: MIT OR Apache-2.0
//! The same QEMU ran a confidential guest on a kernel without and on one with conversion in place, and used what each has.

use crate::mode::Mode;
use crate::report::Outcome;
use crate::tally::Verdict;
use serde_json::Value;

pub const NAME: &str = "one binary on both kernels";
const SCENARIO: &str = "confidential-convert";

/// What the scenario said in both modes; `None` if it did not run in both.
pub fn verdict(outcomes: &[Outcome]) -> Option<Verdict> {
    let fact = |mode: Mode, name: &str| {
        let outcome = outcomes
            .iter()
            .find(|outcome| outcome.name == mode.name(SCENARIO))?;
        Some(
            outcome
                .facts
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or(""),
        )
    };
    let ids = [Mode::Split, Mode::InPlace].map(|mode| fact(mode, "qemu_build_id"));
    let [Some(split), Some(in_place)] = ids else {
        return None;
    };
    let backings = [Mode::Split, Mode::InPlace].map(|mode| fact(mode, "backing"));
    Some(
        if split.is_empty() || split != in_place || backings != [Some("split"), Some("in-place")] {
            Verdict::Failed(format!(
                "build ids of QEMU in the two boots: {split:?}, {in_place:?}; backings: {backings:?}"
            ))
        } else {
            Verdict::Passed
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn outcome(name: &str, facts: Value) -> Outcome {
        Outcome {
            name: name.into(),
            ok: true,
            seconds: 1.0,
            facts: facts.as_object().unwrap().clone(),
            error: None,
            console: None,
        }
    }

    #[test]
    fn it_takes_both_and_the_same_file() {
        let split = outcome(SCENARIO, json!({"qemu_build_id": "ab", "backing": "split"}));
        let in_place = |id: &str| {
            outcome(
                "in-place/confidential-convert",
                json!({"qemu_build_id": id, "backing": "in-place"}),
            )
        };
        assert_eq!(verdict(std::slice::from_ref(&split)), None);
        let both = [split.clone(), in_place("ab")];
        assert_eq!(verdict(&both), Some(Verdict::Passed));
        let other = [split.clone(), in_place("cd")];
        assert!(matches!(verdict(&other), Some(Verdict::Failed(_))));
        let silent = [split, outcome("in-place/confidential-convert", json!({}))];
        assert!(matches!(verdict(&silent), Some(Verdict::Failed(_))));
    }
}
