// SPDX-License-Identifier: MIT OR Apache-2.0
//! Test programs that run in L1, where KVM has everything: the library's native tests and the kernel's selftests.
//!
//! The agent's scenario `kernel-selftests` runs a list of command lines and reports each as a fact.

use crate::cache::Cache;
use crate::images::Extra;
use crate::mode::Mode;
use crate::process::Logs;
use crate::report::Outcome;
use crate::tally::Verdict;
use crate::{suite, tree::Tree, ui};
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

/// A command line for L1 and the name that it is counted under.
#[derive(Clone)]
pub struct Program {
    pub name: String,
    pub file: PathBuf,
    /// The program's name below the folder for programs, and its arguments.
    pub command: String,
    /// The mode of L1 that it runs in.
    pub mode: Mode,
}

/// Test targets of the package `gmem` that ask a real kernel, and the modes in which L1's has what they ask for.
const NATIVE: &[(&str, &[Mode])] = &[
    (
        "native_kvm",
        &[
            Mode::Split,
            Mode::InPlace,
            Mode::NoDirectMap,
            Mode::Foreign,
            Mode::Unpatched,
        ],
    ),
    (
        "kernel_in_place",
        &[
            Mode::Split,
            Mode::InPlace,
            Mode::NoDirectMap,
            Mode::Foreign,
            Mode::Unpatched,
        ],
    ),
    ("kernel_tee", &[Mode::Split, Mode::InPlace]),
    // The last: memory errors lose huge pages of the machine for good.
    ("kernel_huge", &[Mode::InPlace]),
];

/// One of those in one mode.
#[derive(Clone, Copy)]
pub struct Native {
    target: &'static str,
    pub mode: Mode,
}

impl Native {
    pub fn all() -> Vec<Native> {
        NATIVE
            .iter()
            .flat_map(|(target, modes)| modes.iter().map(|&mode| Native { target, mode }))
            .collect()
    }

    /// How it is counted.
    pub fn name(&self) -> String {
        format!("in L1 {}", self.mode.name(self.target))
    }
}

/// Builds these tests so that they need nothing of L1's. With `full`, those that take long run as well.
pub fn native(
    cache: &Cache,
    logs: &Logs,
    tree: &Tree,
    wanted: &[Native],
    full: bool,
) -> Result<Vec<Program>> {
    let step = ui::step("native tests", "building");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command
        .current_dir(tree.root())
        .env("CARGO_TARGET_DIR", cache.work("native"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["test", "--no-run", "--message-format=json"])
        .args(["--target", "x86_64-unknown-linux-gnu", "--package", "gmem"]);
    let targets: BTreeSet<&str> = wanted.iter().map(|native| native.target).collect();
    command.args(targets.iter().flat_map(|target| ["--test", target]));
    let mut files = BTreeMap::new();
    logs.run_lines("native-build", &mut command, |line| {
        files.extend(executable(line));
    })?;
    step.done("native tests for L1 built");
    let and_long_ones = if full { " --include-ignored" } else { "" };
    wanted
        .iter()
        .map(|native| {
            let file = files.get(native.target);
            Ok(Program {
                name: native.name(),
                file: file
                    .with_context(|| format!("cargo built no {}", native.target))?
                    .clone(),
                command: format!("{} --test-threads=1{and_long_ones}", native.target),
                mode: native.mode,
            })
        })
        .collect()
}

/// A test target and its program, in cargo's messages.
fn executable(line: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let name = message["target"]["name"].as_str()?;
    let file = message["executable"].as_str()?;
    Some((name.to_string(), PathBuf::from(file)))
}

/// What L1's archive needs for them. The agent takes the list of the mode that it finds itself in.
pub fn extra(programs: &[Program]) -> Extra {
    let mut files: Vec<(String, PathBuf)> = Vec::new();
    let mut lists: BTreeMap<&str, String> = BTreeMap::new();
    for program in programs {
        let name = program.command.split(' ').next().unwrap_or_default();
        let place = format!("lab/tests/selftests/{name}");
        if !files.iter().any(|(known, _)| *known == place) {
            files.push((place, program.file.clone()));
        }
        let list = match program.mode {
            Mode::InPlace => "in-place",
            Mode::NoDirectMap => "no-direct-map",
            Mode::Foreign => "foreign",
            Mode::Split | Mode::Unpatched => "split",
        };
        let list = lists.entry(list).or_default();
        list.push_str(&program.command);
        list.push('\n');
    }
    Extra {
        files,
        folder: None,
        texts: lists
            .into_iter()
            .map(|(list, text)| (format!("lab/tests/{list}.list"), text))
            .collect(),
    }
}

/// One verdict for each program of a mode, from the one outcome of the scenario that ran them.
pub fn verdicts(programs: &[Program], mode: Mode, outcome: &Outcome) -> Vec<(String, Verdict)> {
    programs
        .iter()
        .filter(|program| program.mode == mode)
        .map(|program| {
            let told = outcome.facts.get(&program.command).and_then(Value::as_str);
            let verdict = match told {
                Some("pass") => Verdict::Passed,
                Some("skip") => Verdict::Skipped("it says that L1 can't run it".into()),
                Some(_) => Verdict::Failed(outcome.error.clone().unwrap_or_default()),
                // The scenario ended before this one, for which it has a reason; silence would be a failure too.
                None => match suite::verdict(outcome) {
                    Verdict::Passed => Verdict::Failed("L1 did not report it".into()),
                    other => other,
                },
            };
            (program.name.clone(), verdict)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn program(command: &str) -> Program {
        Program {
            name: command.into(),
            file: PathBuf::from("/x"),
            command: command.into(),
            mode: Mode::Split,
        }
    }

    #[test]
    fn a_program_is_packed_once_and_listed_each_time() {
        let other = Program {
            mode: Mode::InPlace,
            ..program("a")
        };
        let extra = extra(&[program("a"), other, program("x86/b"), program("x86/b -m 2")]);
        let places: Vec<&str> = extra
            .files
            .iter()
            .map(|(place, _)| place.as_str())
            .collect();
        assert_eq!(
            places,
            ["lab/tests/selftests/a", "lab/tests/selftests/x86/b"]
        );
        let text = |text: &str| text.to_string();
        assert_eq!(
            extra.texts,
            [
                (text("lab/tests/in-place.list"), text("a\n")),
                (text("lab/tests/split.list"), text("a\nx86/b\nx86/b -m 2\n")),
            ]
        );
    }

    #[test]
    fn silence_about_a_program_is_a_failure() {
        let outcome = |ok: bool| Outcome {
            name: "kernel-selftests".into(),
            ok,
            seconds: 1.0,
            facts: json!({"a": "pass", "b": "skip", "c": "fail"})
                .as_object()
                .unwrap()
                .clone(),
            error: (!ok).then(|| "c: boom".to_string()),
            console: None,
        };
        let programs = [program("a"), program("b"), program("c"), program("d")];
        let failed = verdicts(&programs, Mode::Split, &outcome(false));
        assert_eq!(failed[0].1, Verdict::Passed);
        assert!(matches!(failed[1].1, Verdict::Skipped(_)));
        assert!(matches!(&failed[2].1, Verdict::Failed(why) if why.contains("boom")));
        assert!(matches!(failed[3].1, Verdict::Failed(_)));
        let quiet = verdicts(&[program("d")], Mode::Split, &outcome(true));
        assert!(matches!(quiet[0].1, Verdict::Failed(_)));
        assert!(verdicts(&programs, Mode::InPlace, &outcome(true)).is_empty());
    }

    #[test]
    fn cargos_messages_name_the_program() {
        let line = r#"{"reason":"compiler-artifact","target":{"name":"native_kvm"},"executable":"/t/native_kvm-1"}"#;
        let found = ("native_kvm".to_string(), PathBuf::from("/t/native_kvm-1"));
        assert_eq!(executable(line), Some(found));
        let other = r#"{"reason":"compiler-artifact","target":{"name":"gmem"},"executable":null}"#;
        assert_eq!(executable(other), None);
        assert_eq!(executable("   Compiling gmem"), None);
    }
}
