// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two processors convert single pages of one block to and fro, each in its half, beside a device: whether the memory that pages
//! had is freed at once, a moment later or much later. No request is refused, no page is lost to the device, pages have memory
//! twice only as far as QEMU knows and its bound allows, and in the end not at all.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::{Attempt, Failure};
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::PAGE;
use crate::monitor::number;
use crate::monitor::sequence::WorkingSet;
use crate::qmp::Gmem;
use crate::release::Release;
use crate::scenario::{Outcome, Scenario};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const ORIGIN: u64 = 16 * MIB;
const FIRST: WorkingSet = WorkingSet {
    address: 64 * MIB,
    region_pages: 1 << 12,
    set: 256,
    spread: 1,
};
const HALF_BYTES: u64 = FIRST.region_pages * PAGE;
const SECOND: WorkingSet = WorkingSet {
    address: FIRST.address + HALF_BYTES,
    ..FIRST
};
/// Of each processor, to private and back.
const TURNS: u64 = 400;
/// Less than the pages of both sets, so that it is reached.
const MOST_BYTES: u64 = MIB;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    for release in Release::ALL {
        scenario.prefix(&format!("{}: ", release.name()));
        once(scenario, &device, release)?;
    }
    scenario.prefix("");
    Ok(())
}

fn of_block(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number(name)
}

fn once(scenario: &mut Scenario, device: &str, release: Release) -> Outcome {
    let directory = scenario.directory().join(release.name());
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut properties = release.property().to_string();
    if release != Release::AtOnce {
        properties += &format!(",release-max={MOST_BYTES}");
    }
    let more = [
        "-smp",
        "2",
        "-object",
        "iommufd,id=iommufd0",
        "-device",
        &passthrough,
    ];
    let mut guest = Confidential::with_one_block(&directory, RAM_BYTES, &properties, &more)?;
    let engine = Engine::new(0, ORIGIN);
    guest.fill(FIRST.address, 2 * HALF_BYTES, 1)?;
    guest.agree(scenario, "at start")?;

    let WorkingSet {
        address,
        region_pages,
        set,
        spread,
    } = FIRST;
    let churn = format!("bench-two {address:#x} {region_pages} {set} {TURNS} 7");
    let begun = guest.monitor.begin(&churn)?;
    let mut most = 0;
    while of_block(&mut guest, "to-shared")? < TURNS {
        most = most.max(of_block(&mut guest, "double-bytes")?);
    }
    let answer = guest.monitor.end(begun)?;
    let (requests, refused) = (number(answer.first())?, number(answer.get(1))?);
    scenario.fact("requests", requests);
    scenario.check_equal(requests, 4 * TURNS, "requests of both processors")?;
    scenario.check_equal(refused, 0, "requests that were refused")?;
    guest.ledger.forget(FIRST.address, 2 * HALF_BYTES);
    shared_for_all(scenario, &mut guest)?;
    scenario.fact("bytes held twice at most", most);
    scenario.check(
        most <= MOST_BYTES,
        format!("release-max bounds what pages have twice: {most} of {MOST_BYTES} bytes"),
    )?;
    let cancelled = of_block(&mut guest, "releases-cancelled")?;
    scenario.fact("releases taken back", cancelled);
    scenario.check_equal(
        cancelled > 0,
        release != Release::AtOnce,
        "whether pages that came back at once had their memory still",
    )?;

    // Both sets private, all at once: each page has memory twice then, as long as that may last.
    for half in [FIRST, SECOND] {
        let turned = format!(
            "bench-once {:#x} {region_pages} {set} {spread} 1",
            half.address
        );
        let refused = number(guest.monitor.ask(&turned)?.get(1))?;
        scenario.check_equal(refused, 0, "requests that were refused, to private")?;
        for index in 0..set {
            guest.ledger.convert(half.page(index), PAGE, true);
        }
    }
    // Touched, so that they have private memory, too.
    let all = 2 * HALF_BYTES;
    guest
        .monitor
        .ask(&format!("bench-touch {address:#x} {all:#x}"))?;
    let double = of_block(&mut guest, "double-bytes")?;
    scenario.fact("bytes held twice with both sets private", double);
    scenario.check(
        double <= MOST_BYTES && (double > 0) == (release == Release::Late)
            || release == Release::Soon,
        format!("pages have memory twice as long as the delay says: {double} bytes"),
    )?;
    guest.agree(scenario, "both sets private")?;
    engine.misses(scenario, &mut guest, FIRST.page(3), ORIGIN + 2 * PAGE)?;
    guest.settle()?;
    guest.agree(scenario, "all that was held twice is freed")?;

    for half in [FIRST, SECOND] {
        let turned = format!(
            "bench-once {:#x} {region_pages} {set} {spread} 0",
            half.address
        );
        let refused = number(guest.monitor.ask(&turned)?.get(1))?;
        scenario.check_equal(refused, 0, "requests that were refused, to shared")?;
        for index in 0..set {
            guest.ledger.convert(half.page(index), PAGE, false);
        }
    }
    shared_for_all(scenario, &mut guest)?;
    engine.reaches(scenario, &mut guest, SECOND.page(5))?;
    guest.agree(scenario, "all shared again")?;
    scenario.fact("agreements", guest.agreements);
    guest.finish(scenario)
}

/// All memory is shared, and the device reaches it.
fn shared_for_all(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    for name in ["shared", "dma-mapped"] {
        let bytes = of_block(guest, name)?;
        scenario.check_equal(bytes, RAM_BYTES, format!("query-gmem's {name}"))?;
    }
    let quarantined = of_block(guest, "quarantined")?;
    scenario
        .check_equal(quarantined, 0, "query-gmem's quarantined")
        .attempt(|| "all memory is shared".into())
}
