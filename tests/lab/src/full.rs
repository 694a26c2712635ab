// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab test --full`: the kernel's own selftests in L1 (is the lab sound?), QEMU's own tests with the series applied (did
//! the series break anything?), and each patch of the series built on its predecessors alone (can it be bisected?).

use crate::host::{self, Need, Probe};
use crate::in_l1::Program;
use crate::mode::Mode;
use crate::prepare::{Ground, Prepared};
use crate::process::{self, Logs};
use crate::qemu::Recipe;
use crate::sources::Source;
use crate::tally::{wanted, Tally, Verdict};
use crate::{cache::Cache, interrupt, kernel, patches, ui};
use anyhow::{ensure, Context, Result};
use serde::Deserialize;
use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Command lines of the kernel's KVM selftests, below tools/testing/selftests/kvm, and the modes of L1 in which they are to
/// pass. They don't know conversion in place: two set attributes of the VM, which has none then, and the first creates a file
/// with each flag that is offered, and HUGETLB alone says no page size.
const KVM_SELFTESTS: &[(&str, &[Mode])] = &[
    ("guest_memfd_test", WITHOUT_IN_PLACE),
    ("x86/private_mem_conversions_test", WITHOUT_IN_PLACE),
    (
        "x86/private_mem_conversions_test -m 2 -n 2",
        WITHOUT_IN_PLACE,
    ),
    ("x86/private_mem_kvm_exits_test", WITHOUT_IN_PLACE),
];
const WITHOUT_IN_PLACE: &[Mode] = &[Mode::Split, Mode::Unpatched];
const SELFTEST_NEEDS: &[Need] = &[(Probe::Header("uuid/uuid.h"), "uuid-dev")];
const WANTS_OWN_BIOS: &str = "/bios-tables-test";
/// The suites of QEMU's that run with our configuration, and nothing but x86-64.
const QEMU_SUITES: &[&str] = &["unit", "qtest-x86_64"];

/// What of all this the filter lets through.
pub struct Selection {
    selftests: Vec<(&'static str, Mode)>,
    patches: Vec<PathBuf>,
    filter: Option<String>,
}

impl Selection {
    pub fn new(ground: &Ground, filter: Option<&str>) -> Result<Selection> {
        let selftests = KVM_SELFTESTS
            .iter()
            .flat_map(|(command, modes)| modes.iter().map(|&mode| (*command, mode)))
            .filter(|(command, mode)| wanted(filter, &selftest_name(command, *mode)))
            .collect();
        let patches = patches::series(&ground.tree.series())?
            .into_iter()
            .filter(|patch| wanted(filter, &patch_name(patch)))
            .collect();
        Ok(Selection {
            selftests,
            patches,
            filter: filter.map(str::to_string),
        })
    }

    /// What runs on this machine rather than in L1.
    pub fn run(&self, ground: &Ground, prepared: &Prepared, tally: &mut Tally) -> Result<()> {
        let _cache = ground.cache.lock()?;
        let recipe = Recipe::new(
            &ground.cache,
            &ground.logs,
            &ground.tree,
            &prepared.qemu_source,
        )?;
        self.build_each_patch(&recipe, tally)?;
        self.run_qemu_tests(&recipe, &prepared.firmware.share, tally)
    }

    /// The kernel's selftests as programs for L1, or one failure for each when they don't build.
    pub fn selftests(
        &self,
        ground: &Ground,
        prepared: &Prepared,
        tally: &mut Tally,
    ) -> Result<Vec<Program>> {
        if self.selftests.is_empty() {
            return Ok(Vec::new());
        }
        let built = host::install(&ground.logs, SELFTEST_NEEDS)
            .and_then(|()| build_selftests(&ground.cache, &ground.logs, &prepared.kernel_source));
        match built {
            Ok(folder) => Ok(self
                .selftests
                .iter()
                .map(|(command, mode)| Program {
                    name: selftest_name(command, *mode),
                    file: folder.join(program(command)),
                    command: command.to_string(),
                    mode: *mode,
                })
                .collect()),
            Err(error) => {
                interrupt::check()?;
                for (command, mode) in &self.selftests {
                    let reason = format!("the selftests did not build: {error:#}");
                    tally.add(&selftest_name(command, *mode), &Verdict::Failed(reason));
                }
                Ok(Vec::new())
            }
        }
    }

    fn build_each_patch(&self, recipe: &Recipe, tally: &mut Tally) -> Result<()> {
        let series = recipe.series();
        for (index, patch) in series.iter().enumerate() {
            if !self.patches.contains(patch) {
                continue;
            }
            let name = patch_name(patch);
            let step = ui::step("series", &name);
            let built = recipe.compile(&series[..=index], &["qemu-system-x86_64"], &step);
            interrupt::check()?;
            let verdict = match built {
                Ok(_) => Verdict::Passed,
                Err(error) => Verdict::Failed(format!("{error:#}")),
            };
            step.done(&name);
            tally.add(&name, &verdict);
        }
        Ok(())
    }

    fn run_qemu_tests(&self, recipe: &Recipe, firmware: &Path, tally: &mut Tally) -> Result<()> {
        let step = ui::step("qemu tests", "building");
        let objects = match recipe.compile(recipe.series(), &[], &step) {
            Ok(objects) => objects,
            Err(error) => {
                interrupt::check()?;
                tally.add("qemu tests", &Verdict::Failed(format!("{error:#}")));
                return Ok(());
            }
        };
        provide_firmware(firmware, &objects)?;
        let suites: Vec<String> = QEMU_SUITES
            .iter()
            .flat_map(|suite| ["--suite".to_string(), suite.to_string()])
            .collect();
        let mut list = Command::new(recipe.meson());
        list.args(["test", "--list", "--no-rebuild", "-C"])
            .arg(&objects)
            .args(&suites);
        recipe.prepare_command(&mut list);
        let mut chosen = listed(&process::output(&mut list)?);
        ensure!(!chosen.is_empty(), "meson lists none of QEMU's tests");
        chosen.retain(|name| wanted(self.filter.as_deref(), &qemu_name(name)));
        if !recipe.source.tree.join("pc-bios/bios-256k.bin").is_file() {
            for name in chosen.extract_if(.., |name| name.ends_with(WANTS_OWN_BIOS)) {
                let reason = "it expects an address that QEMU's own SeaBIOS image chooses, and these sources have no such \
                              image; give complete ones with --qemu-src to run it";
                tally.add(&qemu_name(&name), &Verdict::Skipped(reason.into()));
            }
        }
        if chosen.is_empty() {
            return Ok(());
        }
        let mut command = Command::new(recipe.meson());
        command
            .args(["test", "--no-rebuild", "--print-errorlogs", "-C"])
            .arg(&objects)
            .arg(format!("--num-processes={}", host::jobs()))
            .args(["--timeout-multiplier", "5"])
            .args(&suites)
            .args(&chosen);
        recipe.prepare_command(&mut command);
        hide_kvm(&mut command, &recipe.cache.work("empty"))?;
        let results = objects.join("meson-logs/testlog.json");
        let _ = std::fs::remove_file(&results);
        // Its status says only that something failed; the list says what.
        recipe
            .logs
            .run_status("qemu-tests", &mut command, |line| step.update(line.trim()))?;
        let text = std::fs::read_to_string(&results)
            .with_context(|| format!("QEMU's tests left no {}", results.display()))?;
        let tests = meson_results(&text);
        ensure!(!tests.is_empty(), "meson ran none of QEMU's tests");
        step.done(&format!("{} of QEMU's tests", tests.len()));
        tally.add_all(&tests);
        Ok(())
    }
}

fn selftest_name(command: &str, mode: Mode) -> String {
    format!("kernel selftest {}", mode.name(command))
}

fn patch_name(patch: &Path) -> String {
    format!("patch builds {}", patches::patch_stem(patch))
}

fn qemu_name(name: &str) -> String {
    format!("qemu {name}")
}

fn program(command: &str) -> &str {
    command.split(' ').next().unwrap_or(command)
}

/// Builds the few programs that are asked for, out of the source tree.
fn build_selftests(cache: &Cache, logs: &Logs, source: &Source) -> Result<PathBuf> {
    let headers = kernel::headers(cache, logs, source)?;
    let step = ui::step("selftests", "building");
    let folder = cache.work("selftests");
    let stamp = folder.join("source-key");
    if !std::fs::read_to_string(&stamp).is_ok_and(|key| key == source.key) {
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(&stamp, &source.key)?;
    }
    let mut command = Command::new("make");
    command
        .arg("-C")
        .arg(source.tree.join("tools/testing/selftests/kvm"))
        .arg(format!("-j{}", host::jobs()))
        .arg("ARCH=x86")
        .arg(format!("OUTPUT={}", folder.display()))
        .arg(format!(
            "KHDR_INCLUDES=-isystem {}",
            headers.join("include").display()
        ));
    let mut names: Vec<&str> = KVM_SELFTESTS
        .iter()
        .map(|(command, _)| program(command))
        .collect();
    names.dedup();
    command.args(names.iter().map(|name| folder.join(name)));
    logs.run("selftests-build", &mut command)?;
    step.done("kernel selftests built");
    Ok(folder)
}

/// A build tree looks for firmware among what it would install, and ours installs none.
fn provide_firmware(firmware: &Path, objects: &Path) -> Result<()> {
    let place = objects.join("qemu-bundle/usr/local/share/qemu");
    std::fs::create_dir_all(&place)?;
    for entry in std::fs::read_dir(firmware)? {
        let entry = entry?;
        let to = place.join(entry.file_name());
        if !to.exists() {
            std::fs::copy(entry.path(), &to)?;
        }
    }
    Ok(())
}

/// Lets a command find no usable /dev/kvm. QEMU's tests compare ACPI tables and race migrations against the clock on whatever
/// KVM there is, and one without SMM, or in software, makes them fail or hang; without KVM they take TCG everywhere.
fn hide_kvm(command: &mut Command, empty: &Path) -> Result<()> {
    if !Path::new("/dev/kvm").exists() {
        return Ok(());
    }
    if !host::is_root() {
        ui::note("QEMU's tests will use this machine's /dev/kvm: only root can hide it from them");
        return Ok(());
    }
    std::fs::write(empty, "")?;
    let empty = CString::new(empty.as_os_str().as_bytes())?;
    // SAFETY: between fork and exec only system calls, on strings that were made before. The mounts are in a namespace of the
    // child's own.
    unsafe {
        command.pre_exec(move || {
            let mount = |source: &CStr, target: &CStr, flags| {
                let none = std::ptr::null();
                match libc::mount(source.as_ptr(), target.as_ptr(), none, flags, none.cast()) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            };
            if libc::unshare(libc::CLONE_NEWNS) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE)?;
            mount(&empty, c"/dev/kvm", libc::MS_BIND)?;
            // Root may write to any file but one on a read-only mount, and devices are exempt from that.
            let read_only = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY;
            mount(c"none", c"/dev/kvm", read_only)
        });
    }
    Ok(())
}

/// Names in meson's list: `unit - qemu:test-x`. What is behind the colon selects a test.
fn listed(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| line.contains("qemu:"))
        .map(|line| short_name(line).to_string())
        .collect()
}

/// Without suite and project, however meson joins them.
fn short_name(name: &str) -> &str {
    let name = name.rsplit(" / ").next().unwrap_or(name);
    name.rsplit("qemu:").next().unwrap_or(name).trim()
}

/// testlog.json: an object per line.
fn meson_results(text: &str) -> Vec<(String, Verdict)> {
    #[derive(Deserialize)]
    struct Test {
        name: String,
        result: String,
        #[serde(default)]
        stdout: Option<String>,
        #[serde(default)]
        stderr: Option<String>,
    }
    text.lines()
        .filter_map(|line| serde_json::from_str::<Test>(line).ok())
        .map(|test| {
            let output = [test.stdout, test.stderr]
                .into_iter()
                .flatten()
                .collect::<String>();
            let verdict = match test.result.as_str() {
                "OK" | "EXPECTEDFAIL" => Verdict::Passed,
                "SKIP" => Verdict::Skipped(skip_reason(&output)),
                other => Verdict::Failed(format!("{other}\n{}", last_lines(&output, 12))),
            };
            (qemu_name(short_name(&test.name)), verdict)
        })
        .collect()
}

/// TAP gives one behind `# SKIP`.
fn skip_reason(output: &str) -> String {
    output
        .lines()
        .find_map(|line| line.split_once("# SKIP"))
        .map(|(_, reason)| reason.trim().to_string())
        .filter(|reason| !reason.is_empty())
        .unwrap_or_else(|| {
            "it ran no test and gave no reason: what it needs is not in this configuration or on this machine".to_string()
        })
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mesons_results_are_read() {
        let text = "\
{\"name\": \"unit - qemu:test-a\", \"stdout\": \"ok 1\", \"result\": \"OK\"}
{\"name\": \"qemu:qtest+qtest-x86_64 / qtest-x86_64/b-test\", \"stdout\": \"1..0 # SKIP no kvm\", \"result\": \"SKIP\"}
{\"name\": \"qemu:unit / test-c\", \"stdout\": \"x\\ny\", \"stderr\": \"z\", \"result\": \"FAIL\"}
";
        assert_eq!(
            meson_results(text),
            [
                ("qemu test-a".to_string(), Verdict::Passed),
                (
                    "qemu qtest-x86_64/b-test".to_string(),
                    Verdict::Skipped("no kvm".into())
                ),
                (
                    "qemu test-c".to_string(),
                    Verdict::Failed("FAIL\nx\nyz".into())
                ),
            ]
        );
    }

    #[test]
    fn names_are_taken_from_the_list() {
        assert_eq!(
            listed("unit - qemu:test-a\nqtest+qtest-x86_64 - qemu:qtest-x86_64/b\nnoise\n"),
            ["test-a", "qtest-x86_64/b"]
        );
    }
}
