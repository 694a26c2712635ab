// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counting: every test of `cargo lab test` ends up here with a name and one of three results.

use crate::ui;

#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

#[derive(Debug, Default)]
pub struct Tally {
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
}

impl Tally {
    /// Counts a test and says so.
    pub fn add(&mut self, name: &str, verdict: &Verdict) {
        self.count(name, verdict);
        match verdict {
            Verdict::Passed => ui::line(&format!("ok       {name}")),
            Verdict::Failed(reason) => {
                ui::line(&format!("FAILED   {name}"));
                for line in reason.lines() {
                    ui::line(&format!("         {line}"));
                }
            }
            Verdict::Skipped(reason) => ui::line(&format!("skipped  {name}: {reason}")),
        }
    }

    fn count(&mut self, name: &str, verdict: &Verdict) {
        match verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Failed(_) => self.failed.push(name.to_string()),
            Verdict::Skipped(_) => self.skipped += 1,
        }
    }

    pub fn add_all(&mut self, tests: &[(String, Verdict)]) {
        for (name, verdict) in tests {
            self.add(name, verdict);
        }
    }

    /// Whether nothing failed and something passed: a run that tested nothing is not a success.
    pub fn good(&self) -> bool {
        self.failed.is_empty() && self.passed > 0
    }

    pub fn failures(&self) -> &[String] {
        &self.failed
    }

    /// The last line of a run.
    pub fn line(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed.len(),
            self.skipped
        )
    }
}

/// Whether a test is meant by the user's filter.
pub fn wanted(filter: Option<&str>, name: &str) -> bool {
    filter.is_none_or(|filter| filter.split(',').any(|part| name.contains(part)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_good_if_something_passed_and_nothing_failed() {
        let mut tally = Tally::default();
        assert!(!tally.good());
        tally.count("s", &Verdict::Skipped("why".into()));
        assert!(!tally.good());
        tally.count("p", &Verdict::Passed);
        assert!(tally.good());
        tally.count("f", &Verdict::Failed("why".into()));
        assert!(!tally.good());
        assert_eq!(tally.line(), "1 passed, 1 failed, 1 skipped");
        assert_eq!(tally.failures(), ["f"]);
    }

    #[test]
    fn a_filter_is_a_substring() {
        assert!(wanted(None, "x"));
        assert!(wanted(Some("vfio"), "scenario ordinary-vfio-nvme"));
        assert!(!wanted(Some("edu"), "scenario ordinary-vfio-nvme"));
    }
}
