// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that a guest gives back, page by page, private and shared, by balloon and by free-page report. The host has it
//! then, attributes are as before, and the pages work again. Beside a passed-through device nothing is taken away.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::Failure;
use crate::host::passthrough::{to_vfio, EDU};
use crate::host::{kernel, pages};
use crate::scenario::{Outcome, Scenario};
use crate::virtio::{Buffer, Device, BALLOON};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(60);
const BALLOON_DEVICE: &str = "virtio-balloon-pci,id=balloon0";

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    page_by_page(scenario)?;
    beside_a_device(scenario)
}

/// Bytes of guest memory on the host, of whatever file; nothing else of the lab takes much meanwhile.
fn held() -> Result<u64, Failure> {
    Ok(pages::outside_shmem()? + pages::count("nr_shmem")? * PAGE)
}

/// Where the payload's device has its queue, and what it names.
const RINGS: u64 = 16 * MIB;
const NUMBERS: u64 = 17 * MIB;
const PRIVATE: u64 = 32 * MIB;
const SHARED: u64 = 64 * MIB;
const PRIVATE_BYTES: u64 = 12 * MIB;
const SHARED_BYTES: u64 = 6 * MIB;
/// Pages of both kinds in turn.
const MIXED: u64 = 80 * MIB;
const MIXED_PAGES: u64 = 64;
const REPORTING: u64 = 1 << 5;

fn device(queue: u64) -> Device {
    Device {
        kind: BALLOON,
        index: 0,
        queue,
        rings: RINGS,
    }
}

/// Has the balloon take pages; the device answers.
fn inflate(scenario: &Scenario, guest: &mut Confidential, ranges: &[(u64, u64)]) -> Outcome {
    let device = device(0);
    device.start(&mut guest.monitor, 0)?;
    for &(gpa, bytes) in ranges {
        let count = bytes / PAGE;
        guest.monitor.ask(&format!(
            "page-numbers {NUMBERS:#x} {:#x} {count}",
            gpa / PAGE
        ))?;
        let numbers = Buffer::read(NUMBERS, 4 * count);
        let offered = device.offer(&mut guest.monitor, &[numbers])?;
        scenario.check(
            device.wait(&mut guest.monitor, offered, PATIENCE)?,
            format!("the balloon takes {bytes:#x} bytes at {gpa:#x}"),
        )?;
    }
    Ok(())
}

/// Reports the same as free, as a confidential guest's Linux would.
fn report(scenario: &Scenario, guest: &mut Confidential, ranges: &[(u64, u64)]) -> Outcome {
    // Behind the queues for inflating, deflating and statistics.
    let device = device(3);
    let offered = device.start(&mut guest.monitor, REPORTING)?;
    scenario.check(offered & REPORTING != 0, "free-page reporting is offered")?;
    let buffers: Vec<_> = ranges
        .iter()
        .map(|&(gpa, bytes)| Buffer::written(gpa, bytes))
        .collect();
    let offered = device.offer(&mut guest.monitor, &buffers)?;
    scenario.check(
        device.wait(&mut guest.monitor, offered, PATIENCE)?,
        "the device answers a report of private and shared pages",
    )
}

/// Memory of both kinds is there; it is given back, reads zero, and works.
fn gives_back(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    how: &str,
    give: impl FnOnce(&Scenario, &mut Confidential, &[(u64, u64)]) -> Outcome,
) -> Outcome {
    let mixed = 2 * MIXED_PAGES * PAGE;
    let ranges = [
        (PRIVATE + MIB, PRIVATE_BYTES),
        (SHARED + MIB, SHARED_BYTES),
        (MIXED, mixed),
    ];
    for (gpa, bytes) in [(PRIVATE, 16 * MIB), (SHARED, 8 * MIB), (MIXED, 2 * mixed)] {
        guest.fill(gpa, bytes, 5)?;
    }
    guest.agree(scenario, &format!("before {how}"))?;
    let before = (guest.private_allocated()?, guest.shared[0].allocated()?);
    give(scenario, guest, &ranges)?;
    let after = (guest.private_allocated()?, guest.shared[0].allocated()?);
    let all: u64 = ranges.iter().map(|(_, bytes)| bytes).sum();
    let back = match guest.in_place {
        true => before.0 - after.0.min(before.0),
        false => before.0 + before.1 - (after.0 + after.1).min(before.0 + before.1),
    };
    scenario.fact(&format!("{how}: bytes that the host has back"), back);
    // The rings and what QEMU wrote there may be new.
    scenario.check(
        back <= all && back + 16 * PAGE >= all,
        format!("{how}: of {all} bytes the host has {back} back"),
    )?;
    for (gpa, bytes) in ranges {
        guest.ledger.forget(gpa, bytes);
    }
    guest.agree_but_kernel(scenario, &format!("{how}: attributes and what was kept"))?;
    for (gpa, bytes) in ranges {
        guest.expect_zeros(scenario, gpa, bytes)?;
        guest.fill(gpa, bytes, 6)?;
    }
    guest.agree(scenario, &format!("{how}: in use again"))
}

fn page_by_page(scenario: &mut Scenario) -> Outcome {
    let mut guest = Confidential::with_one_block(
        &scenario.directory().join("pages"),
        128 * MIB,
        "",
        &[
            "-device",
            &format!("{BALLOON_DEVICE},free-page-reporting=on"),
        ],
    )?;
    guest.convert(scenario, PRIVATE, 16 * MIB, true)?;
    for page in 0..MIXED_PAGES {
        guest.convert(scenario, MIXED + 2 * page * PAGE, PAGE, true)?;
    }
    gives_back(scenario, &mut guest, "ballooned", inflate)?;
    gives_back(scenario, &mut guest, "reported", report)?;
    // Whole ranges: few runs, as the kernel likes a file best that is closed.
    guest.convert(scenario, MIXED, 2 * MIXED_PAGES * PAGE, false)?;
    guest.convert(scenario, PRIVATE, 16 * MIB, false)?;
    inflate(scenario, &mut guest, &[(PRIVATE, 16 * MIB)])?;
    guest.convert(scenario, PRIVATE, 16 * MIB, true)?;
    guest.fill(PRIVATE, 16 * MIB, 8)?;
    guest.agree(scenario, "converted after it was ballooned")?;
    // What is no RAM, half of it, or none at all.
    inflate(
        scenario,
        &mut guest,
        &[(0xfed0_0000, 2 * PAGE), (128 * MIB - PAGE, 2 * PAGE)],
    )?;
    report(
        scenario,
        &mut guest,
        &[
            (0xfed0_0000, PAGE),
            (128 * MIB - PAGE, 4 * PAGE),
            (SHARED + 8, PAGE),
        ],
    )?;
    guest.monitor.ask("ping")?;
    scenario.fact("what QEMU said", guest.machine.complaints());
    guest.agree(scenario, "after senseless balloons")?;
    guest.finish(scenario)
}

/// Beside a passed-through device nothing is discarded: it would go on with the old page.
fn beside_a_device(scenario: &mut Scenario) -> Outcome {
    let device = to_vfio(&EDU)?;
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut guest = Confidential::with_one_block(
        &scenario.directory().join("device"),
        128 * MIB,
        "",
        &[
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            &passthrough,
            "-device",
            BALLOON_DEVICE,
        ],
    )?;
    let engine = Engine::new(0, 24 * MIB);
    guest.convert(scenario, PRIVATE, 2 * MIB, true)?;
    guest.fill(PRIVATE, 2 * MIB, 1)?;
    guest.fill(SHARED, 2 * MIB, 2)?;
    engine.reaches(scenario, &mut guest, SHARED)?;
    // What the private pages had before goes in any case.
    guest.settle()?;
    let before = held()?;
    inflate(
        scenario,
        &mut guest,
        &[(PRIVATE, 2 * MIB), (SHARED, 2 * MIB)],
    )?;
    let after = held()?;
    scenario.check(
        after + 16 * PAGE >= before,
        format!("nothing is taken away beside a device: {before} bytes on the host, then {after}"),
    )?;
    guest.agree(scenario, "ballooned beside a device")?;
    engine.reaches(scenario, &mut guest, SHARED)?;
    let in_place = kernel::in_place();
    scenario.fact("a balloon beside a device, in place", in_place);
    guest.finish(scenario)
}
