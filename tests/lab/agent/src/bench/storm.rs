// SPDX-License-Identifier: MIT OR Apache-2.0
//! 4 KiB conversions all over a plane of 2 MiB pages, and back: what memory is left taken.

use super::contest::Contestant;
use super::figures::Figures;
use super::guest::{Guest, Plan, Side};
use super::workload::Batch;
use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::huge_pages::Pool;
use crate::host::pages;
use crate::host::passthrough::{all_to_vfio, EDU};
use crate::monitor::protocol::SHARED_FOR_EVER_END;
use crate::monitor::sequence::WorkingSet;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::collections::BTreeSet;

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;
const RAM_BYTES: u64 = 256 * MIB;
/// Enough for one guest that never gives any back, and for nothing more.
const POOL_PAGES: u64 = RAM_BYTES / HUGE + 8;
const RUNS: usize = 5;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let devices = all_to_vfio(&EDU)?;
    let device = devices
        .first()
        .attempt(|| "L1 has no edu device".to_string())?;
    let pool = Pool::of(HUGE)?;
    pool.resize(POOL_PAGES)?;
    let [stock, ours] = both(scenario, device, &pool)?;
    let case = json!({
        "name": "hugetlb-storm", "requests": 2 * set().set,
        "stock": stock.json(), "gmem": ours.json(),
    });
    scenario.fact("cases", vec![case]);
    Ok(())
}

/// One side after the other: the pool is one, and who holds what of it can't be told from outside.
fn both(scenario: &Scenario, device: &str, pool: &Pool) -> Result<[Figures; 2], Failure> {
    Ok([
        side(scenario, Side::Stock, device, pool)?,
        side(scenario, Side::Gmem("cut"), device, pool)?,
    ])
}

fn set() -> WorkingSet {
    WorkingSet {
        address: 64 * MIB,
        region_pages: 1 << 15,
        set: 2048,
        spread: 1,
    }
}

fn side(scenario: &Scenario, side: Side, device: &str, pool: &Pool) -> Result<Figures, Failure> {
    let private_before = pages::outside_shmem()?;
    let free_before_guest = pool.free()?;
    let plan = Plan {
        side,
        ram_bytes: RAM_BYTES,
        processors: 1,
        label: "",
        properties: ",hugetlb=on,hugetlbsize=2M",
        more: &[],
    };
    let mut contestant = Contestant {
        guest: Guest::start(scenario, plan, device)?,
        figures: Figures::default(),
    };
    let Contestant { guest, figures } = &mut contestant;
    guest.all_private()?;
    guest.plug()?;
    touch(guest)?;
    figures.fact("hugepages_free_before", pool.free()?);
    figures.fact("hugepages_before_guest", free_before_guest);
    figures.fact("private_bytes", pages::outside_shmem()? - private_before);
    let footprint = || -> Result<u64, Failure> {
        let private = pages::outside_shmem()?.saturating_sub(private_before);
        Ok(private + (free_before_guest - pool.free()?) * HUGE)
    };
    let set = set();
    let live: BTreeSet<u64> = (0..set.set).map(|index| set.page(index) / HUGE).collect();
    let own = SHARED_FOR_EVER_END / HUGE;
    figures.fact("live_shared_huge_pages", live.len() as u64 + own);
    figures.fact(
        "footprint_bound_bytes",
        RAM_BYTES + (live.len() as u64 + own) * HUGE,
    );
    figures.fact("footprint_start_bytes", footprint()?);
    let (there, back) = (Batch::once(set, false), Batch::once(set, true));
    for run in 0..RUNS {
        let mut seconds = 0.0;
        for batch in [&there, &back] {
            let run = guest.run(&batch.verb)?;
            seconds += run.seconds();
            let requests = run.exits.iter().map(|exit| exit.nanoseconds());
            figures.requests.extend(requests);
            figures.most("footprint_peak_bytes", footprint()?);
            figures.most("hugepages_taken_peak", free_before_guest - pool.free()?);
        }
        figures.runs.push(seconds);
        if let Some(gmem) = guest.gmem()? {
            let block = gmem.block("ram0")?;
            figures.fact("strategy", block.text("dma-strategy")?);
        }
        // Pages that were shared in between have no private memory until the guest uses them.
        touch(guest)?;
        figures.most("footprint_peak_bytes", footprint()?);
        scenario.progress(format!("{}: run {} of {RUNS}", side.name(), run + 1));
    }
    let timelines = json!([
        contestant.look_at(&there.verb)?,
        contestant.look_at(&back.verb)?
    ]);
    let Contestant { guest, figures } = &mut contestant;
    figures.fact("microseconds_to_each_call", timelines);
    guest.settle()?;
    figures.fact("hugepages_free_after", pool.free()?);
    figures.fact("footprint_end_bytes", footprint()?);
    guest.monitor.power_off()?;
    guest
        .machine
        .wait_for_exit(std::time::Duration::from_secs(60))?;
    Ok(contestant.figures)
}

/// The guest uses all of its private memory.
fn touch(guest: &mut Guest) -> Result<(), Failure> {
    let start = SHARED_FOR_EVER_END;
    guest
        .monitor
        .ask(&format!("bench-touch {start:#x} {:#x}", RAM_BYTES - start))
        .map(|_| ())
}
