// SPDX-License-Identifier: MIT OR Apache-2.0
//! The workspace's own tests: run by cargo, counted from what the test harness prints.
//!
//! A test that finds at run time that it can't run here prints `SKIPPED name: reason` at the start of a line and returns. The
//! harness calls that a pass; it is counted as skipped. A name with a slash is a part of a test whose other parts did run.

use crate::process::{self, Logs};
use crate::tally::Verdict;
use crate::{tree::Tree, ui};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

const REASON_LINES: usize = 12;

/// Builds and runs them. A build that fails is one failed test with the compiler's last words.
///
/// `headers` has `include/linux/kvm.h` of the lab's kernel, which is newer than the machine's.
pub fn run(
    logs: &Logs,
    tree: &Tree,
    filter: Option<&str>,
    headers: Option<&Path>,
) -> Result<Vec<(String, Verdict)>> {
    let step = ui::step("cargo test", "building");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command
        .current_dir(tree.root())
        .env("CARGO_TERM_COLOR", "never")
        .args(["test", "--workspace", "--no-fail-fast"])
        .args(["--", "--show-output", "--color", "never"])
        .args(filter.into_iter().flat_map(|filter| filter.split(',')));
    if let Some(headers) = headers {
        command.env("GMEM_KERNEL_HEADERS", headers);
    }
    let mut reader = Reader::default();
    let (status, log) = logs.run_status("cargo-test", &mut command, |line| {
        reader.line(line);
        if let Some(suite) = &reader.suite {
            step.update(suite);
        }
    })?;
    let mut tests = reader.finish();
    let any_failed = tests
        .iter()
        .any(|(_, verdict)| matches!(verdict, Verdict::Failed(_)));
    if !status.success() && !any_failed {
        tests.push((
            "cargo test".to_string(),
            Verdict::Failed(format!(
                "ended with {status}; the end of {}:\n{}",
                log.display(),
                process::tail(&log, 15)
            )),
        ));
    }
    step.done(&format!("{} tests", tests.len()));
    Ok(tests)
}

/// Reads the merged output of `cargo test -- --show-output` line by line.
#[derive(Default)]
struct Reader {
    suite: Option<String>,
    /// Tests of the current suite, in order of appearance.
    order: Vec<String>,
    verdicts: BTreeMap<String, Verdict>,
    /// The test whose captured output the lines belong to.
    output_of: Option<String>,
    output: BTreeMap<String, Vec<String>>,
    skipped: Vec<(String, String)>,
    /// Whether the current suite's harness lived to say its result.
    ended: bool,
    done: Vec<(String, Verdict)>,
}

impl Reader {
    fn line(&mut self, line: &str) {
        if let Some(name) = suite_name(line) {
            self.close();
            self.suite = Some(name);
            self.ended = false;
            return;
        }
        if self.suite.is_none() {
            return;
        }
        if let Some(skip) = skip(line) {
            self.skipped.push(skip);
            return;
        }
        if line.starts_with("test result: ") {
            self.ended = true;
            self.output_of = None;
            return;
        }
        if let Some((name, verdict)) = verdict(line) {
            self.output_of = None;
            if self.verdicts.insert(name.clone(), verdict).is_none() {
                self.order.push(name);
            }
            return;
        }
        if let Some(name) =
            (line.strip_prefix("---- ")).and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.output_of = Some(name.to_string());
        } else if matches!(line, "successes:" | "failures:") {
            self.output_of = None;
        } else if let Some(name) = &self.output_of {
            self.output
                .entry(name.clone())
                .or_default()
                .push(line.to_string());
        }
    }

    fn finish(mut self) -> Vec<(String, Verdict)> {
        self.close();
        self.done
    }

    /// Ends a suite: looks at what its tests printed.
    fn close(&mut self) {
        let Some(suite) = self.suite.take() else {
            return;
        };
        let mut skipped: BTreeMap<String, String> = self.skipped.drain(..).collect();
        for name in std::mem::take(&mut self.order) {
            let mut verdict = self.verdicts.remove(&name).unwrap_or(Verdict::Passed);
            match &mut verdict {
                Verdict::Passed => {
                    if let Some(reason) = skipped.remove(&name) {
                        verdict = Verdict::Skipped(reason);
                    }
                }
                Verdict::Failed(reason) => {
                    let output = self.output.remove(&name).unwrap_or_default();
                    *reason = beginning(&output);
                }
                Verdict::Skipped(_) => (),
            }
            self.done.push((format!("{suite}::{name}"), verdict));
        }
        for (part, reason) in skipped {
            self.done
                .push((format!("{suite}::{part}"), Verdict::Skipped(reason)));
        }
        if !self.ended {
            self.done.push((
                suite,
                Verdict::Failed("ended without a result: it was killed or aborted".into()),
            ));
        }
        self.verdicts.clear();
        self.output.clear();
        self.output_of = None;
    }
}

/// What cargo is about to run: `gmem` for its unit tests, `model` for tests/model.rs.
fn suite_name(line: &str) -> Option<String> {
    let line = line.trim_start();
    if let Some(name) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{name} (docs)"));
    }
    let rest = line.strip_prefix("Running ")?;
    // "unittests src/lib.rs (target/debug/deps/gmem-0123)" or "tests/model.rs (…)"
    let (_, binary) = rest.rsplit_once('(')?;
    let file = binary.strip_suffix(')')?.rsplit('/').next()?;
    let (name, _) = file.rsplit_once('-')?;
    Some(name.to_string())
}

/// A panic's message comes first; the backtrace behind it is in the log.
fn beginning(output: &[String]) -> String {
    let mut lines: Vec<&str> = output.iter().map(String::as_str).collect();
    if lines.len() > REASON_LINES {
        lines.truncate(REASON_LINES);
        lines.push("… (the rest is in logs/cargo-test.log)");
    }
    lines.join("\n").trim().to_string()
}

/// `SKIPPED name: reason`
fn skip(line: &str) -> Option<(String, String)> {
    let (name, reason) = line.strip_prefix("SKIPPED ")?.split_once(": ")?;
    (!name.contains(' ')).then(|| (name.to_string(), reason.to_string()))
}

/// `test name ... ok`, and what else can stand there.
fn verdict(line: &str) -> Option<(String, Verdict)> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let name = name.strip_suffix(" - should panic").unwrap_or(name);
    let verdict = match result {
        "ok" => Verdict::Passed,
        "FAILED" => Verdict::Failed(String::new()),
        _ => {
            let reason = result.strip_prefix("ignored")?;
            let reason = reason.strip_prefix(", ").unwrap_or("marked as ignored");
            Verdict::Skipped(reason.to_string())
        }
    };
    Some((name.to_string(), verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
   Compiling gmem v0.1.0
     Running unittests src/lib.rs (target/debug/deps/gmem-0a1b)

running 4 tests
SKIPPED a::absent: no /dev/kvm
SKIPPED a::good/part: old headers
test a::good ... ok
test a::bad ... FAILED
test a::absent ... ok
test a::later ... ignored, needs hardware

successes:

successes:
    a::absent
    a::good

failures:

---- a::bad stdout ----
thread 'a::bad' panicked at x:
no


failures:
    a::bad

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: test failed, to rerun pass `-p gmem --lib`
     Running tests/model.rs (target/debug/deps/model-2c3d)

running 1 test
error: test failed, to rerun pass `--test model`
   Doc-tests gmem

running 1 test
test src/lib.rs - (line 3) ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn every_test_is_counted_once_with_its_reason() {
        let mut reader = Reader::default();
        OUTPUT.lines().for_each(|line| reader.line(line));
        let tests = reader.finish();
        let names: Vec<&str> = tests.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "gmem::a::good",
                "gmem::a::bad",
                "gmem::a::absent",
                "gmem::a::later",
                "gmem::a::good/part",
                "model",
                "gmem (docs)::src/lib.rs - (line 3)"
            ]
        );
        assert_eq!(tests[0].1, Verdict::Passed);
        assert!(matches!(&tests[1].1, Verdict::Failed(text) if text.ends_with("no")));
        assert_eq!(tests[2].1, Verdict::Skipped("no /dev/kvm".into()));
        assert_eq!(tests[3].1, Verdict::Skipped("needs hardware".into()));
        assert_eq!(tests[4].1, Verdict::Skipped("old headers".into()));
        assert!(matches!(&tests[5].1, Verdict::Failed(text) if text.contains("killed")));
        assert_eq!(tests[6].1, Verdict::Passed);
    }
}
