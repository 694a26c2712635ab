// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device that was given, whatever it is, in an ordinary guest on a guest_memfd: all of RAM is its, a reset and an unplug
//! leave books and host in order. Nobody drives it: that takes a driver, see `device-disk`.

use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::files;
use crate::machine::Machine;
use crate::monitor::Monitor;
use crate::place;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::{json, Value};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 256 * MIB;
const START: u64 = 32 * MIB;
const PATIENCE: Duration = Duration::from_secs(120);

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = place::host().attempt(|| "devices are given on hosts only".into())?;
    for (index, address) in host.devices.iter().enumerate() {
        // Its address is in the report's list of devices.
        scenario.prefix(&format!("device {index}: "));
        once(scenario, address, &format!("{index}"))?;
    }
    Ok(())
}

fn once(scenario: &mut Scenario, address: &str, name: &str) -> Outcome {
    let (mut machine, serial) = Machine::start(
        &scenario.directory().join(name),
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}"),
            "-m",
            &format!("{}M", RAM_BYTES / MIB),
            "-machine",
            "q35,accel=kvm,memory-backend=ram0",
            "-kernel",
            place::payload(),
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            "pcie-root-port,id=port0,chassis=1",
            "-device",
            &format!("vfio-pci,id=given,host={address},iommufd=iommufd0,bus=port0"),
        ],
    )?;
    let mut monitor = Monitor::new(serial)?;
    let mapped = dma_mapped(&mut machine)?;
    scenario.fact("dma_mapped_bytes", mapped);
    scenario.check(
        mapped > RAM_BYTES - 2 * MIB,
        format!("the device reaches RAM: {mapped} bytes of {RAM_BYTES}"),
    )?;
    monitor.fill(START, 16 * MIB, 1)?;
    machine.qmp.execute("system_reset", json!({}))?;
    monitor.wait_until_ready()?;
    scenario.check_equal(
        dma_mapped(&mut machine)?,
        mapped,
        "bytes mapped for the device after a reset",
    )?;
    let kept = files::are_kept(scenario, machine.pid(), &[], "with a device")?;
    scenario.fact("files that no child inherits", kept);
    let gmem = Gmem::query(&mut machine.qmp)?;
    let block = gmem.block("ram0")?;
    for fact in ["dma-path", "dma-path-reason"] {
        if let Ok(text) = block.text(fact) {
            scenario.fact(fact, text);
        }
    }
    scenario.check_equal(block.number("quarantined")?, 0, "quarantined bytes")?;
    monitor.power_off()?;
    machine.wait_for_exit(PATIENCE)
}

fn dma_mapped(machine: &mut Machine) -> Result<u64, Failure> {
    let gmem = Gmem::query(&mut machine.qmp)?;
    let books: Value = gmem.books();
    let said = gmem.block("ram0")?.number("dma-mapped");
    said.attempt(|| format!("query-gmem of ram0: {books}"))
}
