// SPDX-License-Identifier: MIT OR Apache-2.0
//! A DMA engine passed through to a confidential guest: what it writes to a shared page arrives, a private page it
//! can't reach, and the same page shared again it can.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::host::memory::{backing, overlap, threads};
use crate::host::messages::Messages;
use crate::host::tracing::{Ioctls, IOMMU_IOAS_MAP, IOMMU_IOAS_MAP_FILE, IOMMU_IOAS_UNMAP};
use crate::ledger::PAGE;
use crate::machine::Surroundings;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
/// Where the device reads from, and where it writes. All below the device's own address mask.
const SOURCE: u64 = 16 * MIB;
const TARGET: u64 = 32 * MIB + 7 * PAGE;
const ELSEWHERE: u64 = 48 * MIB;
const FAULT_PATIENCE: Duration = Duration::from_secs(30);
/// What the library maps by file to try a cut, once.
const SCRATCH_MAPS: u64 = 2;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let ioctls = Ioctls::start()?;
    let mut guest =
        Confidential::with_one_device(scenario.directory(), RAM_BYTES, Surroundings::default())?;
    guest.patient = true;
    guest.machine.is_silent()?;
    scenario.progress("device plugged in, guest up");

    guest.fill(SOURCE, PAGE, 1)?;
    arrives(scenario, &mut guest, TARGET, "shared")?;
    blocked(scenario, &mut guest)?;

    guest.convert(scenario, TARGET, PAGE, false)?;
    guest.expect_fresh(scenario, TARGET, PAGE)?;
    arrives(scenario, &mut guest, TARGET, "shared again")?;
    guest.agree(scenario, "shared again")?;

    if ioctls.count() {
        by_one_path_only(scenario, &mut guest, &ioctls)?;
    }
    guest.finish(scenario)
}

/// The device carries a page from SOURCE to `target`.
fn arrives(scenario: &mut Scenario, guest: &mut Confidential, target: u64, state: &str) -> Outcome {
    guest.monitor.zero(target, PAGE)?;
    guest.monitor.edu_load(SOURCE)?;
    guest.monitor.edu_store(target)?;
    let difference = guest.monitor.check_copy(target, PAGE, 1, SOURCE)?;
    scenario.fact(
        &format!("dma to the page while {state}"),
        match &difference {
            None => "arrives",
            Some(_) => "does not arrive",
        },
    );
    scenario.check_equal(
        difference,
        None,
        format!("DMA to {target:#x} arrives while it is {state}"),
    )?;
    // The copy is not the pattern of its own address; the ledger must not expect it there.
    guest.fill(target, PAGE, 2)
}

fn blocked(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    let mut messages = Messages::from_now()?;
    let mapped_before = Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number("dma-mapped")?;
    guest.convert(scenario, TARGET, PAGE, true)?;
    guest.expect_fresh(scenario, TARGET, PAGE)?;
    guest.fill(TARGET, PAGE, 3)?;
    let mapped = Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number("dma-mapped")?;
    scenario.check_equal(
        mapped_before - mapped,
        PAGE,
        "bytes that the conversion took from the device",
    )?;

    guest.monitor.edu_load(SOURCE)?;
    guest.monitor.edu_store(TARGET)?;
    let changed = guest.monitor.check(TARGET, PAGE, 3)?;
    scenario.fact(
        "dma to the page while private",
        changed.as_deref().unwrap_or("page untouched"),
    );
    scenario.check_equal(changed, None, "DMA leaves the private page untouched")?;
    if !guest.in_place {
        // What the page left is freed a moment later.
        guest.settle()?;
        let landed = overlap(&guest.shared[0].extents()?, &(TARGET..TARGET + PAGE));
        scenario.fact("memfd_bytes_behind_the_private_page", landed);
        scenario.check_equal(landed, 0, "memfd bytes behind the private page after DMA")?;
    }
    guest.agree(scenario, "after DMA to a private page")?;
    let address = format!("{TARGET:#x}");
    let fault = messages.find(&["DMAR", &address], FAULT_PATIENCE)?;
    scenario.fact("iommu_fault", fault.clone().unwrap_or_default());
    scenario.check(
        fault.is_some(),
        format!("the IOMMU reports a fault at {address}"),
    )?;

    // Reading is blocked as well: whatever the device's buffer holds now, it is not the private page.
    guest.monitor.edu_load(TARGET)?;
    guest.monitor.edu_store(ELSEWHERE)?;
    let stolen = guest.monitor.check_copy(ELSEWHERE, PAGE, 3, TARGET)?;
    scenario.fact(
        "dma from the page while private",
        match stolen {
            Some(_) => "blocked",
            None => "the device read it",
        },
    );
    scenario.check(stolen.is_some(), "the device can't read the private page")?;

    for neighbour in [TARGET - PAGE, TARGET + PAGE] {
        arrives(scenario, guest, neighbour, "shared beside a private one")?;
    }
    Ok(())
}

/// RAM went to the device by file and offset, or by address, as the kernel saw it, and never by both. Of a memfd the kernel
/// always takes the file; a guest_memfd's it may refuse.
fn by_one_path_only(scenario: &mut Scenario, guest: &mut Confidential, ioctls: &Ioctls) -> Outcome {
    let pid = guest.machine.pid();
    let calls = ioctls.by_command(&threads(pid)?)?;
    let count = |command| calls.get(&command).copied().unwrap_or(0);
    scenario.fact("kernel_map_file_calls", count(IOMMU_IOAS_MAP_FILE));
    scenario.fact("kernel_map_address_calls", count(IOMMU_IOAS_MAP));
    scenario.fact("kernel_unmap_calls", count(IOMMU_IOAS_UNMAP));
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let block = gmem.block("ram0")?;
    for name in [
        "map-file-calls",
        "map-address-calls",
        "unmap-calls",
        "dma-mapped",
        "dma-areas",
    ] {
        scenario.fact(&format!("query_{name}"), block.number(name)?);
    }
    let path = block.text("dma-path")?;
    scenario.fact("dma_path", path);
    scenario.fact("dma_strategy", block.text("dma-strategy")?);
    scenario.check_equal(block.text("dma-strategy")?, "cut", "the DMA strategy")?;
    let ram = backing(pid, RAM_BYTES)?;
    let by_address = ioctls
        .maps_by_address()?
        .iter()
        .filter(|map| map.touches(&ram.addresses))
        .count() as u64;
    scenario.fact("kernel_maps_of_ram_by_address", by_address);
    if path == "address" && guest.in_place {
        scenario.check_equal(
            block.number("map-file-calls")?,
            0,
            "query-gmem's map-file-calls",
        )?;
        return scenario.check_equal(
            by_address,
            block.number("map-address-calls")?,
            "IOMMU_IOAS_MAP calls whose addresses lie in RAM, and query-gmem's map-address-calls",
        );
    }
    scenario.check_equal(path, "fd", "the DMA path")?;
    let files = block.number("map-file-calls")?;
    let counted = count(IOMMU_IOAS_MAP_FILE);
    scenario.check(counted > 0, "RAM is mapped by file")?;
    // What was tried is counted by the kernel alone: a cut, on pages of no meaning, and in place whether the kernel takes a
    // guest_memfd's file.
    let used = counted.saturating_sub(SCRATCH_MAPS);
    scenario.check(
        files > 0 && (used == files || guest.in_place && used > files),
        format!(
            "IOMMU_IOAS_MAP_FILE calls: {counted} by the kernel's count, {files} by query-gmem"
        ),
    )?;
    scenario.check_equal(
        block.number("map-address-calls")?,
        0,
        "query-gmem's map-address-calls",
    )?;
    scenario.check_equal(
        by_address,
        0,
        "IOMMU_IOAS_MAP calls whose addresses lie in RAM",
    )
}
