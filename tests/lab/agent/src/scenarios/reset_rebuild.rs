// SPDX-License-Identifier: MIT OR Apache-2.0
//! A confidential guest whose VM is thrown away and made anew at each reset: no mapping, attribute or byte of the old one
//! is left, in the kernel, in QEMU or where the device looks.

use crate::boot::CommandLine;
use crate::confidential::{find_secret, Confidential};
use crate::dma::Engine;
use crate::failure::{Attempt, Failure};
use crate::host::memory::guest_memfds;
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::PAGE;
use crate::machine::Surroundings;
use crate::monitor::protocol::pattern;
use crate::qmp::Gmem;
use crate::rebuilt::{self, MIB, ORIGIN, PRIVATE};
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;

const RAM_BYTES: u64 = 128 * MIB;
/// What is shared with the host before the reset, and what is private.
const SHARED: u64 = 24 * MIB;
const SHARED_BYTES: u64 = 4 * MIB;
const PRIVATE_BYTES: u64 = 16 * MIB;
const ELSEWHERE: u64 = 60 * MIB;
const FLIPPED: u64 = 64 * MIB;
const SHARED_SEED: u64 = 31;
const PRIVATE_SEED: u64 = 32;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    let mut guest = rebuilt::with_device(
        scenario.directory(),
        RAM_BYTES,
        &device,
        &[],
        Surroundings::default(),
    )?;
    for by in ["QMP", "guest", "QMP, in the middle of conversions"] {
        scenario.prefix(&format!("reset by {by}: "));
        once(scenario, &mut guest, by)?;
    }
    scenario.prefix("");
    guest.finish(scenario)
}

/// Inodes of the guest_memfds that QEMU holds.
fn files(guest: &Confidential) -> Result<BTreeSet<u64>, Failure> {
    let inode = |path: &std::path::PathBuf| {
        let data = fs::metadata(path).attempt(|| format!("stat of {}", path.display()))?;
        Ok(data.ino())
    };
    let paths = guest_memfds(guest.machine.pid())?;
    paths.iter().map(inode).collect()
}

/// VMs that the kernel knows, by their directories in debugfs: a file that is held keeps its VM.
pub(super) fn virtual_machines() -> Result<usize, Failure> {
    let entries = fs::read_dir("/sys/kernel/debug/kvm").attempt(|| "looking for VMs".into())?;
    Ok(entries
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .count())
}

fn number(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number(name)
}

fn once(scenario: &mut Scenario, guest: &mut Confidential, by: &str) -> Outcome {
    let engine = Engine::new(0, ORIGIN);
    let all_mapped = number(guest, "dma-mapped")?;
    guest.fill(SHARED, SHARED_BYTES, SHARED_SEED)?;
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES, true)?;
    guest.fill(PRIVATE, PRIVATE_BYTES, PRIVATE_SEED)?;
    guest.agree(scenario, "before the reset")?;
    engine.is_kept_from(scenario, guest, PRIVATE + PAGE, ELSEWHERE)?;
    let before = files(guest)?;

    match by {
        "guest" => {
            guest.monitor.ask("reset")?;
        }
        "QMP" => {
            guest.machine.qmp.execute("system_reset", json!({}))?;
        }
        _ => {
            // Nobody waits for its answer: the guest forgets that it was asked.
            guest
                .monitor
                .begin_flip(100_000, FLIPPED, PAGE, 2 * PAGE, 256)?;
            let converted = number(guest, "to-private")?;
            while number(guest, "to-private")? < converted + 16 {}
            guest.machine.qmp.execute("system_reset", json!({}))?;
        }
    }
    rebuilt::started_anew(guest)?;

    let after = files(guest)?;
    scenario.fact("guest_memfds", after.len());
    scenario.check(
        !after.is_empty() && before.is_disjoint(&after),
        format!("each guest_memfd is a new one: {before:?} before, {after:?} after"),
    )?;
    let machines = virtual_machines()?;
    scenario.fact("VMs that the kernel knows", machines);
    // Besides the present one there is the very first, without memory: vfio refers to the VM that there was when the
    // device was opened until that is closed. Each further reset must get rid of the one before.
    scenario.check_equal(machines, 2, "VMs that the kernel knows")?;
    scenario.check_equal(
        guest.private_allocated()?,
        guest.guest_memfd_bytes()?,
        "bytes in guest_memfds after the reset",
    )?;
    guest.agree(scenario, "after the reset")?;
    nothing_left(scenario, guest)?;

    let mapped = number(guest, "dma-mapped")?;
    scenario.fact("dma_mapped_bytes", mapped);
    scenario.check_equal(mapped, all_mapped, "bytes mapped for the device")?;
    scenario.check_equal(number(guest, "quarantined")?, 0, "quarantined bytes")?;

    // What the device reads is of the new VM, and what it writes arrives there.
    for old in [SHARED + PAGE, PRIVATE + PAGE] {
        guest.monitor.edu_load(old)?;
        guest.monitor.edu_store(ELSEWHERE)?;
        let seen = guest.monitor.zeros(ELSEWHERE, PAGE)?;
        scenario.check_equal(
            seen,
            None,
            format!("the device reads zeros from {old:#x}, where the old VM had bytes"),
        )?;
    }
    guest.fill(SHARED, SHARED_BYTES, SHARED_SEED + 100)?;
    guest.monitor.edu_load(SHARED + PAGE)?;
    guest.monitor.edu_store(ELSEWHERE)?;
    let difference = guest
        .monitor
        .check_copy(ELSEWHERE, PAGE, SHARED_SEED + 100, SHARED + PAGE)?;
    scenario.check_equal(difference, None, "the device reads what the guest wrote")?;
    engine.reaches(scenario, guest, PRIVATE + 3 * PAGE)?;
    guest.agree(scenario, "after DMA")
}

/// Neither guest nor host finds a byte of before.
fn nothing_left(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    for (gpa, bytes) in [(SHARED, SHARED_BYTES), (PRIVATE, PRIVATE_BYTES)] {
        guest.expect_zeros(scenario, gpa, bytes)?;
    }
    let words = |start: u64, bytes: u64, seed: u64| {
        let pages = (start..start + bytes).step_by(PAGE as usize);
        pages.map(move |page| pattern(seed, page))
    };
    let old: HashSet<u64> = words(SHARED, SHARED_BYTES, SHARED_SEED)
        .chain(words(PRIVATE, PRIVATE_BYTES, PRIVATE_SEED))
        .collect();
    for extent in guest.shared[0].extents()? {
        let found = find_secret(&guest.shared[0], &extent, &old)?;
        scenario.check_equal(found, None, "offset in the new file with bytes of before")?;
    }
    Ok(())
}
