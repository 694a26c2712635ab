// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a scenario gets to work with: facts to record, checks that end it, a directory of its own.

use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::place;
use crate::release::Release;
use crate::report::Report;
use crate::scenarios;
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How a scenario ends: every check held, or the first one that did not.
pub type Outcome = Result<(), Failure>;

/// One scenario under way.
pub struct Scenario<'a> {
    name: &'a str,
    report: &'a Report,
    directory: PathBuf,
    facts: Map<String, Value>,
    prefix: String,
}

impl Scenario<'_> {
    pub fn name(&self) -> &str {
        self.name
    }

    /// When it has the memory of converted pages freed, if it is one that is run with each choice.
    pub fn release(&self) -> Release {
        Release::named(self.name)
    }

    /// Shown while the scenario runs.
    pub fn progress(&self, text: impl AsRef<str>) {
        self.report.progress(self.name, text.as_ref());
    }

    /// Records something that was measured.
    pub fn fact(&mut self, name: &str, value: impl Into<Value>) {
        self.facts
            .insert(format!("{}{name}", self.prefix), value.into());
    }

    /// Names of the facts that follow get this in front; for a scenario that does one thing several times.
    pub fn prefix(&mut self, prefix: &str) {
        self.prefix = prefix.to_string();
    }

    /// Sockets and logs go here.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Ends the scenario unless `held`.
    pub fn check(&self, held: bool, rule: impl AsRef<str>) -> Outcome {
        match held {
            true => Ok(()),
            false => Err(Failure::new(format!(
                "{}does not hold: {}",
                self.prefix,
                rule.as_ref()
            ))),
        }
    }

    /// Ends the scenario unless both are the same, and says what they were.
    pub fn check_equal<T: PartialEq + std::fmt::Debug>(
        &self,
        got: T,
        expected: T,
        rule: impl AsRef<str>,
    ) -> Outcome {
        self.check(
            got == expected,
            format!("{} (got {got:?}, expected {expected:?})", rule.as_ref()),
        )
    }
}

/// Runs one scenario and reports how it went; an unknown name is a failed scenario, never silence.
pub fn run(name: &str, report: &Report, command_line: &CommandLine) {
    report.start(name);
    let begin = Instant::now();
    let mut scenario = Scenario {
        name,
        report,
        directory: place::work().join(name),
        facts: Map::new(),
        prefix: String::new(),
    };
    let outcome = fs::create_dir_all(&scenario.directory)
        .attempt(|| format!("creating {}", scenario.directory.display()))
        .and_then(|()| scenarios::find(name))
        .and_then(|body| body(&mut scenario, command_line));
    if outcome.is_err() || command_line.value("lab.logs") == Some("all") {
        show_logs(&scenario.directory);
    }
    let error = outcome
        .err()
        .map(|failure| format!("{failure}{}", last_complaint(&scenario.directory)));
    report.result(name, begin.elapsed(), &scenario.facts, error.as_deref());
}

/// How much of each log a failure shows on the console.
const TAIL_BYTES: usize = 4000;

/// Shows the ends of the scenario's logs on the console.
fn show_logs(directory: &Path) {
    for path in files_below(directory) {
        println!("---- {}\n{}", path.display(), tail(&path));
    }
}

/// The last thing that a QEMU of this scenario complained about.
fn last_complaint(directory: &Path) -> String {
    files_below(directory)
        .iter()
        .filter(|path| path.ends_with("qemu.stderr"))
        .filter_map(|path| tail(path).lines().last().map(String::from))
        .map(|line| format!(" (QEMU's last line: {line})"))
        .collect()
}

fn tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(TAIL_BYTES)..]).into_owned()
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    let (directories, mut files): (Vec<_>, Vec<_>) =
        paths.into_iter().partition(|path| path.is_dir());
    for below in directories {
        files.extend(files_below(&below));
    }
    files
}
