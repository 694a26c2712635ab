// SPDX-License-Identifier: MIT OR Apache-2.0
//! The memory of SNP and TDX guests, which starts private: of two NUMA nodes, one of them preallocated, with a module that comes
//! and goes; and in huge pages of 2 MiB and of 1 GiB, none of which a launch takes, keeps or splits for the pages that it adds.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::host::huge_pages::Pool;
use crate::host::nodes;
use crate::ledger::{Block, PAGE};
use crate::plugging::Module;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use crate::tee::{Host, Launch};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = Host::of(scenario)?;
    scenario.prefix("two nodes: ");
    two_nodes(scenario, &host)?;
    scenario.prefix("2 MiB: ");
    small_huge_pages(scenario, &host)?;
    scenario.prefix("1 GiB: ");
    large_huge_page(scenario, &host)
}

/// Bytes in guest_memfds by node.
fn in_guest_memfds() -> Result<[u64; 2], Failure> {
    Ok([nodes::outside_shmem(0)?, nodes::outside_shmem(1)?])
}

fn number(guest: &mut Confidential, block: &str, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block(block)?
        .number(name)
}

fn two_nodes(scenario: &mut Scenario, host: &Host) -> Outcome {
    const RAM0_BYTES: u64 = 64 * MIB;
    const RAM1_BYTES: u64 = 32 * MIB;
    const BORDER: u64 = RAM0_BYTES;
    const EACH: u64 = 2 * MIB;
    const MODULE: Module = Module {
        device: "dimm0",
        backend: "mem1",
        bytes: 16 * MIB,
    };
    let ram0 = format!("memory-backend-gmem,id=ram0,size={RAM0_BYTES},host-nodes=0,policy=bind");
    let ram1 = format!(
        "memory-backend-gmem,id=ram1,size={RAM1_BYTES},host-nodes=1,policy=bind,prealloc=on,prealloc-threads=2"
    );
    let before = in_guest_memfds()?;
    let mut guest = Launch::new(host, 0)
        .blocks(
            vec![
                Block::small("ram0", RAM0_BYTES),
                Block::small("ram1", RAM1_BYTES),
            ],
            RAM0_BYTES + RAM1_BYTES,
        )
        .arguments(&["-object", &ram0, "-object", &ram1])
        .arguments(&["-numa", "node,nodeid=0,memdev=ram0"])
        .arguments(&["-numa", "node,nodeid=1,memdev=ram1"])
        .arguments(&["-m", "slots=2,maxmem=1G"])
        .start(&scenario.directory().join("nodes"))?;
    let held = in_guest_memfds()?[1].saturating_sub(before[1]);
    scenario.fact("private bytes on node 1 at the start", held);
    // Firmware and ROMs are QEMU's own, on whichever node.
    scenario.check(
        (RAM1_BYTES..RAM1_BYTES + 2 * MIB).contains(&held),
        format!("what is preallocated is there, and private: {held} bytes on node 1"),
    )?;
    guest.agree(scenario, "at the start")?;

    guest.convert(scenario, BORDER - EACH, 2 * EACH, false)?;
    guest.fill(BORDER - EACH, 2 * EACH, 1)?;
    for (block, offset, node) in [(0, BORDER - EACH, 0), (1, 0, 1)] {
        let pages = nodes::of_pages(&guest.shared[block], offset..offset + EACH)?;
        let mut expected = [0; 2];
        expected[node] = EACH / PAGE;
        scenario.check_equal(pages, expected, "nodes of what is shared on the border")?;
    }
    guest.agree(scenario, "shared on both sides of the border")?;

    MODULE.plug(&mut guest)?;
    let gpa = MODULE.is_there(&mut guest)?;
    scenario.fact("address", format!("{gpa:#x}"));
    let bytes = MODULE.bytes;
    scenario.check_equal(
        number(&mut guest, "mem1", "private")?,
        bytes,
        "private bytes of what was plugged",
    )?;
    guest.convert(scenario, gpa + EACH, EACH + PAGE, false)?;
    guest.fill(gpa + EACH, EACH + PAGE, 2)?;
    guest.agree(scenario, "a part of what was plugged is shared")?;
    MODULE.unplug(&mut guest)?;
    guest.agree(scenario, "after unplugging")?;
    guest.convert(scenario, BORDER - EACH, 2 * EACH, true)?;
    guest.agree(scenario, "private again")?;
    guest.finish(scenario)
}

/// How many huge pages of a block are whole, and how many in pieces; or, where private bytes are elsewhere, how many there are.
fn huge_pages(guest: &mut Confidential, block: &str) -> Result<(u64, u64), Failure> {
    Ok(match guest.in_place {
        true => (
            number(guest, block, "huge-pages-whole")?,
            number(guest, block, "huge-pages-split")?,
        ),
        false => (number(guest, block, "huge-pages-shared")?, 0),
    })
}

fn small_huge_pages(scenario: &mut Scenario, host: &Host) -> Outcome {
    const HUGE: u64 = 2 * MIB;
    const RAM_BYTES: u64 = 128 * MIB;
    const ALL: u64 = RAM_BYTES / HUGE;
    const RANGE: u64 = 64 * MIB;
    let pool = Pool::of(HUGE)?;
    pool.resize(ALL)?;
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES},hugetlb=on,hugetlbsize=2M");
    let mut guest = Launch::new(host, 0)
        .blocks(vec![Block::huge("ram0", RAM_BYTES, HUGE)], RAM_BYTES)
        .machine("memory-backend=ram0")
        .arguments(&["-object", &object])
        .start(&scenario.directory().join("2M"))?;
    // The firmware's range is one huge page; where the launch put something, none is shared or in pieces.
    let expected = if guest.in_place { (ALL - 1, 1) } else { (1, 0) };
    let found = huge_pages(&mut guest, "ram0")?;
    scenario.fact("huge pages after the launch", vec![found.0, found.1]);
    scenario.check_equal(found, expected, "huge pages after the launch")?;
    // In place all of them are promised to the file when it is made.
    let (taken, promised) = if guest.in_place {
        (ALL, pool.reserved()?)
    } else {
        (1, 0)
    };
    scenario.check_equal(
        pool.free()? - promised,
        ALL - taken,
        "free huge pages after the launch",
    )?;
    guest.agree(scenario, "after the launch")?;

    guest.convert(scenario, RANGE, PAGE, false)?;
    guest.convert(scenario, RANGE + HUGE, 2 * HUGE, false)?;
    guest.fill(RANGE + HUGE, 2 * HUGE, 1)?;
    let expected = if guest.in_place { (ALL - 4, 4) } else { (4, 0) };
    scenario.check_equal(
        huge_pages(&mut guest, "ram0")?,
        expected,
        "huge pages, shared",
    )?;
    guest.agree(scenario, "with shared huge pages")?;
    guest.convert(scenario, RANGE, 3 * HUGE, true)?;
    guest.settle()?;
    let expected = if guest.in_place { (ALL - 1, 1) } else { (1, 0) };
    scenario.check_equal(
        huge_pages(&mut guest, "ram0")?,
        expected,
        "huge pages, private again",
    )?;
    guest.agree(scenario, "private again")?;
    guest.finish(scenario)?;
    scenario.check_equal(pool.free()?, pool.total()?, "free huge pages at the end")
}

fn large_huge_page(scenario: &mut Scenario, host: &Host) -> Outcome {
    const SMALL_BYTES: u64 = 64 * MIB;
    const START: u64 = SMALL_BYTES;
    let pool = Pool::of(GIB)?;
    scenario.check_equal(pool.free()?, 1, "pages of 1 GiB set aside at boot")?;
    let ram0 = format!("memory-backend-gmem,id=ram0,size={SMALL_BYTES}");
    let ram1 = format!("memory-backend-gmem,id=ram1,size={GIB},hugetlb=on,hugetlbsize=1G");
    let mut guest = Launch::new(host, 0)
        .blocks(
            vec![
                Block::small("ram0", SMALL_BYTES),
                Block::huge("ram1", GIB, GIB),
            ],
            SMALL_BYTES + GIB,
        )
        .arguments(&["-object", &ram0, "-object", &ram1])
        .arguments(&["-numa", "node,nodeid=0,memdev=ram0"])
        .arguments(&["-numa", "node,nodeid=1,memdev=ram1"])
        .start(&scenario.directory().join("1G"))?;
    let private = if guest.in_place { (1, 0) } else { (0, 0) };
    let shared = if guest.in_place { (0, 1) } else { (1, 0) };
    scenario.check_equal(huge_pages(&mut guest, "ram1")?, private, "after the launch")?;
    guest.convert(scenario, START + 512 * MIB, PAGE, false)?;
    guest.fill(START + 512 * MIB, PAGE, 1)?;
    scenario.check_equal(huge_pages(&mut guest, "ram1")?, shared, "one page shared")?;
    guest.agree_but_kernel(scenario, "one page shared")?;
    guest.convert(scenario, START + 512 * MIB, PAGE, true)?;
    guest.settle()?;
    scenario.check_equal(huge_pages(&mut guest, "ram1")?, private, "none shared")?;
    guest.finish(scenario)?;
    scenario.check_equal(pool.free()?, 1, "free pages of 1 GiB at the end")
}
