// SPDX-License-Identifier: MIT OR Apache-2.0
//! An administrator looks at a guest that has private pages: dumps in every format, whole and in parts, in the background
//! with a reset or the end of QEMU in the middle, and all commands that read memory. What is shared is there, nothing
//! private is, no look allocates memory, and the guest goes on.

mod background;
mod files;
mod looks;

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::kernel;
use crate::ledger::{Block, Ledger, PAGE};
use crate::qmp::Qmp;
use crate::scenario::{Outcome, Scenario};
use serde_json::{json, Value};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Two blocks; the second appears at two places, one of them above 4 GiB.
const RAM0_BYTES: u64 = 48 * MIB;
const RAM1_BYTES: u64 = 32 * MIB;
const RAM1_LOW_BYTES: u64 = 16 * MIB;
const LOW_BYTES: u64 = RAM0_BYTES + RAM1_LOW_BYTES;
const HIGH: u64 = 4 * GIB;
/// Below it firmware and legacy devices have holes of their own in RAM.
const FIRST: u64 = MIB;

/// Private: 4 MiB in the middle, the even ones of some pages, the end of one block and the beginning of the other, and
/// something above 4 GiB.
const MIDDLE: u64 = 16 * MIB;
const MIDDLE_BYTES: u64 = 4 * MIB;
const SINGLES: u64 = 24 * MIB;
const SINGLES_COUNT: u64 = 64;
const SEAM: u64 = RAM0_BYTES - 2 * PAGE;
const SEAM_BYTES: u64 = 5 * PAGE;
const ABOVE: u64 = HIGH + 5 * MIB;
const ABOVE_BYTES: u64 = MIB + PAGE;
/// The guest never touches it.
const UNTOUCHED: u64 = 36 * MIB;
const UNTOUCHED_BYTES: u64 = 4 * MIB;
const SHARED_SEED: u64 = 21;
const SECRET_SEED: u64 = 22;
const SEEDS: &[u64] = &[SECRET_SEED];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut guest = start(&scenario.directory().join("mixed"), &[])?;
    let all_shared = files::time(&mut guest)?;
    prepare(scenario, &mut guest)?;
    guest.agree(scenario, "before the first dump")?;
    files::every_format(scenario, &mut guest)?;
    files::parts(scenario, &mut guest)?;
    files::questions(scenario, &mut guest, all_shared)?;
    looks::run(scenario, &mut guest)?;
    background::one_after_the_other(scenario, &mut guest)?;
    background::unplug(scenario, &mut guest)?;
    background::reset(scenario, &mut guest)?;
    prepare(scenario, &mut guest)?;
    files::nearly_all_private(scenario, &mut guest)?;
    guest.agree(scenario, "after the last dump")?;
    guest.finish(scenario)?;

    scenario.prefix("rebuilt: ");
    let rebuilt = ["-machine", "x-change-vmfd-on-reset=on"];
    let mut guest = start(&scenario.directory().join("rebuilt"), &rebuilt)?;
    prepare(scenario, &mut guest)?;
    background::reset(scenario, &mut guest)?;
    background::quit(scenario, guest)?;

    scenario.prefix("ordinary guest: ");
    files::ordinary(scenario)?;
    if kernel::in_place() {
        scenario.prefix("all private from the start: ");
        background::all_private(scenario)?;
    }
    Ok(())
}

fn start(directory: &Path, more: &[&str]) -> Result<Confidential, Failure> {
    let blocks = vec![
        Block::small("ram0", RAM0_BYTES),
        Block::small("ram1", RAM1_BYTES),
    ];
    let ram0 = format!("memory-backend-gmem,id=ram0,size={RAM0_BYTES}");
    let ram1 = format!("memory-backend-gmem,id=ram1,size={RAM1_BYTES}");
    let size = format!("{}M,slots=1,maxmem=1G", (RAM0_BYTES + RAM1_BYTES) / MIB);
    let machine = format!(
        "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,max-ram-below-4g={LOW_BYTES}"
    );
    let mut arguments = vec!["-object", &ram0, "-object", &ram1];
    arguments.extend(["-numa", "node,nodeid=0,memdev=ram0"]);
    arguments.extend(["-numa", "node,nodeid=1,memdev=ram1"]);
    arguments.extend(["-m", &size, "-machine", &machine]);
    arguments.extend(["-trace", "qemu_gmem_get_run"]);
    arguments.extend(more);
    Confidential::start(directory, &arguments, Ledger::with_hole(blocks, LOW_BYTES))
}

/// Private pages with known contents, and shared ones around them.
fn prepare(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    let singles = SINGLES..SINGLES + 2 * SINGLES_COUNT * PAGE;
    for range in [
        MIDDLE - PAGE..MIDDLE + MIDDLE_BYTES + PAGE,
        singles,
        SEAM - PAGE..SEAM + SEAM_BYTES + PAGE,
        ABOVE - PAGE..ABOVE + ABOVE_BYTES + PAGE,
    ] {
        guest.fill(range.start, range.end - range.start, SHARED_SEED)?;
    }
    for (gpa, bytes) in [
        (MIDDLE, MIDDLE_BYTES),
        (SEAM, SEAM_BYTES),
        (ABOVE, ABOVE_BYTES),
    ] {
        guest.convert(scenario, gpa, bytes, true)?;
        guest.fill(gpa, bytes, SECRET_SEED)?;
    }
    let results = guest
        .monitor
        .storm(SINGLES_COUNT, SINGLES, PAGE, true, 2 * PAGE)?;
    scenario.check_equal(results, vec![(0, SINGLES_COUNT)], "results of single pages")?;
    for index in 0..SINGLES_COUNT {
        let at = SINGLES + 2 * index * PAGE;
        guest.ledger.convert(at, PAGE, true);
        guest.fill(at, PAGE, SECRET_SEED)?;
    }
    // What it wrote last is in its registers, and these are in a dump.
    guest.fill(MIDDLE - PAGE, PAGE, SHARED_SEED)
}

/// What a dump may be of.
fn ram(guest: &Confidential) -> Vec<Range<u64>> {
    let mut places = guest.ledger.places();
    places[0].start = FIRST;
    places
}

fn shared_bytes(guest: &Confidential) -> u64 {
    let all: u64 = guest.ledger.blocks.iter().map(|block| block.bytes).sum();
    all - guest.ledger.all_private_bytes()
}

/// What the host holds of the guest's memory: ranges of each block's shared file, and all private bytes.
type Held = (Vec<Vec<Range<u64>>>, u64);

fn held(guest: &Confidential) -> Result<Held, Failure> {
    let extents = guest.shared.iter().map(|file| file.extents());
    Ok((
        extents.collect::<Result<_, _>>()?,
        guest.private_allocated()?,
    ))
}

/// Does something that is not to allocate any memory.
fn without_allocating<T>(
    scenario: &Scenario,
    guest: &mut Confidential,
    what: &str,
    doing: impl FnOnce(&mut Confidential) -> Result<T, Failure>,
) -> Result<T, Failure> {
    guest.settle()?;
    let before = held(guest)?;
    let result = doing(guest)?;
    holds_the_same(scenario, guest, what, &before)?;
    Ok(result)
}

fn holds_the_same(scenario: &Scenario, guest: &Confidential, what: &str, before: &Held) -> Outcome {
    let after = held(guest)?;
    let bytes =
        |extents: &[Range<u64>]| -> u64 { extents.iter().map(|run| run.end - run.start).sum() };
    for (index, (before, after)) in before.0.iter().zip(&after.0).enumerate() {
        scenario.check(
            before == after,
            format!(
                "{what}: block {index} has the pages that it had: {:#x} bytes before, {:#x} after",
                bytes(before),
                bytes(after)
            ),
        )?;
    }
    scenario.check_equal(after.1, before.1, format!("{what}: bytes in guest_memfds"))
}

/// Not among the logs, which a failure shows.
fn dump_file() -> PathBuf {
    std::env::temp_dir().join("vmcore")
}

/// Arguments of dump-guest-memory.
fn arguments(path: &Path, more: &[(&str, Value)]) -> Value {
    let mut arguments = json!({"paging": false, "protocol": format!("file:{}", path.display())});
    for (name, value) in more {
        arguments[*name] = value.clone();
    }
    arguments
}

/// Dumps that somebody waited for have sent events about their end, too.
fn forget_ends(qmp: &mut Qmp) -> Outcome {
    while qmp.events_waiting("DUMP_COMPLETED") > 0 {
        qmp.event("DUMP_COMPLETED", Duration::ZERO)?;
    }
    Ok(())
}

fn status(guest: &mut Confidential) -> Result<String, Failure> {
    let answer = guest.machine.qmp.execute("query-status", json!({}))?;
    let status = answer["status"].as_str().map(String::from);
    status.attempt(|| format!("query-status says no status: {answer}"))
}
