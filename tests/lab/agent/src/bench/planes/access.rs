// SPDX-License-Identifier: MIT OR Apache-2.0
//! How fast a guest reaches private memory that is mapped by 4 KiB and by 2 MiB.

use super::readings::{Kind, Readings};
use super::yardstick::Yardsticks;
use super::{columns, pool, start_all, timed, touch, Column, MIB};
use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::passthrough::{all_to_vfio, EDU};
use crate::scenario::{Outcome, Scenario};
use std::fs;
use std::path::PathBuf;

const CASE: &str = "inplace-access";
const RAM_BYTES: u64 = 512 * MIB;
const BASE: u64 = 64 * MIB;
const BYTES: u64 = 320 * MIB;
const PIECES: u64 = 5;
const RUNS: u64 = 7;
const READS: u64 = 400_000;
const SCANNED: u64 = 64 * MIB;
const KVM_DEBUG: &str = "/sys/kernel/debug/kvm";

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let (mut columns, mut missing) =
        columns(&[Column::Split, Column::InPlace, Column::InPlaceHuge])?;
    let devices = all_to_vfio(&EDU)?;
    let _pool = pool(&mut columns, RAM_BYTES, &mut missing);
    let mut yardsticks = Yardsticks::new()?;
    let mut readings = Readings::default();
    let mut guests = start_all(scenario, &columns, RAM_BYTES, &devices, &mut missing)?;
    yardsticks.take(guests.first_mut().map(|(_, guest)| guest))?;
    let piece = BYTES / PIECES;
    for index in 0..PIECES {
        for (column, guest) in &mut guests {
            let took = touch(guest, BASE + index * piece, piece)?;
            let per_page = took / (piece / super::PAGE) as f64;
            readings.add(CASE, "first write to a page", *column, Kind::Time, per_page);
        }
    }
    for (column, guest) in &guests {
        for (name, measure) in [
            ("pages_4k", "KVM's mappings of 4 KiB"),
            ("pages_2m", "KVM's mappings of 2 MiB"),
        ] {
            let count = mappings(guest.machine.pid(), name)?;
            readings.add(CASE, measure, *column, Kind::Count, count as f64);
        }
    }
    for run in 0..RUNS {
        for (column, guest) in &mut guests {
            let seed = run + 1;
            let walk = format!("bench-walk {BASE:#x} {BYTES:#x} {READS} {seed}");
            let value = timed(guest, &walk)? / READS as f64;
            readings.add(CASE, "a read at random", *column, Kind::Time, value);
            let scan = format!("bench-scan {BASE:#x} {SCANNED:#x}");
            let value = timed(guest, &scan)? / (SCANNED / 64) as f64;
            readings.add(CASE, "a read in order", *column, Kind::Time, value);
        }
        scenario.progress(format!("run {} of {RUNS}", run + 1));
    }
    yardsticks.take(guests.first_mut().map(|(_, guest)| guest))?;
    readings.tell(scenario, Some(&yardsticks), &missing);
    Ok(())
}

/// One of KVM's page statistics of the VM that a process has.
fn mappings(pid: u32, name: &str) -> Result<u64, Failure> {
    let folder = folder(pid)?.join(name);
    fs::read_to_string(&folder)
        .attempt(|| format!("reading {}", folder.display()))?
        .trim()
        .parse()
        .attempt(|| format!("{} holds no number", folder.display()))
}

fn folder(pid: u32) -> Result<PathBuf, Failure> {
    let prefix = format!("{pid}-");
    fs::read_dir(KVM_DEBUG)
        .attempt(|| format!("reading {KVM_DEBUG}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(&prefix))
        })
        .attempt(|| format!("KVM has no statistics of process {pid}"))
}
