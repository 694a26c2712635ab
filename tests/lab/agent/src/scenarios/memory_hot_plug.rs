// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory comes to a running confidential guest, and goes again with private pages in it, while the guest converts: the
//! guest's device reaches what is shared of it, and nothing once it is gone.

use super::hot_plug::{begin, end, requests};
use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::{Attempt, Failure};
use crate::host::messages::Messages;
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::PAGE;
use crate::plugging::Module;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use std::fs;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const DIMM_BYTES: u64 = 64 * MIB;
const ORIGIN: u64 = 16 * MIB;
const ELSEWHERE: u64 = 25 * MIB;
/// In the module: the end of what becomes private is not that of a huge page.
const PRIVATE: u64 = 8 * MIB;
const PRIVATE_BYTES: u64 = 4 * MIB + 3 * PAGE;
const FAULT_PATIENCE: Duration = Duration::from_secs(6);
const FAULT_ATTEMPTS: usize = 4;

const MODULE: Module = Module {
    device: "dimm0",
    backend: "mem1",
    bytes: DIMM_BYTES,
};

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let trace = scenario.directory().join("qemu.trace");
    let mut guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        "",
        &[
            "-m",
            "slots=2,maxmem=1G",
            "-trace",
            "kvm_set_user_memory",
            "-trace",
            "qemu_gmem_unbind",
            "-D",
            &trace.to_string_lossy(),
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
        slot_goes_first(scenario, &trace, gpa)?;
    }
    scenario.prefix("");
    scenario.fact("agreements", guest.agreements);
    guest.finish(scenario)
}

/// Returns where the guest sees the module.
fn plug(scenario: &mut Scenario, guest: &mut Confidential) -> Result<u64, Failure> {
    let flips = begin(guest)?;
    let before = requests(guest)?;
    MODULE.plug(guest)?;
    let during = requests(guest)? - before;
    end(scenario, guest, flips, during, "plugging memory")?;

    let gpa = MODULE.is_there(guest)?;
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
    let flips = begin(guest)?;
    let before = requests(guest)?;
    MODULE.unplug(guest)?;
    let during = requests(guest)? - before;
    end(scenario, guest, flips, during, "unplugging memory")?;

    MODULE.is_freed(guest)?;
    guest.agree(scenario, "after unplugging")?;
    is_out_of_reach(scenario, guest, gpa)
}

/// What is not bound counts as shared: a vCPU that still had a slot would find shared memory where it left private pages.
fn slot_goes_first(scenario: &Scenario, trace: &Path, gpa: u64) -> Outcome {
    let text = fs::read_to_string(trace).attempt(|| format!("reading {}", trace.display()))?;
    let last = |words: [&str; 3]| {
        let lines = text.lines().enumerate();
        let found = lines.filter(|(_, line)| words.iter().all(|word| line.contains(word)));
        found.last().map(|(number, _)| number)
    };
    let gone = last([
        "kvm_set_user_memory",
        &format!("gpa={gpa:#x} "),
        "size=0x0 ",
    ]);
    let unbound = last(["qemu_gmem_unbind", "mem1", ""]);
    scenario.check(
        gone.is_some() && gone < unbound,
        format!("QEMU's trace has the slot go before its binding: lines {gone:?}, {unbound:?}"),
    )
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
