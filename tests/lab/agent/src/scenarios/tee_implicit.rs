// SPDX-License-Identifier: MIT OR Apache-2.0
//! SNP and TDX guests convert by access: C-bit and shared bit say what a page is meant to be, and KVM exits with a memory fault where
//! that is not what it has. Here a range of addresses says it. Each page that is touched converts by itself, there and back, from
//! several processors at once and in QEMU's own memory; nothing else changes. Where there is no memory nobody can serve a private
//! access: the VM stops and says so.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::ledger::PAGE;
use crate::qmp::Gmem;
use crate::rebuilt::status;
use crate::scenario::{Outcome, Scenario};
use crate::tee::{Host, Kind, Launch};
use serde_json::json;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
const RANGE: u64 = 16 * MIB;
const RANGE_BYTES: u64 = 64 * PAGE;
/// Of those every so manieth page is touched.
const STRIDE: u64 = 4 * PAGE;
const TOUCHED: u64 = RANGE_BYTES / STRIDE;
const WHOLE: u64 = 32 * MIB;
const HOLE: u64 = 256 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = Host::of(scenario)?;
    let mut guest = Launch::new(&host, RAM_BYTES)
        .vcpus(4)
        .start(scenario.directory())?;
    guest.patient = true;
    guest.agree(scenario, "at start")?;
    for private in [false, true] {
        scenario.prefix(if private {
            "to private: "
        } else {
            "to shared: "
        });
        page_by_page(scenario, &mut guest, private)?;
    }
    scenario.prefix("a whole range: ");
    whole(scenario, &mut guest)?;
    scenario.prefix("firmware: ");
    firmware(scenario, &mut guest, host.kind)?;
    guest.finish(scenario)?;
    scenario.prefix("no memory: ");
    nobody_can(scenario, &host)?;
    scenario.prefix("");
    Ok(())
}

fn totals(guest: &mut Confidential) -> Result<[u64; 2], Failure> {
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    Ok([gmem.total("requests")?, gmem.total("failures")?])
}

/// Accesses to a range are of one kind; some of its pages are written to.
fn page_by_page(scenario: &mut Scenario, guest: &mut Confidential, private: bool) -> Outcome {
    guest.monitor.set_kind(RANGE, RANGE_BYTES, Some(private))?;
    let [before, failed_before] = totals(guest)?;
    for index in 0..TOUCHED {
        let page = RANGE + index * STRIDE;
        guest.monitor.fill(page, PAGE, 1)?;
        guest.ledger.convert(page, PAGE, private);
        guest.ledger.fill(page, PAGE, 1);
    }
    guest.agree(scenario, "after one access to some pages")?;
    let [requests, failures] = totals(guest)?;
    scenario.fact("conversions by access", requests - before);
    scenario.check_equal(requests - before, TOUCHED, "conversions by access")?;
    scenario.check_equal(failures, failed_before, "failures")?;
    guest.monitor.set_kind(RANGE, RANGE_BYTES, None)?;
    guest.agree(scenario, "when kinds follow attributes again")
}

/// Four processors write to pages of one range, which becomes shared page by page below them; and back.
fn whole(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    for (private, seed) in [(false, 2), (true, 3)] {
        guest.monitor.set_kind(WHOLE, RANGE_BYTES, Some(private))?;
        let bad = guest
            .monitor
            .ask(&format!("fill-each 4 {WHOLE:#x} {RANGE_BYTES:#x} {seed}"))?;
        scenario.check_equal(bad.join(" "), "filled".into(), "four processors write")?;
        guest.ledger.convert(WHOLE, RANGE_BYTES, private);
        guest.ledger.fill(WHOLE, RANGE_BYTES, seed);
        guest.agree(scenario, &format!("private: {private}"))?;
        guest.monitor.set_kind(WHOLE, RANGE_BYTES, None)?;
    }
    Ok(())
}

/// Firmware is in memory of QEMU's own, and converts as RAM does.
fn firmware(scenario: &mut Scenario, guest: &mut Confidential, kind: Kind) -> Outcome {
    let page = kind.firmware_range()?.start;
    guest.monitor.set_kind(page, PAGE, Some(false))?;
    guest.monitor.write(page, 5)?;
    if let Some(tee) = &mut guest.tee {
        tee.others_shared.push(page..page + PAGE);
    }
    guest.agree(scenario, "shared by access")?;
    guest.monitor.set_kind(page, PAGE, Some(true))?;
    guest.monitor.write(page, 6)?;
    if let Some(tee) = &mut guest.tee {
        tee.others_shared.clear();
    }
    scenario.check_equal(guest.monitor.read(page)?, 6, "what the guest reads there")?;
    guest.monitor.set_kind(page, PAGE, None)?;
    guest.agree(scenario, "private by access")
}

/// A private access where there is no memory: the VM stops, alive, and QEMU says which access and why.
fn nobody_can(scenario: &mut Scenario, host: &Host) -> Outcome {
    let directory = scenario.directory().join("no-memory");
    let mut guest = Launch::new(host, RAM_BYTES).start(&directory)?;
    guest.monitor.set_kind(HOLE, PAGE, Some(true))?;
    let _ = guest.monitor.begin(&format!("read64 {HOLE:#x}"))?;
    let deadline = Instant::now() + PATIENCE;
    while status(&mut guest.machine)? == "running" && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let state = status(&mut guest.machine)?;
    let complaints = guest.machine.complaints();
    let said = complaints
        .lines()
        .find(|line| line.contains(&format!("{HOLE:x}")));
    scenario.fact("a private access", said.unwrap_or("in silence"));
    scenario.check_equal(state.as_str(), "internal-error", "the machine's state")?;
    scenario.check(said.is_some(), "QEMU names the address")?;
    guest.machine.qmp.execute("quit", json!({}))?;
    guest.machine.wait_for_exit(PATIENCE)?;
    let left = guest.private_allocated()?;
    scenario.check_equal(left, 0, "bytes that guest_memfds hold after QEMU's end")
}
