// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cases that are a list of requests: what each asks for, and where.

use super::contest::{Contest, Entry};
use super::guest::{Plan, Side};
use super::workload::{second_half, Batch, Workload};
use crate::boot::CommandLine;
use crate::failure::Failure;
use crate::host::passthrough::{all_to_vfio, EDU};
use crate::monitor::sequence::{
    swiotlb_bytes, Flavour, WorkingSet, COHERENT_PLACES, COHERENT_STRIDE,
};
use crate::scenario::{Outcome, Scenario};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
/// Where the ranges under conversion begin, clear of the payload and the firmware.
const BASE: u64 = 128 * MIB;
const LARGE_PAGES: u64 = 512;
const RUNS: usize = 5;

/// A guest with so much memory; the side is filled in later.
fn guest(ram_bytes: u64, processors: u64) -> Plan {
    Plan {
        side: Side::Stock,
        ram_bytes,
        processors,
        label: "",
        properties: "",
        more: &[],
    }
}

/// Starts all sides, counts, races, and reports; `after` looks at the sides when all runs are over.
fn run(
    scenario: &mut Scenario,
    entries: &[Entry],
    workload: &Workload,
    plan: Plan,
    after: impl FnOnce(&mut Contest) -> Result<(), Failure>,
) -> Outcome {
    let devices = all_to_vfio(&EDU)?;
    let mut contest = Contest::start(scenario, &devices, entries, workload, plan)?;
    contest.count(scenario)?;
    contest.race(scenario)?;
    after(&mut contest)?;
    scenario.fact("cases", contest.cases());
    Ok(())
}

fn nothing_more(_: &mut Contest) -> Result<(), Failure> {
    Ok(())
}

/// 1 GiB to shared in 2 MiB requests, as a TDX guest asks.
pub fn share_1g(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let workload = Workload {
        setup: Vec::new(),
        timed: Batch::linear(BASE, 512, LARGE_PAGES, false),
        undo: vec![Batch::linear(BASE, 1, 512 * LARGE_PAGES, true)],
        huge_shmem: true,
        bare_frees: false,
        runs: RUNS,
    };
    let entries = [("share-1g", "cut"), ("share-1g-unit", "unit")];
    let plan = guest(GIB + 256 * MIB, 1);
    run(scenario, &entries, &workload, plan, nothing_more)
}

/// The largest request that KVM hands on for an SNP guest.
pub fn snp_128m(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let workload = Workload {
        setup: Vec::new(),
        timed: Batch::linear(BASE, 1, 64 * LARGE_PAGES, false),
        undo: vec![Batch::linear(BASE, 1, 64 * LARGE_PAGES, true)],
        huge_shmem: true,
        bare_frees: false,
        runs: 20,
    };
    let entries = [("snp-128m", "cut"), ("snp-128m-unit", "unit")];
    let plan = guest(512 * MIB, 1);
    run(scenario, &entries, &workload, plan, nothing_more)
}

pub fn tdx_boot(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    boot(scenario, "tdx-boot", Flavour::Tdx)
}

pub fn snp_boot(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    boot(scenario, "snp-boot", Flavour::Snp)
}

/// What a Linux guest of 8 GiB asks for at boot: its swiotlb, then coherent allocations.
fn boot(scenario: &mut Scenario, name: &'static str, flavour: Flavour) -> Outcome {
    const RAM: u64 = 8 * GIB;
    const SWIOTLB: u64 = GIB;
    const HIGH: u64 = 4 * GIB;
    const ALLOCATIONS: u64 = 3000;
    let coherent_pages = COHERENT_PLACES * COHERENT_STRIDE / PAGE;
    let workload = Workload {
        setup: Vec::new(),
        timed: Batch::boot(flavour, RAM, SWIOTLB, HIGH, ALLOCATIONS),
        undo: vec![
            Batch::linear(SWIOTLB, 1, swiotlb_bytes(RAM) / PAGE, true),
            Batch::linear(HIGH, 1, coherent_pages, true),
        ],
        huge_shmem: true,
        bare_frees: false,
        runs: RUNS,
    };
    run(
        scenario,
        &[(name, "cut")],
        &workload,
        guest(RAM, 1),
        nothing_more,
    )
}

/// Single pages to private and back, each of which was cut out of a large area before.
pub fn page_churn(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let set = WorkingSet {
        address: BASE,
        region_pages: 1 << 16,
        set: 2048,
        spread: 1,
    };
    let workload = Workload {
        setup: vec![
            Batch::linear(BASE, set.region_pages / LARGE_PAGES, LARGE_PAGES, false),
            Batch::churn(set, set.set, 0),
        ],
        timed: Batch::churn(set, 2000, 7),
        undo: Vec::new(),
        huge_shmem: false,
        bare_frees: true,
        runs: RUNS,
    };
    let plan = guest(512 * MIB, 1);
    run(
        scenario,
        &[("page-churn", "cut")],
        &workload,
        plan,
        nothing_more,
    )
}

/// The same inside one large mapped range, while the device writes on both sides of the page under conversion.
pub fn churn_in_large(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let set = WorkingSet {
        address: BASE,
        region_pages: 1 << 12,
        set: 512,
        spread: 16,
    };
    let range_pages = set.region_pages * set.spread;
    // The last page's neighbour and what the device reads from lie in the same range, behind the working set.
    let source = BASE + (range_pages + 64) * PAGE;
    let workload = Workload {
        setup: vec![Batch::linear(BASE, 1, range_pages + LARGE_PAGES, false)],
        timed: Batch::neighbours(set, 1000, 11, source),
        undo: Vec::new(),
        huge_shmem: false,
        bare_frees: false,
        runs: RUNS,
    };
    let plan = guest(512 * MIB, 2);
    run(
        scenario,
        &[("churn-in-large", "cut")],
        &workload,
        plan,
        |contest| {
            let ours = contest.ours.iter_mut();
            for side in ours.chain([&mut contest.stock]) {
                let words = side.figures.facts.remove("wrong_words");
                let bytes = words.and_then(|words| words.as_u64()).unwrap_or(0) * 8;
                side.figures.fact("wrong_bytes", bytes);
            }
            Ok(())
        },
    )
}

/// Churn on two processors, in halves that do not touch.
pub fn two_vcpus(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let first = WorkingSet {
        address: BASE,
        region_pages: 1 << 15,
        set: 1024,
        spread: 1,
    };
    let second = second_half(&first);
    let workload = Workload {
        setup: vec![
            Batch::linear(
                BASE,
                2 * first.region_pages / LARGE_PAGES,
                LARGE_PAGES,
                false,
            ),
            Batch::churn(first, first.set, 0),
            Batch::churn(second, second.set, 0),
        ],
        timed: Batch::two(first, 1000, 13),
        undo: Vec::new(),
        huge_shmem: false,
        bare_frees: true,
        runs: RUNS,
    };
    let plan = guest(512 * MIB, 2);
    run(
        scenario,
        &[("two-vcpus", "cut")],
        &workload,
        plan,
        |contest| {
            let ours = contest.ours.iter_mut();
            for side in ours.chain([&mut contest.stock]) {
                // A bit that was lost leaves a page mapped while it is private, and sharing it again then fails.
                let mut lost = 0;
                for set in [first, second] {
                    for private in [true, false] {
                        let batch = Batch::once(set, private);
                        lost += side.guest.run_refused(&batch.verb)?;
                    }
                }
                if let Some(gmem) = side.guest.gmem()? {
                    let block = gmem.block("ram0")?;
                    let shared = block.number("shared")?;
                    lost += shared.abs_diff(block.number("dma-mapped")?) / PAGE;
                    let expected = 2 * first.region_pages * PAGE + 4 * MIB;
                    lost += shared.abs_diff(expected) / PAGE;
                }
                side.figures.fact("lost_bits", lost);
            }
            Ok(())
        },
    )
}
