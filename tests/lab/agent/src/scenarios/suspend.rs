// SPDX-License-Identifier: MIT OR Apache-2.0
//! A confidential guest is suspended to RAM (ACPI S3) and woken up: private pages are private and have their bytes, devices
//! reach what they reached, and the host no more than before. A guest that nothing could wake up can't be suspended.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::debugger::{Debugger, Socket};
use crate::dma::Engine;
use crate::failure::Failure;
use crate::host::memory::guest_memfds;
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::PAGE;
use crate::machine::Surroundings;
use crate::monitor::{Begun, Monitor};
use crate::qmp::Gmem;
use crate::rebuilt::{self, reset, status, MIB, ORIGIN, PATIENCE, PRIVATE};
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::time::Instant;

const RAM_BYTES: u64 = 128 * MIB;
const SHARED: u64 = 24 * MIB;
const SHARED_BYTES: u64 = 2 * MIB;
const PRIVATE_BYTES: u64 = 4 * MIB;
/// Single private pages with shared ones between them.
const SINGLE: u64 = 48 * MIB;
const SINGLES: u64 = 8;
const ELSEWHERE: u64 = 60 * MIB;
/// Enough for QEMU to hold its tongue: it says so many things of a kind in so many seconds.
const ATTEMPTS: u64 = 25;
const SPOKEN_OF: u64 = 10;
const SPOKEN_OF_SECONDS: u64 = 5;
/// The numbers of a block that sleep must not change.
const KEPT: [&str; 6] = [
    "private",
    "private-runs",
    "to-private",
    "to-shared",
    "dma-mapped",
    "quarantined",
];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    let (mut guest, mut debugger) = start(scenario, &device)?;
    prepare(scenario, &mut guest)?;
    for by in ["QMP", "a key"] {
        scenario.prefix(&format!("woken by {by}: "));
        sleeps_and_wakes(scenario, &mut guest, by)?;
    }
    scenario.prefix("awake again: ");
    devices_reach_what_they_did(scenario, &mut guest)?;
    debugger_is_refused(scenario, &mut guest, &mut debugger)?;
    scenario.prefix("converts after it: ");
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES / 2, false)?;
    guest.fill(PRIVATE, PRIVATE_BYTES / 2, 21)?;
    guest.convert(scenario, SHARED, SHARED_BYTES, true)?;
    guest.fill(SHARED, SHARED_BYTES, 22)?;
    guest.agree(scenario, "after conversions")?;

    scenario.prefix("made anew while asleep: ");
    fall_asleep(scenario, &mut guest)?;
    reset(&mut guest.machine)?;
    guest.machine.qmp.execute("cont", json!({}))?;
    rebuilt::started_anew(&mut guest)?;
    guest.agree(scenario, "after the reset")?;
    prepare(scenario, &mut guest)?;
    scenario.prefix("woken in the new VM: ");
    sleeps_and_wakes(scenario, &mut guest, "QMP")?;

    scenario.prefix("ended while asleep: ");
    fall_asleep(scenario, &mut guest)?;
    guest.machine.qmp.execute("quit", json!({}))?;
    guest.machine.wait_for_exit(PATIENCE)?;
    let left = guest.private_allocated()?;
    scenario.check_equal(left, 0, "bytes that guest_memfds hold after QEMU's end")?;
    drop(guest);

    scenario.prefix("without firmware: ");
    nobody_would_resume(scenario)?;
    scenario.prefix("");
    Ok(())
}

fn start(scenario: &Scenario, device: &str) -> Result<(Confidential, Debugger), Failure> {
    let socket = Socket::new()?;
    let debugging = socket.arguments();
    let arguments: Vec<_> = debugging.iter().map(String::as_str).collect();
    let guest = rebuilt::with_device(
        scenario.directory(),
        RAM_BYTES,
        device,
        &arguments,
        Surroundings {
            inherited: &[socket.descriptor()],
            ..Surroundings::default()
        },
    )?;
    Ok((guest, socket.debugger()?))
}

/// Something private, something shared, and runs of single pages.
fn prepare(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    guest.fill(SHARED, SHARED_BYTES, 11)?;
    guest.convert(scenario, PRIVATE, PRIVATE_BYTES, true)?;
    guest.fill(PRIVATE, PRIVATE_BYTES, 12)?;
    for index in 0..SINGLES {
        guest.convert(scenario, SINGLE + 2 * index * PAGE, PAGE, true)?;
    }
    guest.fill(SINGLE, 2 * SINGLES * PAGE, 13)?;
    guest.agree(scenario, "before sleep")
}

fn kept(guest: &mut Confidential) -> Result<Vec<u64>, Failure> {
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let block = gmem.block("ram0")?;
    KEPT.iter().map(|name| block.number(name)).collect()
}

fn fall_asleep(scenario: &Scenario, guest: &mut Confidential) -> Result<Begun, Failure> {
    let begun = guest.monitor.begin_sleep()?;
    guest.machine.qmp.event("SUSPEND", PATIENCE)?;
    scenario.check_equal(
        status(&mut guest.machine)?.as_str(),
        "suspended",
        "the machine's state",
    )?;
    Ok(begun)
}

fn sleeps_and_wakes(scenario: &mut Scenario, guest: &mut Confidential, by: &str) -> Outcome {
    let before = kept(guest)?;
    let files = guest_memfds(guest.machine.pid())?;
    let begun = fall_asleep(scenario, guest)?;
    match by {
        "QMP" => guest.machine.qmp.execute("system_wakeup", json!({}))?,
        _ => guest.machine.qmp.execute(
            "send-key",
            json!({"keys": [{"type": "qcode", "data": "a"}]}),
        )?,
    };
    guest.machine.qmp.event("WAKEUP", PATIENCE)?;
    let woken = guest.monitor.end_sleep(begun)?;
    scenario.check(woken, "the guest was asleep and goes on where it was")?;
    scenario.check_equal(
        status(&mut guest.machine)?.as_str(),
        "running",
        "the machine's state",
    )?;
    let after = kept(guest)?;
    scenario.check_equal(&after, &before, format!("query-gmem's {KEPT:?}"))?;
    scenario.check_equal(
        guest_memfds(guest.machine.pid())?,
        files,
        "QEMU's guest_memfds",
    )?;
    scenario.fact("private bytes kept", after[0]);
    scenario.fact("private runs kept", after[1]);
    guest.agree(scenario, "after waking up")
}

fn devices_reach_what_they_did(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let engine = Engine::new(0, ORIGIN);
    engine.reaches(scenario, guest, SHARED + 3 * PAGE)?;
    let fault = engine.is_kept_from(scenario, guest, PRIVATE + 3 * PAGE, ELSEWHERE)?;
    scenario.fact("DMA to a private page", fault);
    guest.agree(scenario, "after DMA")
}

/// No reset is under way any more: what a debugger writes is a write to a guest that runs.
fn debugger_is_refused(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    debugger: &mut Debugger,
) -> Outcome {
    const BYTES: [u8; 8] = [0x5a; 8];
    let shared = SHARED + 5 * PAGE;
    debugger.interrupt()?;
    let open = debugger.write(shared, &BYTES)?;
    // Elsewhere the other bytes of a private page are not the guest's.
    let private = match guest.in_place {
        true => Some(debugger.write(PRIVATE + 5 * PAGE, &BYTES)?),
        false => None,
    };
    debugger.go_on()?;
    scenario.check(open, "a debugger can write to a shared page")?;
    scenario.check(
        private != Some(true),
        "a debugger can't write to a private page",
    )?;
    let word = guest.monitor.ask(&format!("read64 {shared:#x}"))?;
    scenario.check_equal(
        word.first().map(String::as_str),
        Some("0x5a5a5a5a5a5a5a5a"),
        "what the guest reads where a debugger wrote",
    )?;
    guest.fill(shared, PAGE, 11)?;
    guest.agree(scenario, "after a debugger's writes")
}

/// An image that is started without firmware: the machine stays awake, and says why.
fn nobody_would_resume(scenario: &mut Scenario) -> Outcome {
    let (mut machine, serial) = rebuilt::with_image(
        &scenario.directory().join("without-firmware"),
        RAM_BYTES,
        &[],
    )?;
    let mut monitor = Monitor::new(serial)?;
    monitor.fill(PRIVATE, PAGE, 3)?;
    let begin = Instant::now();
    for _ in 0..ATTEMPTS {
        let begun = monitor.begin_sleep()?;
        scenario.check(
            !monitor.end_sleep(begun)?,
            "the machine does not fall asleep",
        )?;
    }
    let difference = monitor.check(PRIVATE, PAGE, 3)?;
    scenario.check_equal(difference, None, "what the guest finds after it")?;
    let complaints = machine.complaints();
    let said: Vec<_> = complaints
        .lines()
        .filter(|line| line.contains("asked to be suspended"))
        .collect();
    scenario.check(
        said.first()
            .is_some_and(|line| line.contains("no firmware")),
        "QEMU says why",
    )?;
    scenario.fact("refusal", said[0]);
    scenario.fact("attempts to fall asleep", ATTEMPTS);
    scenario.fact("of which QEMU spoke", said.len());
    let most = SPOKEN_OF * (begin.elapsed().as_secs() / SPOKEN_OF_SECONDS + 2);
    scenario.check(
        said.len() as u64 <= most,
        format!("QEMU spoke at most {most} times"),
    )?;
    let parameters = machine.qmp.execute("query-current-machine", json!({}))?;
    scenario.check_equal(
        parameters["wakeup-suspend-support"].as_bool(),
        Some(false),
        "whether the machine supports to be woken up",
    )?;
    let refusal = machine.qmp.try_execute("system_wakeup", json!({}))?;
    scenario.check(refusal.is_err(), "system_wakeup is refused")?;
    monitor.power_off()?;
    machine.wait_for_exit(PATIENCE)
}
