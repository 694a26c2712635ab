// SPDX-License-Identifier: MIT OR Apache-2.0
//! The files that a process holds, and which of them a program that it executes would hold as well.

use crate::failure::{Attempt, Failure};
use crate::machine::Machine;
use crate::scenario::Scenario;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::RawFd;
use std::thread;
use std::time::{Duration, Instant};

const SETTLING_PATIENCE: Duration = Duration::from_secs(20);

/// What guest memory and its VM are reached by.
const OF_GUESTS: [&str; 4] = ["kvm", "/memfd:", "/dev/iommu", "/dev/vfio"];

/// One open file.
#[derive(Debug)]
pub struct Open {
    pub number: RawFd,
    pub name: String,
    /// A program that the process executes does not get it.
    pub close_on_exec: bool,
}

impl Open {
    /// Whether it is guest memory, a VM, or shows one to devices.
    pub fn is_of_guests(&self) -> bool {
        OF_GUESTS.iter().any(|part| self.name.contains(part))
    }
}

/// A program that the process executes would get nothing of guests but what the process was given itself. Returns how many of
/// such files it holds.
pub fn are_kept(
    scenario: &Scenario,
    pid: u32,
    given: &[RawFd],
    step: &str,
) -> Result<usize, Failure> {
    let files = of(pid)?
        .into_iter()
        .filter(|file| file.is_of_guests() && !given.contains(&file.number));
    let (kept, inherited): (Vec<_>, Vec<_>) = files.partition(|file| file.close_on_exec);
    scenario.check(
        inherited.is_empty() && !kept.is_empty(),
        format!("{step}: guest memory and VMs are close-on-exec: {inherited:?} are not"),
    )?;
    Ok(kept.len())
}

/// A command that QEMU refuses every time leaves no file of its own open, and none of QEMU's closed; what was said.
pub fn refused_for_good(
    scenario: &Scenario,
    machine: &mut Machine,
    command: &str,
    arguments: &Value,
) -> Result<String, Failure> {
    const TIMES: usize = 20;
    let mut said = machine.qmp.refusal(command, arguments.clone())?;
    let before = kinds(machine.pid())?;
    for _ in 0..TIMES {
        said = machine.qmp.refusal(command, arguments.clone())?;
    }
    // A back end's connection may be on its way up again.
    let deadline = Instant::now() + SETTLING_PATIENCE;
    while kinds(machine.pid())? != before && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    scenario.check_equal(
        kinds(machine.pid())?,
        before,
        format!("QEMU's files after {command} was refused {TIMES} times: {said}"),
    )?;
    Ok(said)
}

/// How many files of each kind a process holds.
fn kinds(pid: u32) -> Result<BTreeMap<String, usize>, Failure> {
    let mut all = BTreeMap::new();
    for file in of(pid)? {
        let kind = file.name.split(":[").next().unwrap_or_default();
        *all.entry(kind.to_string()).or_default() += 1;
    }
    Ok(all)
}

/// All files that a process holds. What closes meanwhile is left out.
pub fn of(pid: u32) -> Result<Vec<Open>, Failure> {
    let directory = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&directory).attempt(|| format!("reading {directory}"))?;
    Ok(entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let number = path.file_name()?.to_str()?;
            let name = fs::read_link(&path).ok()?.to_string_lossy().into_owned();
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
            Some(Open {
                number: number.parse().ok()?,
                name,
                close_on_exec: closes(&info)?,
            })
        })
        .collect())
}

/// In the text of /proc/PID/fdinfo/N: open(2)'s flags, in octal.
fn closes(info: &str) -> Option<bool> {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    let flags = i32::from_str_radix(flags.trim(), 8).ok()?;
    Some(flags & libc::O_CLOEXEC != 0)
}

#[cfg(test)]
mod tests {
    use super::{closes, Open};

    #[test]
    fn flags_are_octal() {
        assert_eq!(closes("pos:\t0\nflags:\t02100002\n"), Some(true));
        assert_eq!(
            closes("pos:\t0\nflags:\t0100002\nmnt_id:\t9\n"),
            Some(false)
        );
        assert_eq!(closes("pos:\t0\n"), None);
    }

    #[test]
    fn a_guests_files_are_told_by_name() {
        let is_of_guests = |name: &str| {
            let name = name.to_string();
            let close_on_exec = true;
            Open {
                number: 3,
                name,
                close_on_exec,
            }
            .is_of_guests()
        };
        for name in [
            "anon_inode:[kvm-gmem]",
            "anon_inode:kvm-vm",
            "/memfd:gmem-ram0 (deleted)",
            "/dev/iommu",
        ] {
            assert!(is_of_guests(name), "{name}");
        }
        assert!(!is_of_guests("socket:[17]"));
    }
}
