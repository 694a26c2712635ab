// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who has guest memory pinned when the VM is rebuilt gets the new pages: devices on iommufd and in VFIO containers
//! without it. On machines with PAM registers and on one without: where the firmware moves RAM about, what is stale may be mapped
//! anew by chance.

use crate::boot::CommandLine;
use crate::failure::Failure;
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::PAGE;
use crate::monitor::protocol::pattern;
use crate::scenario::{Outcome, Scenario};
use crate::test_port::TestPort;
use serde_json::json;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
const RESET_PATIENCE: Duration = Duration::from_secs(120);
/// Below what firmware and chipset move about, and above.
const PLACES: [(u64, u64); 2] = [(0x2_0000, 0x3_0000), (24 * MIB, 25 * MIB)];
/// Nothing else is there, on any of the machines.
const REGISTERS: u64 = 0xc000_0000;

/// Machine, more of its options, and where its PCI configuration is memory.
const MACHINES: [(&str, &str, Option<u64>); 3] = [
    ("microvm", ",pcie=on", Some(0xe000_0000)),
    ("pc", "", None),
    ("q35", "", None),
];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    for (machine, options, ecam) in MACHINES {
        for container in ["legacy", "iommufd"] {
            scenario.prefix(&format!("{machine}, {container}: "));
            let passthrough = match container {
                "legacy" => format!("vfio-pci,host={device}"),
                _ => format!("vfio-pci,host={device},iommufd=iommufd0"),
            };
            let more = [
                "-object",
                "iommufd,id=iommufd0",
                "-device",
                passthrough.as_str(),
            ];
            let mut port = start(scenario, machine, options, ecam, &more)?;
            device_follows(scenario, &mut port)?;
            scenario.fact("a device after the rebuild", "reaches the new memory");
        }
    }
    Ok(())
}

fn start(
    scenario: &Scenario,
    machine: &str,
    options: &str,
    ecam: Option<u64>,
    more: &[&str],
) -> Result<TestPort, Failure> {
    let machine =
        format!("{machine},accel=kvm,memory-backend=ram0,x-change-vmfd-on-reset=on{options}");
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}");
    let size = format!("{}M", RAM_BYTES / MIB);
    let mut all = vec!["-object", &object, "-machine", &machine, "-m", &size];
    // Nothing of it runs; not every machine's own is in the lab.
    all.extend(["-bios", "bios-256k.bin"]);
    all.extend(more);
    TestPort::start(scenario.directory(), &all, ecam)
}

fn rebuild(scenario: &Scenario, port: &mut TestPort) -> Outcome {
    let qmp = &mut port.machine.qmp;
    while qmp.events_waiting("RESET") > 0 {
        qmp.event("RESET", Duration::ZERO)?;
    }
    qmp.execute("system_reset", json!({}))?;
    qmp.event("RESET", RESET_PATIENCE)?;
    let status = qmp.execute("query-status", json!({}))?;
    scenario.check_equal(
        status["status"].as_str(),
        Some("prelaunch"),
        "what a VM is that was rebuilt before it ran",
    )
}

fn page(seed: u64) -> Vec<u8> {
    (0..PAGE)
        .step_by(8)
        .flat_map(|at| pattern(seed, at).to_le_bytes())
        .collect()
}

/// The device carries pages before the VM is rebuilt, and twice afterwards, and they arrive where QEMU reads.
fn device_follows(scenario: &mut Scenario, port: &mut TestPort) -> Outcome {
    let mut seed = 1;
    for time in ["before", "after one rebuild", "after two"] {
        if time != "before" {
            rebuild(scenario, port)?;
        }
        let slot = port.slot(0x11e8_1234)?;
        port.enable(slot, REGISTERS as u32)?;
        for (from, to) in PLACES {
            let old = port.read(to, PAGE as usize)?;
            scenario.check(
                old.iter().all(|byte| *byte == 0),
                format!("{time}: the page at {to:#x} is new"),
            )?;
            port.write(from, &page(seed))?;
            carry(port, from, 0x4_0000, 1)?;
            carry(port, 0x4_0000, to, 3)?;
            let found = port.read(to, PAGE as usize)?;
            scenario.check(
                found == page(seed),
                format!("{time}: the device carries what is at {from:#x} to {to:#x}"),
            )?;
            seed += 1;
        }
    }
    Ok(())
}

/// edu: a page between guest memory and the device's buffer.
fn carry(port: &mut TestPort, from: u64, to: u64, command: u64) -> Outcome {
    port.write_u64(REGISTERS + 0x80, from)?;
    port.write_u64(REGISTERS + 0x88, to)?;
    port.write_u64(REGISTERS + 0x90, PAGE)?;
    port.write_u64(REGISTERS + 0x98, command)?;
    port.wait("the edu device's DMA", |port| {
        Ok(port.read_u64(REGISTERS + 0x98)? & 1 == 0)
    })
}
