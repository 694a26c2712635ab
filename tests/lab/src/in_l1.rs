// SPDX-License-Identifier: MIT OR Apache-2.0
//! Test programs that run in L1, where KVM has everything: the library's native tests and the kernel's selftests.
//!
//! The agent's scenario `kernel-selftests` runs a list of command lines and reports each as a fact.

use crate::cache::Cache;
use crate::images::Extra;
use crate::process::Logs;
use crate::report::Outcome;
use crate::tally::Verdict;
use crate::{suite, tree::Tree, ui};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

/// A command line for L1 and the name that it is counted under.
pub struct Program {
    pub name: String,
    pub file: PathBuf,
    /// The program's name below the folder for programs, and its arguments.
    pub command: String,
}

const NATIVE: &str = "native_kvm";

/// How the library's tests of a real KVM are counted when they run in L1.
pub fn native_name() -> String {
    format!("in L1 {NATIVE}")
}

/// Builds the library's native tests so that they need nothing of L1's.
pub fn native(cache: &Cache, logs: &Logs, tree: &Tree) -> Result<Program> {
    let step = ui::step(NATIVE, "building");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    command
        .current_dir(tree.root())
        .env("CARGO_TARGET_DIR", cache.work("native"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["test", "--no-run", "--message-format=json"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(["--package", "gmem", "--test", NATIVE]);
    let mut file = None;
    logs.run_lines("native-build", &mut command, |line| {
        if let Some(path) = executable(line) {
            file = Some(path);
        }
    })?;
    step.done("native tests for L1 built");
    Ok(Program {
        name: native_name(),
        file: file.context("cargo built no native tests")?,
        command: format!("{NATIVE} --test-threads=1"),
    })
}

/// The test program in cargo's messages.
fn executable(line: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(line).ok()?;
    if message["target"]["name"] != NATIVE {
        return None;
    }
    message["executable"].as_str().map(PathBuf::from)
}

/// What L1's archive needs for them.
pub fn extra(programs: &[Program]) -> Extra {
    let mut files: Vec<(String, PathBuf)> = Vec::new();
    let mut list = String::new();
    for program in programs {
        let name = program.command.split(' ').next().unwrap_or_default();
        let place = format!("lab/tests/selftests/{name}");
        if !files.iter().any(|(known, _)| *known == place) {
            files.push((place, program.file.clone()));
        }
        list.push_str(&program.command);
        list.push('\n');
    }
    Extra {
        files,
        texts: vec![("lab/tests/selftests.list".to_string(), list)],
    }
}

/// One verdict for each program, from the one outcome of the scenario that ran them.
pub fn verdicts(programs: &[Program], outcome: &Outcome) -> Vec<(String, Verdict)> {
    programs
        .iter()
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
        }
    }

    #[test]
    fn a_program_is_packed_once_and_listed_each_time() {
        let extra = extra(&[program("a"), program("x86/b"), program("x86/b -m 2")]);
        let places: Vec<&str> = extra
            .files
            .iter()
            .map(|(place, _)| place.as_str())
            .collect();
        assert_eq!(
            places,
            ["lab/tests/selftests/a", "lab/tests/selftests/x86/b"]
        );
        assert_eq!(extra.texts[0].1, "a\nx86/b\nx86/b -m 2\n");
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
        let failed = verdicts(&programs, &outcome(false));
        assert_eq!(failed[0].1, Verdict::Passed);
        assert!(matches!(failed[1].1, Verdict::Skipped(_)));
        assert!(matches!(&failed[2].1, Verdict::Failed(why) if why.contains("boom")));
        assert!(matches!(failed[3].1, Verdict::Failed(_)));
        let quiet = verdicts(&[program("d")], &outcome(true));
        assert!(matches!(quiet[0].1, Verdict::Failed(_)));
    }

    #[test]
    fn cargos_messages_name_the_program() {
        let line = r#"{"reason":"compiler-artifact","target":{"name":"native_kvm"},"executable":"/t/native_kvm-1"}"#;
        assert_eq!(executable(line), Some(PathBuf::from("/t/native_kvm-1")));
        let other = r#"{"reason":"compiler-artifact","target":{"name":"gmem"},"executable":null}"#;
        assert_eq!(executable(other), None);
        assert_eq!(executable("   Compiling gmem"), None);
    }
}
