// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory comes to a running confidential guest, and goes again with private pages in it, while the guest converts: the
//! guest's device reaches what is shared of it, and nothing once it is gone.

use super::hot_plug::{begin, end, requests};
use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::{Attempt, Failure};
use crate::host::memory::SharedFile;
use crate::host::messages::Messages;
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::{Block, PAGE};
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::{json, Value};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const DIMM_BYTES: u64 = 64 * MIB;
const ORIGIN: u64 = 16 * MIB;
const ELSEWHERE: u64 = 25 * MIB;
/// In the module: the end of what becomes private is not that of a huge page.
const PRIVATE: u64 = 8 * MIB;
const PRIVATE_BYTES: u64 = 4 * MIB + 3 * PAGE;
const GONE_PATIENCE: Duration = Duration::from_secs(60);
const FAULT_PATIENCE: Duration = Duration::from_secs(6);
const FAULT_ATTEMPTS: usize = 4;

/// The ports of the chipset's memory hot-plug controller (ACPI) that select a slot and, by bit 3, eject from it. A guest's
/// driver would write there; the monitor does, so that the memory goes while the guest is in the middle of something else.
const SELECT: u64 = 0xa00;
const CONTROL: u64 = 0xa14;
const EJECT: u64 = 1 << 3;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        "",
        &[
            "-m",
            "slots=2,maxmem=1G",
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            &passthrough,
        ],
    )?;
    for time in ["once", "again"] {
        scenario.prefix(&format!("{time}: "));
        let gpa = plug(scenario, &mut guest)?;
        use_it(scenario, &mut guest, gpa)?;
        unplug(scenario, &mut guest, gpa)?;
    }
    scenario.prefix("");
    scenario.fact("agreements", guest.agreements);
    guest.finish(scenario)
}

fn property(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    let arguments = json!({"path": "/machine/peripheral/dimm0", "property": name});
    let value: Value = guest.machine.qmp.execute("qom-get", arguments)?;
    value
        .as_u64()
        .attempt(|| format!("the module's {name} is no number: {value}"))
}

/// Returns where the guest sees the module.
fn plug(scenario: &mut Scenario, guest: &mut Confidential) -> Result<u64, Failure> {
    let flips = begin(guest)?;
    let before = requests(guest)?;
    guest.machine.qmp.execute(
        "object-add",
        json!({"qom-type": "memory-backend-gmem", "id": "mem1", "size": DIMM_BYTES}),
    )?;
    guest.machine.qmp.execute(
        "device_add",
        json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "mem1"}),
    )?;
    let during = requests(guest)? - before;
    end(scenario, guest, flips, during, "plugging memory")?;

    let gpa = property(guest, "addr")?;
    guest.ledger.plug(Block::small("mem1", DIMM_BYTES), gpa);
    let file = SharedFile::open(guest.machine.pid(), DIMM_BYTES)?;
    guest.shared.push(file);
    scenario.fact("address", format!("{gpa:#x}"));
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let block = gmem.block("mem1")?;
    for (name, expected) in [
        ("dma-windows", 1),
        ("dma-mapped", DIMM_BYTES),
        ("bindings", 1),
    ] {
        scenario.check_equal(
            block.number(name)?,
            expected,
            format!("query-gmem's {name} of what was plugged"),
        )?;
    }
    scenario.fact("strategy", block.text("dma-strategy")?);
    Ok(gpa)
}

fn use_it(scenario: &mut Scenario, guest: &mut Confidential, gpa: u64) -> Outcome {
    let engine = Engine::new(0, ORIGIN);
    guest.expect_zeros(scenario, gpa, MIB)?;
    engine.reaches(scenario, guest, gpa)?;
    engine.reaches(scenario, guest, gpa + DIMM_BYTES - PAGE)?;

    guest.convert(scenario, gpa + PRIVATE, PRIVATE_BYTES, true)?;
    guest.fill(gpa + PRIVATE, PRIVATE_BYTES, 4)?;
    guest.agree(scenario, "with private pages in what was plugged")?;
    let inside = gpa + PRIVATE + 5 * PAGE;
    let fault = engine.is_kept_from(scenario, guest, inside, ELSEWHERE)?;
    scenario.fact("fault at a private page", fault);
    engine.reaches(scenario, guest, gpa + PRIVATE + PRIVATE_BYTES)
}

fn unplug(scenario: &mut Scenario, guest: &mut Confidential, gpa: u64) -> Outcome {
    let slot = property(guest, "slot")?;
    let flips = begin(guest)?;
    let before = requests(guest)?;
    guest
        .machine
        .qmp
        .execute("device_del", json!({"id": "dimm0"}))?;
    for write in [
        format!("o /4 {SELECT} {slot}"),
        format!("o /1 {CONTROL} {EJECT}"),
    ] {
        let arguments = json!({"command-line": write});
        guest
            .machine
            .qmp
            .execute("human-monitor-command", arguments)?;
    }
    guest.machine.qmp.event("DEVICE_DELETED", GONE_PATIENCE)?;
    guest
        .machine
        .qmp
        .execute("object-del", json!({"id": "mem1"}))?;
    let during = requests(guest)? - before;
    guest.ledger.unplug();
    guest.shared.pop();
    end(scenario, guest, flips, during, "unplugging memory")?;

    // QEMU frees it when nobody can still be looking at the old address map.
    let deadline = Instant::now() + GONE_PATIENCE;
    while Gmem::query(&mut guest.machine.qmp)?.block("mem1").is_ok()
        || guest.private_allocated()? != guest.guest_memfd_bytes()?
    {
        scenario.check(
            Instant::now() < deadline,
            "what was unplugged is freed in the end",
        )?;
    }
    guest.agree(scenario, "after unplugging")?;
    is_out_of_reach(scenario, guest, gpa)
}

/// The device finds nothing where the memory was.
fn is_out_of_reach(scenario: &mut Scenario, guest: &mut Confidential, gpa: u64) -> Outcome {
    let mut messages = Messages::from_now()?;
    let address = format!("{gpa:#x}");
    let mut fault = None;
    for _ in 0..FAULT_ATTEMPTS {
        guest.monitor.edu_load_by(0, ORIGIN)?;
        guest.monitor.edu_store_by(0, gpa)?;
        fault = messages.find(&["DMAR", &address], FAULT_PATIENCE)?;
        if fault.is_some() {
            break;
        }
    }
    scenario.check(
        fault.is_some(),
        format!("the IOMMU reports a fault at {address}, which is gone"),
    )
}
