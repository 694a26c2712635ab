// SPDX-License-Identifier: MIT OR Apache-2.0
//! What memory of the host the same guest takes that does the same things, on memory of each kind.

use super::readings::{Kind, Readings};
use super::{columns, pool, start, touch, Column, HUGE, MIB, PAGE};
use crate::bench::contest::set_huge_shmem;
use crate::bench::guest::Guest;
use crate::bench::workload::Batch;
use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::huge_pages::Pool;
use crate::host::pages::counter;
use crate::host::passthrough::{all_to_vfio, EDU};
use crate::monitor::protocol::SHARED_FOR_EVER_END;
use crate::monitor::sequence::WorkingSet;
use crate::scenario::{Outcome, Scenario};
use std::fs;
use std::time::Duration;

const CASE: &str = "inplace-footprint";
const RAM_BYTES: u64 = 1024 * MIB;
/// What the guest shares in one piece, in the middle.
const POOL_START: u64 = 512 * MIB;
const POOL_BYTES: u64 = 64 * MIB;
/// Single pages, each in a 2 MiB range of its own.
const SCATTERED: WorkingSet = WorkingSet {
    address: 32 * MIB,
    region_pages: 128,
    set: 128,
    spread: HUGE / PAGE,
};
const EXIT_PATIENCE: Duration = Duration::from_secs(60);

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let (all, mut missing) = columns(&[
        Column::Split,
        Column::SplitHuge,
        Column::InPlace,
        Column::InPlaceHuge,
    ])?;
    set_huge_shmem(false)?;
    let devices = all_to_vfio(&EDU)?;
    let device = devices
        .first()
        .attempt(|| "L1 has no edu device".to_string())?;
    let mut readings = Readings::default();
    for column in all {
        let mut columns = vec![column];
        let pool = pool(&mut columns, RAM_BYTES, &mut missing);
        if columns.is_empty() {
            continue;
        }
        match one(scenario, column, device, pool.as_ref(), &mut readings) {
            Err(failure) if column.is_huge() => missing.push((column, failure.to_string())),
            done => done?,
        }
        readings.tell(scenario, None, &missing);
    }
    readings.tell(scenario, None, &missing);
    Ok(())
}

fn one(
    scenario: &Scenario,
    column: Column,
    device: &str,
    pool: Option<&Pool>,
    readings: &mut Readings,
) -> Result<(), Failure> {
    let before = Taken::now(pool, None)?;
    let mut guest = start(scenario, column, RAM_BYTES, device)?;
    let begin = SHARED_FOR_EVER_END;
    touch(&mut guest, begin, RAM_BYTES - begin)?;
    let mut read = |guest: &Guest, step: &str| -> Result<(), Failure> {
        let taken = Taken::now(pool, Some(guest.machine.pid()))?;
        for (name, now, old) in [
            ("memory of the host", taken.all, before.all),
            ("slab", taken.slab, before.slab),
            ("page tables", taken.page_tables, before.page_tables),
        ] {
            let measure = format!("{step}: {name}");
            readings.add(CASE, measure, column, Kind::Bytes, (now - old) as f64);
        }
        scenario.progress(format!("{}: {step}", column.name()));
        Ok(())
    };
    read(&guest, "all private")?;
    guest.convert(POOL_START, POOL_BYTES, false)?;
    touch(&mut guest, POOL_START, POOL_BYTES)?;
    read(&guest, "64 MiB shared")?;
    guest.run(&Batch::once(SCATTERED, false).verb)?;
    for index in 0..SCATTERED.set {
        let page = SCATTERED.page(index);
        guest.monitor.ask(&format!("write64 {page:#x} 0"))?;
    }
    read(&guest, "and 128 pages")?;
    guest.run(&Batch::once(SCATTERED, true).verb)?;
    guest.convert(POOL_START, POOL_BYTES, true)?;
    touch(&mut guest, begin, RAM_BYTES - begin)?;
    read(&guest, "all private again")?;
    guest.monitor.power_off()?;
    guest.machine.wait_for_exit(EXIT_PATIENCE)
}

/// Bytes, so that two can be compared.
struct Taken {
    /// Not free: neither as pages nor in the pool. A promise of the pool's is no memory that others can have.
    all: i64,
    slab: i64,
    /// Of processes, and of guests.
    page_tables: i64,
}

impl Taken {
    /// Without what the process `vmm` has for itself.
    fn now(pool: Option<&Pool>, vmm: Option<u32>) -> Result<Self, Failure> {
        // Dentries and inodes that nobody uses any more would count as slab; a guest_memfd's pages are left alone by 2.
        // The second folds the counters.
        for (path, value) in [
            ("/proc/sys/vm/drop_caches", "2"),
            ("/proc/sys/vm/stat_refresh", "1"),
        ] {
            fs::write(path, value).attempt(|| format!("writing {path}"))?;
        }
        let text =
            fs::read_to_string("/proc/meminfo").attempt(|| "reading /proc/meminfo".into())?;
        let bytes = |name: &str| kibibytes(&text, name);
        let zones =
            fs::read_to_string("/proc/zoneinfo").attempt(|| "reading /proc/zoneinfo".into())?;
        let free = bytes("MemFree")? + kept_by_processors(&zones) * PAGE as i64;
        // To the kernel no page of the pool is free memory, whoever has it.
        let unused_of_pool = match pool {
            Some(pool) => (pool.free()?.saturating_sub(pool.reserved()?) * HUGE) as i64,
            None => 0,
        };
        let own = match vmm {
            Some(pid) => {
                let path = format!("/proc/{pid}/status");
                let text = fs::read_to_string(&path).attempt(|| format!("reading {path}"))?;
                kibibytes(&text, "RssAnon")?
            }
            None => 0,
        };
        let vmstat =
            fs::read_to_string("/proc/vmstat").attempt(|| "reading /proc/vmstat".into())?;
        let tables =
            counter(&vmstat, "nr_page_table_pages")? + counter(&vmstat, "nr_sec_page_table_pages")?;
        Ok(Self {
            all: bytes("MemTotal")? - free - unused_of_pool - own,
            slab: bytes("Slab")?,
            page_tables: (tables * PAGE) as i64,
        })
    }
}

/// `Name:   12345 kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Result<i64, Failure> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.split_ascii_whitespace().next()?.parse::<i64>().ok())
        .map(|kib| kib << 10)
        .attempt(|| format!("there is no number {name}"))
}

/// Free pages that processors keep for themselves, which MemFree leaves out: up to an eighth of all memory.
fn kept_by_processors(zoneinfo: &str) -> i64 {
    zoneinfo
        .lines()
        .filter_map(|line| {
            line.trim()
                .strip_prefix("count:")?
                .trim()
                .parse::<i64>()
                .ok()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::{kept_by_processors, kibibytes};

    #[test]
    fn free_pages_of_all_processors_and_zones_are_counted() {
        let text = "Node 0, zone DMA32\n  pages free 7\n  pagesets\n    cpu: 0\n              count:    3\n\
                    \x20             high: 9\n    cpu: 1\n              count: 4\nNode 0, zone Normal\n count: 5\n";
        assert_eq!(kept_by_processors(text), 12);
    }

    #[test]
    fn a_number_of_kibibytes_is_found_by_its_whole_name() {
        let text = "MemFreeish:  1 kB\nMemFree:     42 kB\n";
        assert_eq!(kibibytes(text, "MemFree").unwrap(), 42 << 10);
        assert!(kibibytes(text, "Mem").is_err());
    }
}
