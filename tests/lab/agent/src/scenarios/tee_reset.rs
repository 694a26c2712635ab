// SPDX-License-Identifier: MIT OR Apache-2.0
//! SNP and TDX guests are reset, by QMP and by themselves, and made anew 20 times: each reset is a new VM that is launched as the
//! first was. All is private again, nothing of what was shared or private before is left, and QEMU holds no more than before. Suspended
//! to RAM, such a guest stays awake, or wakes up with its memory.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::host::files;
use crate::host::tee::View;
use crate::ledger::PAGE;
use crate::qmp::Gmem;
use crate::rebuilt::{self, status};
use crate::scenario::{Outcome, Scenario};
use crate::tee::{Host, Launch, OPEN};
use serde_json::json;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
const PRIVATE: u64 = 16 * MIB;
const SHARED: u64 = 32 * MIB;
const BYTES: u64 = MIB;
const SHARED_SEED: u64 = 31;
const PRIVATE_SEED: u64 = 32;
const REBUILDS: u64 = 20;
/// Pages are looked at one by one at this distance.
const LOOK_EVERY: u64 = 16 * PAGE;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = Host::of(scenario)?;
    let mut guest = Launch::new(&host, RAM_BYTES)
        .vcpus(2)
        .start(scenario.directory())?;
    guest.agree(scenario, "at start")?;
    let launched = View::of(guest.machine.pid())?.launched();
    for by in ["QMP", "the guest"] {
        scenario.prefix(&format!("reset by {by}: "));
        leave_traces(scenario, &mut guest)?;
        reset(&mut guest, by)?;
        as_after_a_launch(scenario, &mut guest)?;
        let again = View::of(guest.machine.pid())?.launched();
        scenario.check_equal(&again, &launched, "what the launch added")?;
    }
    scenario.prefix("");
    many(scenario, &mut guest)?;
    sleep(scenario, &mut guest)?;
    guest.finish(scenario)
}

/// Something shared, something private.
fn leave_traces(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    guest.fill(PRIVATE, BYTES, PRIVATE_SEED)?;
    guest.convert(scenario, SHARED, BYTES, false)?;
    guest.fill(SHARED, BYTES, SHARED_SEED)?;
    guest.agree(scenario, "before the reset")
}

fn reset(guest: &mut Confidential, by: &str) -> Outcome {
    match by {
        "QMP" => {
            guest.machine.qmp.execute("system_reset", json!({}))?;
        }
        _ => {
            guest.monitor.ask("reset")?;
        }
    }
    rebuilt::started_anew(guest)
}

/// Everything is as after the first start, and there is no word of before, in private memory or in what is shared then.
fn as_after_a_launch(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    scenario.check_equal(
        guest.ledger.all_private_bytes(),
        RAM_BYTES - (OPEN.end - OPEN.start),
        "what starts private",
    )?;
    guest.agree(scenario, "after the reset")?;
    for (gpa, seed) in [(PRIVATE, PRIVATE_SEED), (SHARED, SHARED_SEED)] {
        guest.expect_zeros(scenario, gpa, BYTES)?;
        guest.convert(scenario, gpa, BYTES, false)?;
        if !guest.in_place {
            guest.expect_zeros(scenario, gpa, BYTES)?;
        }
        for page in (gpa..gpa + BYTES).step_by(LOOK_EVERY as usize) {
            let difference = guest.monitor.check(page, PAGE, seed)?;
            scenario.check(
                difference.is_some(),
                format!("nothing is left of what was written to {page:#x} before the reset"),
            )?;
        }
        guest.convert(scenario, gpa, BYTES, true)?;
    }
    Ok(())
}

/// What QEMU holds of guests' files.
fn held(guest: &Confidential) -> Result<usize, Failure> {
    let files = files::of(guest.machine.pid())?;
    Ok(files.iter().filter(|file| file.is_of_guests()).count())
}

fn many(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let rebuilds =
        |guest: &mut Confidential| Gmem::query(&mut guest.machine.qmp)?.total("rebuilds");
    let before = held(guest)?;
    let rebuilt_before = rebuilds(guest)?;
    for _ in 0..REBUILDS {
        guest.convert(scenario, SHARED, 3 * PAGE, false)?;
        guest.fill(SHARED, 2 * PAGE, SHARED_SEED)?;
        reset(guest, "QMP")?;
    }
    as_after_a_launch(scenario, guest)?;
    let made = rebuilds(guest)? - rebuilt_before;
    scenario.fact("VMs made anew in a row", made);
    scenario.check_equal(made, REBUILDS, "VMs made anew in a row")?;
    scenario.check_equal(held(guest)?, before, "files of guests that QEMU holds")?;
    guest.agree(scenario, "after many resets")
}

/// No firmware of the lab's resumes: what falls asleep must not lose its memory, and what can't must say so.
fn sleep(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    leave_traces(scenario, guest)?;
    let begun = guest.monitor.begin_sleep()?;
    let woken = guest.monitor.end_sleep(begun)?;
    scenario.check(!woken, "the machine does not fall asleep")?;
    let complaints = guest.machine.complaints();
    let said = complaints.lines().find(|line| line.contains("suspended"));
    scenario.fact("asked to be suspended", said.unwrap_or("in silence"));
    scenario.check(said.is_some(), "QEMU says why")?;
    scenario.check_equal(
        status(&mut guest.machine)?.as_str(),
        "running",
        "the machine's state",
    )?;
    guest.agree(scenario, "still awake")
}
