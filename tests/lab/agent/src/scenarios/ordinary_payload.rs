// SPDX-License-Identifier: MIT OR Apache-2.0
//! An ordinary guest with all its RAM on a guest_memfd and the payload in it: the least that a host has to be able to run.

use crate::boot::CommandLine;
use crate::host::files;
use crate::host::memory::{backing, guest_memfds};
use crate::machine::Machine;
use crate::monitor::Monitor;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 256 * MIB;
/// All but what the payload and the firmware have, at either end.
const START: u64 = 16 * MIB;
const BYTES: u64 = RAM_BYTES - 32 * MIB;
const EXIT_PATIENCE: Duration = Duration::from_secs(120);

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    for smm in ["off", "on"] {
        scenario.prefix(&format!("smm-{smm}: "));
        once(scenario, smm)?;
    }
    Ok(())
}

fn once(scenario: &mut Scenario, smm: &str) -> Outcome {
    let (mut machine, serial) = Machine::start(
        &scenario.directory().join(format!("smm-{smm}")),
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}"),
            "-m",
            &format!("{}M", RAM_BYTES / MIB),
            "-machine",
            &format!("q35,accel=kvm,smm={smm},memory-backend=ram0"),
            "-kernel",
            crate::place::payload(),
        ],
    )?;
    let mut monitor = Monitor::new(serial)?;
    machine.is_silent()?;
    let mapping = backing(machine.pid(), RAM_BYTES)?;
    scenario.fact("mapping", mapping.path.clone());
    scenario.check(
        mapping.is_guest_memfd(),
        "the mapping behind RAM is of a guest_memfd",
    )?;
    scenario.check_equal(
        guest_memfds(machine.pid())?.len(),
        1,
        "guest_memfds that QEMU holds",
    )?;
    files::are_kept(scenario, machine.pid(), &[], "the guest at work")?;

    monitor.fill(START, BYTES, 1)?;
    let difference = monitor.check(START, BYTES, 1)?;
    scenario.check_equal(difference, None, "the guest finds what it wrote")?;
    scenario.fact("bytes written and read", BYTES);
    scenario.progress("memory written and read");

    let gmem = Gmem::query(&mut machine.qmp)?;
    let block = gmem.block("ram0")?;
    scenario.fact("backing", block.text("backing")?);
    for (name, expected) in [("size", RAM_BYTES), ("private", 0), ("shared", RAM_BYTES)] {
        scenario.check_equal(
            block.number(name)?,
            expected,
            format!("query-gmem's {name}"),
        )?;
    }

    machine.qmp.execute("system_reset", json!({}))?;
    monitor.wait_until_ready()?;
    monitor.ask("reset")?;
    monitor.wait_until_ready()?;
    monitor.fill(START, MIB, 2)?;
    let difference = monitor.check(START, MIB, 2)?;
    scenario.check_equal(difference, None, "after two resets it goes on")?;
    monitor.power_off()?;
    machine.wait_for_exit(EXIT_PATIENCE)
}
