// SPDX-License-Identifier: MIT OR Apache-2.0
//! A controller that QEMU drives by itself (nvme://) reads into guest memory, which it has pinned by address: before the
//! VM is rebuilt, and twice afterwards, the bytes arrive where QEMU, and so the guest, finds them.

use super::rebuild_pins::rebuild;
use crate::boot::CommandLine;
use crate::failure::Failure;
use crate::host::passthrough::{to_vfio, NVME};
use crate::ledger::PAGE;
use crate::scenario::{Outcome, Scenario};
use crate::test_port::TestPort;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
/// Below what firmware and chipset move about, and above.
const PLACES: [u64; 2] = [0x3_0000, 25 * MIB];
/// The disk's first bytes are random.
const SECTORS: u64 = PAGE / 512;
const RINGS: u64 = 16 * MIB;
const HEADER: u64 = 17 * MIB;
const STATUS: u64 = 18 * MIB;
/// Ports of the disk as the guest would see it: a legacy virtio device, which is the shortest to drive.
const PORTS: u64 = 0xc000;
const QUEUE_PAGE: u64 = PORTS + 8;
const QUEUE_SIZE: u64 = PORTS + 12;
const QUEUE_NOTIFY: u64 = PORTS + 16;
const DEVICE_STATUS: u64 = PORTS + 18;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&NVME)?;
    let drive = format!("if=none,id=disk0,file=nvme://{device}/1");
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}");
    let size = format!("{}M", RAM_BYTES / MIB);
    let mut port = TestPort::start(
        scenario.directory(),
        &[
            "-object",
            &object,
            "-machine",
            "pc,accel=kvm,memory-backend=ram0,x-change-vmfd-on-reset=on",
            "-m",
            &size,
            "-drive",
            &drive,
            "-device",
            "virtio-blk-pci,drive=disk0,disable-modern=on,disable-legacy=off,ioeventfd=off",
        ],
        None,
    )?;
    let mut first = Vec::new();
    for time in ["before", "after one rebuild", "after two"] {
        if time != "before" {
            rebuild(scenario, &mut port, "prelaunch")?;
        }
        let slot = port.slot(0x1001_1af4)?;
        port.enable(slot, PORTS as u32)?;
        for (index, place) in (0..).zip(PLACES) {
            let old = port.read(place, PAGE as usize)?;
            scenario.check(
                old.iter().all(|byte| *byte == 0),
                format!("{time}: the page at {place:#x} is new"),
            )?;
            scenario.check_equal(
                read_disk(&mut port, index * SECTORS, place)?,
                0,
                format!("{time}: the status of a read"),
            )?;
            let found = port.read(place, PAGE as usize)?;
            scenario.check(
                found.iter().any(|byte| *byte != 0),
                format!("{time}: what the controller reads arrives at {place:#x}"),
            )?;
            if time == "before" {
                first.push(found);
            } else {
                scenario.check(
                    first[index as usize] == found,
                    format!("{time}: the controller reads what it read before to {place:#x}"),
                )?;
            }
        }
        scenario.fact(&format!("pages read, {time}"), PLACES.len());
    }
    scenario.check(first[0] != first[1], "two parts of the disk differ")
}

/// A page from `sector` of the disk to `place`; the status that the device gives.
fn read_disk(port: &mut TestPort, sector: u64, place: u64) -> Result<u8, Failure> {
    const WRITE_AND_NEXT: u64 = 3;
    const WRITE: u64 = 2;
    const NEXT: u64 = 1;
    for status in [0, 1, 3] {
        port.port_out(DEVICE_STATUS, 1, status)?;
    }
    let size = port.port_in(QUEUE_SIZE, 2)?;
    let available = RINGS + 16 * size;
    let used = RINGS + (16 * size + 6 + 2 * size).next_multiple_of(PAGE);
    port.write(RINGS, &vec![0; (used + PAGE - RINGS) as usize])?;
    port.port_out(QUEUE_PAGE, 4, RINGS / PAGE)?;
    port.port_out(DEVICE_STATUS, 1, 7)?;
    let buffers = [
        (HEADER, 16, NEXT),
        (place, PAGE, WRITE_AND_NEXT),
        (STATUS, 1, WRITE),
    ];
    for (index, (address, bytes, flags)) in (0..).zip(buffers) {
        port.write_u64(RINGS + 16 * index, address)?;
        port.write_u64(
            RINGS + 16 * index + 8,
            bytes | flags << 32 | (index + 1) << 48,
        )?;
    }
    port.write_u64(HEADER, 0)?;
    port.write_u64(HEADER + 8, sector)?;
    port.write(STATUS, &[0xff])?;
    // One buffer is available: the first.
    port.write_u64(available, 1 << 16)?;
    port.port_out(QUEUE_NOTIFY, 2, 0)?;
    port.wait("the disk's answer", |port| {
        Ok(port.read_u64(used)? >> 16 & 0xffff == 1)
    })?;
    Ok(port.read(STATUS, 1)?[0])
}
