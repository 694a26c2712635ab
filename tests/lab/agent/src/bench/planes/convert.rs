// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions of a guest that uses its memory: large ranges, and single pages of shared and of private memory.

use super::readings::{Kind, Readings};
use super::yardstick::Yardsticks;
use super::{columns, pool, start_all, touch, Column, MIB, PAGE};
use crate::bench::calls::Counts;
use crate::bench::contest::set_huge_shmem;
use crate::bench::guest::{by_request, Guest, Run};
use crate::bench::workload::Batch;
use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::host::passthrough::{all_to_vfio, EDU};
use crate::monitor::sequence::WorkingSet;
use crate::scenario::{Outcome, Scenario};

const RAM_BYTES: u64 = 512 * MIB;
/// Where the ranges under conversion begin, clear of the payload and the firmware.
const BASE: u64 = 128 * MIB;
const LARGE_PAGES: u64 = 512;
const RUNS: usize = 5;
/// Of loads of which the guest's own use of 64 MiB and more takes most of the time.
const FEW_RUNS: usize = 3;

/// One workload; both directions are timed, each for itself.
struct Load {
    case: &'static str,
    what: What,
}

enum What {
    /// So many requests of so many pages to shared, then to private; the guest writes to all pages after each direction.
    Ranges { count: u64, pages: u64 },
    /// So many single pages of the set, each to private (true) or shared and back, the guest writes to it after each; all
    /// around them is as they are at first.
    Pages { count: u64, first_private: bool },
}

const LOADS: [Load; 4] = [
    Load {
        case: "inplace-2m",
        what: What::Ranges {
            count: 16,
            pages: LARGE_PAGES,
        },
    },
    Load {
        case: "inplace-128m",
        what: What::Ranges {
            count: 1,
            pages: 64 * LARGE_PAGES,
        },
    },
    Load {
        case: "inplace-churn",
        what: What::Pages {
            count: 300,
            first_private: true,
        },
    },
    Load {
        case: "inplace-lend",
        what: What::Pages {
            count: 300,
            first_private: false,
        },
    },
];

fn set() -> WorkingSet {
    WorkingSet {
        address: BASE,
        region_pages: 1 << 13,
        set: 512,
        spread: 1,
    }
}

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let (mut columns, mut missing) =
        columns(&[Column::Split, Column::InPlace, Column::InPlaceHuge])?;
    set_huge_shmem(false)?;
    let devices = all_to_vfio(&EDU)?;
    let _pool = pool(&mut columns, RAM_BYTES, &mut missing);
    let mut yardsticks = Yardsticks::new()?;
    let mut readings = Readings::default();
    let mut guests = start_all(scenario, &columns, RAM_BYTES, &devices, &mut missing)?;
    for (_, guest) in &mut guests {
        touch(guest, BASE, 64 * LARGE_PAGES * PAGE)?;
    }
    for dma in [false, true] {
        if dma {
            for (_, guest) in &mut guests {
                guest.plug()?;
            }
        }
        for load in &LOADS {
            yardsticks.take(guests.first_mut().map(|(_, guest)| guest))?;
            for (column, guest) in &mut guests {
                load.prepare(guest)?;
                load.count(guest, *column, dma, &mut readings)?;
            }
            for _ in 0..load.runs() {
                for (column, guest) in &mut guests {
                    load.run(guest, *column, dma, &mut readings)?;
                }
            }
            for (_, guest) in &mut guests {
                load.tidy(guest)?;
            }
            // What was read stays if the next one fails.
            readings.tell(scenario, Some(&yardsticks), &missing);
            let with = if dma { "with" } else { "without" };
            scenario.progress(format!("{} {with} a device", load.case));
        }
    }
    yardsticks.take(guests.first_mut().map(|(_, guest)| guest))?;
    for (column, guest) in &mut guests {
        if let Some(gmem) = guest.gmem()? {
            let block = gmem.block("ram0")?;
            for name in [
                "retries",
                "quarantined",
                "huge-page-splits",
                "huge-page-merges",
            ] {
                match block.number(name) {
                    Ok(value) if value > 0 => {
                        scenario.fact(&format!("{}_{name}", column.name()), value);
                    }
                    _ => {}
                }
            }
        }
    }
    readings.tell(scenario, Some(&yardsticks), &missing);
    Ok(())
}

impl Load {
    /// The timed requests, in the order of their directions.
    fn batches(&self, seed: u64) -> Vec<(Batch, Vec<&'static str>)> {
        match self.what {
            What::Ranges { count, pages } => vec![
                (Batch::linear(BASE, count, pages, false), vec![TO_SHARED]),
                (Batch::linear(BASE, count, pages, true), vec![TO_PRIVATE]),
            ],
            What::Pages {
                count,
                first_private,
            } => {
                let directions = match first_private {
                    true => vec![TO_PRIVATE, TO_SHARED],
                    false => vec![TO_SHARED, TO_PRIVATE],
                };
                vec![(Batch::turns(set(), count, seed, first_private), directions)]
            }
        }
    }

    fn runs(&self) -> usize {
        match self.what {
            What::Ranges { count, pages } if count * pages > 32 * LARGE_PAGES => FEW_RUNS,
            _ => RUNS,
        }
    }

    fn prepare(&self, guest: &mut Guest) -> Result<(), Failure> {
        match self.what {
            What::Pages {
                first_private: true,
                ..
            } => turn(guest, false),
            _ => Ok(()),
        }
    }

    fn tidy(&self, guest: &mut Guest) -> Result<(), Failure> {
        match self.what {
            What::Pages {
                first_private: true,
                ..
            } => turn(guest, true),
            _ => Ok(()),
        }
    }

    /// A pass that the kernel traces.
    fn count(
        &self,
        guest: &mut Guest,
        column: Column,
        dma: bool,
        readings: &mut Readings,
    ) -> Result<(), Failure> {
        let vcpus = guest.vcpus()?;
        for (batch, directions) in self.batches(1) {
            let (run, calls) = guest.run_traced(&batch.verb)?;
            let requests = by_request(&run, &calls, &vcpus);
            for (turn, direction) in directions.iter().enumerate() {
                let own = requests.iter().skip(turn).step_by(directions.len());
                let count = own.clone().count() as u64;
                let counts = Counts::of(own.flatten().copied());
                let measure = measure(direction, dma);
                readings.calls(self.case, measure, column, count, &counts.by_name);
            }
        }
        self.use_all(guest).map(|_| ())
    }

    fn run(
        &self,
        guest: &mut Guest,
        column: Column,
        dma: bool,
        readings: &mut Readings,
    ) -> Result<(), Failure> {
        let seed = 7;
        let mut first_use = 0.0;
        let mut converted = 0.0;
        for (batch, directions) in self.batches(seed) {
            let run = guest.run(&batch.verb)?;
            for (turn, direction) in directions.iter().enumerate() {
                let value = mean(&run, turn, directions.len());
                let measure = measure(direction, dma);
                readings.add(self.case, measure, column, Kind::Time, value);
            }
            match self.use_all(guest)? {
                Some((pages, nanoseconds)) => {
                    first_use += nanoseconds;
                    converted += pages as f64;
                }
                None => {
                    // The answer goes on with the time that the guest took to write to each page.
                    let used = run.answer.get(5).copied();
                    first_use += used.attempt(|| "an answer without uses".to_string())? as f64;
                    converted += run.exits.len() as f64;
                }
            }
        }
        let measure = measure("first use of a page afterwards", dma);
        let value = first_use / converted;
        readings.add(self.case, measure, column, Kind::Time, value);
        Ok(())
    }

    /// The guest writes to what was converted, where it has not done so already: how many pages, nanoseconds.
    fn use_all(&self, guest: &mut Guest) -> Result<Option<(u64, f64)>, Failure> {
        let What::Ranges { count, pages } = self.what else {
            return Ok(None);
        };
        let pages = count * pages;
        Ok(Some((pages, touch(guest, BASE, pages * PAGE)?)))
    }
}

const TO_SHARED: &str = "to shared";
const TO_PRIVATE: &str = "to private";

fn measure(what: &str, dma: bool) -> String {
    match dma {
        true => format!("{what}, with a device"),
        false => what.to_string(),
    }
}

/// Nanoseconds of a request outside the guest, of each `step`th one from `first` on.
fn mean(run: &Run, first: usize, step: usize) -> f64 {
    let own = run.exits.iter().skip(first).step_by(step);
    let (count, sum) = own.fold((0, 0), |(count, sum), exit| {
        (count + 1, sum + exit.nanoseconds())
    });
    sum as f64 / f64::from(count.max(1))
}

/// The region of the set, to private or shared, and used.
fn turn(guest: &mut Guest, private: bool) -> Result<(), Failure> {
    let bytes = set().region_pages * PAGE;
    guest.convert(BASE, bytes, private)?;
    touch(guest, BASE, bytes).map(|_| ())
}
