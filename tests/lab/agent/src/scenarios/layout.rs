// SPDX-License-Identifier: MIT OR Apache-2.0
//! Three blocks side by side: one page of 1 GiB that never converts, one block that converts by 2 MiB, one by 4 KiB. Each takes
//! the requests that it is made for and refuses the others, also where a request crosses from one into the next.
//!
//! In place, what is shared of a guest_memfd is in small pages always: there the first block is of these.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::host::huge_pages::Pool;
use crate::host::kernel;
use crate::ledger::{Block, Ledger, PAGE};
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const EINVAL: i64 = libc::EINVAL as i64;
const BY_2M_BYTES: u64 = 64 * MIB;
const BY_4K_BYTES: u64 = 32 * MIB;
const BY_2M: u64 = GIB;
const BY_4K: u64 = BY_2M + BY_2M_BYTES;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let pool = Pool::of(GIB)?;
    let mut guest = start(scenario)?;
    guest.patient = true;
    let huge = !guest.in_place;
    scenario.check_equal(
        pool.free()?,
        u64::from(!huge),
        "free pages of 1 GiB: the guest has the one, if it wants it",
    )?;

    for (name, gpa, bytes) in [
        ("a page of the block that never splits", 16 * MIB, PAGE),
        ("2 MiB of it", 16 * MIB, 2 * MIB),
        ("all but the payload of it", 4 * MIB, GIB - 4 * MIB),
        ("a page of the 2 MiB block", BY_2M, PAGE),
        ("2 MiB across units of it", BY_2M + MIB, 2 * MIB),
        (
            "the end of one block and the beginning of the next",
            BY_2M - 2 * MIB,
            4 * MIB,
        ),
        ("half a unit and small pages", BY_4K - MIB, 2 * MIB),
    ] {
        let result = guest.monitor.convert(gpa, bytes, true)?;
        scenario.fact(&format!("to-private, {name}"), result);
        scenario.check_equal(result, EINVAL, format!("result of to-private, {name}"))?;
    }
    guest.agree(scenario, "after what is refused")?;
    // What is shared already needs no permission.
    guest.convert(scenario, 16 * MIB, PAGE, false)?;

    for (name, gpa, bytes) in [
        ("a unit of the 2 MiB block", BY_2M + 8 * MIB, 2 * MIB),
        ("a page of the 4 KiB block", BY_4K + 8 * MIB, PAGE),
        (
            "a unit and small pages in one request",
            BY_4K - 2 * MIB,
            2 * MIB + 3 * PAGE,
        ),
    ] {
        guest.convert(scenario, gpa, bytes, true)?;
        guest.expect_fresh(scenario, gpa, bytes)?;
        guest.fill(gpa, bytes, 1)?;
        guest.agree(scenario, name)?;
        scenario.fact(&format!("to-private, {name}"), "done");
    }
    let result = guest.monitor.convert(BY_2M + 8 * MIB, PAGE, false)?;
    scenario.fact("to-shared, a page of a private unit", result);
    scenario.check_equal(
        result,
        EINVAL,
        "result of to-shared, a page of a private unit",
    )?;
    guest.convert(scenario, BY_2M, BY_2M_BYTES + BY_4K_BYTES, false)?;
    guest.agree(scenario, "all shared again")?;

    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    for id in ["ram0", "ram1", "ram2"] {
        let block = gmem.block(id)?;
        for name in ["to-private", "to-shared", "failures", "private-runs"] {
            scenario.fact(&format!("{id}_{name}"), block.number(name)?);
        }
    }
    let never = gmem.block("ram0")?;
    scenario.check_equal(
        never.number("to-private")?,
        0,
        "conversions in the block that never splits",
    )?;
    scenario.check_equal(
        never.number("huge-pages-shared")?,
        u64::from(huge),
        "its huge pages",
    )?;
    guest.finish(scenario)?;
    scenario.check_equal(pool.free()?, 1, "free pages of 1 GiB at the end")
}

fn start(scenario: &Scenario) -> Result<Confidential, crate::failure::Failure> {
    let (first, large) = match kernel::in_place() {
        true => (Block::small("ram0", GIB), ""),
        false => (Block::huge("ram0", GIB, GIB), ",hugetlb=on,hugetlbsize=1G"),
    };
    Confidential::start(
        scenario.directory(),
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={GIB}{large},convert-unit=off"),
            "-object",
            &format!("memory-backend-gmem,id=ram1,size={BY_2M_BYTES},convert-unit=2M"),
            "-object",
            &format!("memory-backend-gmem,id=ram2,size={BY_4K_BYTES},convert-unit=4k"),
            "-numa",
            "node,nodeid=0,memdev=ram0",
            "-numa",
            "node,nodeid=1,memdev=ram1",
            "-numa",
            "node,nodeid=2,memdev=ram2",
            "-m",
            &format!("{}M", (GIB + BY_2M_BYTES + BY_4K_BYTES) / MIB),
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0",
        ],
        Ledger::new(vec![
            first,
            Block::small("ram1", BY_2M_BYTES),
            Block::small("ram2", BY_4K_BYTES),
        ]),
    )
}
