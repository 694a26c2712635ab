// SPDX-License-Identifier: MIT OR Apache-2.0
//! The shared plane in huge pages of 2 MiB and of 1 GiB: they come and go with the last shared byte in them, and where
//! the pool is empty the guest gets an error, nothing has changed, and it works once there are pages again.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::Failure;
use crate::host::huge_pages::Pool;
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::{Block, Ledger, PAGE};
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const EINVAL: i64 = libc::EINVAL as i64;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let device = to_vfio(&EDU)?;
    scenario.prefix("2 MiB: ");
    many_small(scenario, &device)?;
    scenario.prefix("1 GiB: ");
    one_large(scenario, &device)
}

/// A conversion that is to fail for want of memory: nothing has changed afterwards.
fn refused(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    pool: &Pool,
    (gpa, bytes): (u64, u64),
    why: &str,
) -> Outcome {
    let failures = number(guest, "failures")?;
    let (private, mapped) = (number(guest, "private")?, number(guest, "dma-mapped")?);
    let free = pool.free()?;
    let result = guest.monitor.convert(gpa, bytes, false)?;
    scenario.fact(&format!("to-shared, {why}"), result);
    scenario.check_equal(result, EINVAL, format!("result of to-shared, {why}"))?;
    for (name, expected) in [
        ("failures", failures + 1),
        ("private", private),
        ("dma-mapped", mapped),
        ("quarantined", 0),
    ] {
        scenario.check_equal(
            number(guest, name)?,
            expected,
            format!("query-gmem's {name} after to-shared, {why}"),
        )?;
    }
    scenario.check_equal(pool.free()?, free, format!("free huge pages, {why}"))
}

/// Of the block in huge pages, which is the last.
fn number(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    let id = guest.ledger.blocks.last().map_or("", |block| block.id);
    Gmem::query(&mut guest.machine.qmp)?.block(id)?.number(name)
}

/// Free huge pages are what they should be, and QEMU knows how many it has.
fn counted(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    pool: &Pool,
    free: u64,
    step: &str,
) -> Outcome {
    guest.settle()?;
    scenario.check_equal(pool.free()?, free, format!("free huge pages, {step}"))?;
    let block = guest.ledger.blocks.len() - 1;
    let live = guest.ledger.live_pages(block);
    scenario.check_equal(
        number(guest, "huge-pages-shared")?,
        live,
        format!("query-gmem's huge-pages-shared, {step}"),
    )?;
    let held = guest.shared[block].allocated()?;
    scenario.fact(&format!("footprint of the shared plane, {step}"), held);
    scenario.fact(&format!("HugePages_Free, {step}"), free);
    let page_bytes = guest.ledger.blocks[block].page_bytes;
    scenario.check_equal(
        held,
        live * page_bytes,
        format!("bytes in the memfd, {step}"),
    )
}

fn many_small(scenario: &mut Scenario, device: &str) -> Outcome {
    const HUGE: u64 = 2 * MIB;
    const RAM_BYTES: u64 = 128 * MIB;
    const SPARE: u64 = 4;
    const START: u64 = 64 * MIB;
    const BYTES: u64 = 16 * MIB;
    let pool = Pool::of(HUGE)?;
    pool.resize(RAM_BYTES / HUGE + SPARE)?;
    let directory = scenario.directory().join("2M");
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut guest = Confidential::start(
        &directory,
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM_BYTES},hugetlb=on,hugetlbsize=2M"),
            "-m",
            "128M",
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0,x-change-vmfd-on-reset=on",
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            &passthrough,
        ],
        Ledger::new(vec![Block::huge("ram0", RAM_BYTES, HUGE)]),
    )?;
    let engine = Engine::new(0, 16 * MIB);
    counted(scenario, &mut guest, &pool, SPARE, "at start")?;
    engine.reaches(scenario, &mut guest, START)?;

    guest.convert(scenario, START, BYTES, true)?;
    guest.fill(START, BYTES, 1)?;
    counted(scenario, &mut guest, &pool, SPARE + 8, "16 MiB private")?;
    guest.agree(scenario, "16 MiB private")?;
    let fault = engine.is_kept_from(scenario, &mut guest, START + PAGE, 24 * MIB)?;
    scenario.fact("fault at a private page", fault);

    let taken = pool.take(SPARE + 8)?;
    let empty = "the pool is empty";
    refused(scenario, &mut guest, &pool, (START, PAGE), empty)?;
    refused(
        scenario,
        &mut guest,
        &pool,
        (START, BYTES),
        "all of it, the pool is empty",
    )?;
    guest.fill(START, BYTES, 2)?;
    guest.agree(scenario, "refused")?;
    drop(taken);
    let taken = pool.take(SPARE + 7)?;
    guest.convert(scenario, START + MIB, PAGE, false)?;
    counted(scenario, &mut guest, &pool, 0, "one page shared")?;
    engine.reaches(scenario, &mut guest, START + MIB)?;
    guest.convert(scenario, START + MIB + 8 * PAGE, PAGE, false)?;
    refused(
        scenario,
        &mut guest,
        &pool,
        (START + 3 * MIB, PAGE),
        "next huge page",
    )?;
    drop(taken);
    let taken = pool.take(SPARE + 1)?;
    refused(
        scenario,
        &mut guest,
        &pool,
        (START, BYTES),
        "6 of 7 huge pages free",
    )?;
    guest.agree(scenario, "refused half-way")?;
    drop(taken);
    guest.convert(scenario, START, BYTES, false)?;
    guest.fill(START, BYTES, 3)?;
    counted(scenario, &mut guest, &pool, SPARE, "all shared again")?;
    engine.reaches(scenario, &mut guest, START + 5 * MIB)?;
    guest.agree(scenario, "all shared again")?;

    // Single pages all over, in an order that leaves each huge page with shared ones until the last.
    let pages = BYTES / PAGE;
    for (first, private) in [(0, true), (1, true), (0, false), (1, false)] {
        let start = START + first * PAGE;
        let results = guest
            .monitor
            .storm(pages / 2, start, PAGE, private, 2 * PAGE)?;
        scenario.check_equal(results, vec![(0, pages / 2)], "results of single pages")?;
        for place in 0..pages / 2 {
            guest
                .ledger
                .convert(start + place * 2 * PAGE, PAGE, private);
        }
        let step = match (first, private) {
            (0, true) => "every second page private",
            (_, true) => "every page private",
            (0, false) => "every second page shared",
            _ => "every page shared",
        };
        let free = if guest.ledger.private_bytes(0) == BYTES {
            SPARE + BYTES / HUGE
        } else {
            SPARE
        };
        counted(scenario, &mut guest, &pool, free, step)?;
    }
    guest.fill(START, BYTES, 4)?;
    guest.agree(scenario, "after single pages")?;

    // The VM is made anew: it has as many huge pages as at first, and gave the old ones back before.
    guest.convert(scenario, START, BYTES, true)?;
    guest.machine.qmp.execute("system_reset", json!({}))?;
    guest.monitor.wait_until_ready()?;
    guest.ledger.reset();
    guest.reopen()?;
    counted(
        scenario,
        &mut guest,
        &pool,
        SPARE,
        "after the VM was rebuilt",
    )?;
    guest.expect_zeros(scenario, START, BYTES)?;
    engine.reaches(scenario, &mut guest, START + 5 * MIB)?;
    guest.agree(scenario, "after the VM was rebuilt")?;
    guest.finish(scenario)?;
    scenario.check_equal(pool.free()?, pool.total()?, "free huge pages at the end")
}

fn one_large(scenario: &mut Scenario, device: &str) -> Outcome {
    const SMALL_BYTES: u64 = 128 * MIB;
    const START: u64 = SMALL_BYTES;
    let pool = Pool::of(GIB)?;
    scenario.check_equal(pool.free()?, 1, "pages of 1 GiB set aside at boot")?;
    let directory = scenario.directory().join("1G");
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut guest = Confidential::start(
        &directory,
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={SMALL_BYTES}"),
            "-object",
            &format!("memory-backend-gmem,id=ram1,size={GIB},hugetlb=on,hugetlbsize=1G"),
            "-numa",
            "node,nodeid=0,memdev=ram0",
            "-numa",
            "node,nodeid=1,memdev=ram1",
            "-m",
            "1152M",
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0",
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            &passthrough,
        ],
        Ledger::new(vec![
            Block::small("ram0", SMALL_BYTES),
            Block::huge("ram1", GIB, GIB),
        ]),
    )?;
    let engine = Engine::new(0, 16 * MIB);
    counted(scenario, &mut guest, &pool, 0, "at start")?;
    engine.reaches(scenario, &mut guest, START + 512 * MIB)?;
    // A page of it: the huge page stays.
    guest.convert(scenario, START + 512 * MIB, PAGE, true)?;
    guest.fill(START + 512 * MIB, PAGE, 1)?;
    counted(scenario, &mut guest, &pool, 0, "one page private")?;
    let fault = engine.is_kept_from(scenario, &mut guest, START + 512 * MIB, 24 * MIB)?;
    scenario.fact("fault at a private page", fault);
    engine.reaches(scenario, &mut guest, START + 512 * MIB + PAGE)?;
    guest.agree(scenario, "one page private")?;

    guest.convert(scenario, START, GIB, true)?;
    counted(scenario, &mut guest, &pool, 1, "all of it private")?;
    let taken = pool.take(1)?;
    refused(
        scenario,
        &mut guest,
        &pool,
        (START + MIB, PAGE),
        "the pool is empty",
    )?;
    refused(
        scenario,
        &mut guest,
        &pool,
        (START, GIB),
        "all of it, the pool is empty",
    )?;
    drop(taken);
    guest.convert(scenario, START + MIB, PAGE, false)?;
    counted(scenario, &mut guest, &pool, 0, "one page shared")?;
    engine.reaches(scenario, &mut guest, START + MIB)?;
    guest.agree_but_kernel(scenario, "one page shared")?;
    guest.convert(scenario, START + MIB, PAGE, true)?;
    counted(scenario, &mut guest, &pool, 1, "no page shared")?;
    guest.convert(scenario, START, GIB, false)?;
    counted(scenario, &mut guest, &pool, 0, "all of it shared")?;
    guest.agree(scenario, "all of it shared")?;
    guest.finish(scenario)?;
    scenario.check_equal(pool.free()?, 1, "free pages of 1 GiB at the end")
}
