// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who has guest memory pinned when the VM is rebuilt gets the new pages: devices on iommufd and in VFIO containers
//! without it, and a vDPA device. On machines with PAM registers and on one without: where the firmware moves RAM about, what is
//! stale may be mapped anew by chance. Who comes while there is no memory, since a rebuild failed, is told to come later.

use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::faults::Faults;
use crate::host::passthrough::{to_vfio, EDU, NVME};
use crate::host::vdpa;
use crate::ledger::PAGE;
use crate::monitor::protocol::pattern;
use crate::rebuilt::{reset, status, MIB};
use crate::scenario::{Outcome, Scenario};
use crate::test_disk::TestDisk;
use crate::test_port::TestPort;
use serde_json::json;
use std::fs;

const RAM_BYTES: u64 = 64 * MIB;
/// Of a disk's rings; of the page that it carries.
const RINGS: u64 = 32 * MIB;
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
    let disk = vdpa::disk()?;
    for machine in ["pc", "q35"] {
        scenario.prefix(&format!("{machine}, vdpa: "));
        disk_follows(scenario, machine, &disk)?;
        scenario.fact("a disk after the rebuild", "reaches the new memory");
    }
    scenario.prefix("while memory is lost: ");
    nobody_comes(scenario, &device, &disk)
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

/// Rebuilds the VM, which is in this state then.
pub(super) fn rebuild(scenario: &Scenario, port: &mut TestPort, state: &str) -> Outcome {
    reset(&mut port.machine)?;
    scenario.check_equal(
        status(&mut port.machine)?.as_str(),
        state,
        "the VM's state after its reset",
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
            rebuild(scenario, port, "prelaunch")?;
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

/// A disk behind vhost-vdpa works right after each rebuild. By default the kernel's simulation goes by QEMU's addresses and pins
/// nothing: this shows that vhost starts anew in the new memory, and is no test of who lets go of pages. It works only
/// while the VM runs, whose processor halts at once.
fn disk_follows(scenario: &mut Scenario, machine: &str, disk: &str) -> Outcome {
    let firmware = scenario.directory().join("halt.bin");
    // At 0xffff0: cli; hlt; jmp to the hlt.
    let mut code = vec![0u8; 64 << 10];
    code[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    fs::create_dir_all(scenario.directory()).attempt(|| "making a directory".into())?;
    fs::write(&firmware, code).attempt(|| format!("writing {}", firmware.display()))?;
    let device = format!("vhost-vdpa-device-pci-transitional,vhostdev={disk}");
    let more = ["-device", &device, "-bios", &firmware.to_string_lossy()];
    let mut port = start(scenario, machine, "", None, &more)?;
    port.machine.qmp.execute("cont", json!({}))?;
    let mut seed = 51;
    for time in ["after one rebuild", "after two"] {
        rebuild(scenario, &mut port, "running")?;
        let mut driver = TestDisk::start(&mut port, RINGS)?;
        for (from, to) in PLACES {
            let old = port.read(to, PAGE as usize)?;
            scenario.check(
                old.iter().all(|byte| *byte == 0),
                format!("{time}: the page at {to:#x} is new"),
            )?;
            port.write(from, &page(seed))?;
            driver
                .carry(&mut port, from, true)
                .and_then(|()| driver.carry(&mut port, to, false))
                .attempt(|| format!("{time}, {from:#x} to {to:#x}"))?;
            let found = port.read(to, PAGE as usize)?;
            scenario.check(
                found == page(seed),
                format!("{time}: the disk carries what is at {from:#x} to {to:#x}"),
            )?;
            seed += 1;
        }
    }
    Ok(())
}

/// A rebuild failed for want of memory, and zeros stand in for the guest's: nobody is to pin those. Who was there before, and who
/// comes afterwards, reaches the memory of the next VM.
fn nobody_comes(scenario: &mut Scenario, device: &str, disk: &str) -> Outcome {
    let more = ["-object", "iommufd,id=iommufd0"];
    let mut port = start(scenario, "pc", "", None, &more)?;
    {
        let faults = Faults::under("kvm_gmem_create")?;
        faults.fail_nth(port.machine.pid(), 1)?;
        rebuild(scenario, &mut port, "internal-error")?;
    }
    let complaints = port.machine.complaints();
    scenario.check(
        complaints.contains("memory is lost"),
        format!("the guest's memory is lost: {complaints}"),
    )?;
    let legacy = json!({"driver": "vfio-pci", "id": "legacy", "host": device});
    let requests = [
        ("device_add", legacy.clone()),
        (
            "device_add",
            json!({"driver": "vfio-pci", "id": "iommufd", "host": device, "iommufd": "iommufd0"}),
        ),
        (
            "device_add",
            json!({"driver": "vhost-vdpa-device-pci-transitional", "id": "vdpa", "vhostdev": disk}),
        ),
        (
            "blockdev-add",
            json!({"driver": "nvme", "node-name": "nvme", "device": to_vfio(&NVME)?, "namespace": 1}),
        ),
    ];
    for (command, arguments) in requests {
        let answer = port.machine.qmp.try_execute(command, arguments.clone())?;
        let refusal = answer.err().map(|refusal| refusal.description);
        scenario.check(
            refusal
                .as_ref()
                .is_some_and(|text| text.contains("memory is lost")),
            format!("{command} {arguments} is refused while memory is lost: {refusal:?}"),
        )?;
        scenario.fact(
            &format!(
                "{command} of {}",
                arguments["driver"].as_str().unwrap_or_default()
            ),
            refusal,
        );
    }
    rebuild(scenario, &mut port, "prelaunch")?;
    port.machine.qmp.execute("device_add", legacy)?;
    device_follows(scenario, &mut port)
}
