// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs that ask this kernel: the library's native tests, and the kernel's own selftests.

use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::kernel;
use crate::scenario::{Outcome, Scenario};
use std::fs;
use std::process::{Command, Stdio};

const DIRECTORY: &str = "/lab/tests/selftests";
const LISTS: &str = "/lab/tests";
/// The exit status by which a kernel selftest says that it can't run here.
const SKIPPED: i32 = 4;
/// Lines of a failed test's output that go into the error.
const TAIL_LINES: usize = 5;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let told = fs::read_to_string("/proc/cmdline").attempt(|| "reading /proc/cmdline".into())?;
    let told = told
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("lab.programs="));
    let mode = match (told, kernel::in_place(), kernel::no_direct_map()) {
        (Some(list), ..) => list,
        (None, true, true) => "no-direct-map",
        (None, true, false) => "in-place",
        (None, false, _) => "split",
    };
    let path = format!("{LISTS}/{mode}.list");
    let list = fs::read_to_string(&path).attempt(|| format!("reading {path}"))?;
    let mut failed = Vec::new();
    let mut passed = 0;
    for line in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        scenario.progress(line);
        let (verdict, output) = one(line)?;
        scenario.fact(line, verdict);
        match verdict {
            "fail" => failed.push(format!("{line}: {output}")),
            "pass" => passed += 1,
            _ => {}
        }
    }
    scenario.check(
        failed.is_empty(),
        format!("all pass; failed: {}", failed.join("; ")),
    )?;
    scenario.check(passed > 0, format!("{path} has a test that can run here"))
}

fn one(line: &str) -> Result<(&'static str, String), Failure> {
    let mut words = line.split_ascii_whitespace();
    let program = words.next().attempt(|| "an empty line".into())?;
    let output = Command::new(format!("{DIRECTORY}/{program}"))
        .args(words)
        .current_dir(DIRECTORY)
        .stdin(Stdio::null())
        .output()
        .attempt(|| format!("starting {program}"))?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{text}");
    let verdict = match output.status.code() {
        Some(0) => "pass",
        Some(SKIPPED) => "skip",
        _ => "fail",
    };
    let lines: Vec<_> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join(" / ");
    Ok((verdict, format!("{}: {tail}", output.status)))
}
