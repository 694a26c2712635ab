// SPDX-License-Identifier: MIT OR Apache-2.0
//! One workload on all its sides: guests and replays that live side by side and take turns, run by run.

use super::calls::Counts;
use super::figures::{median, slab_bytes, Figures};
use super::guest::{by_others, by_request, Guest, Plan, Run, Side};
use super::kernel::{Kernel, Vcpu};
use super::replay::{self, Script};
use super::workload::{Batch, Workload};
use crate::failure::{Attempt, Failure};
use crate::host::messages::Messages;
use crate::host::pages;
use crate::scenario::Scenario;
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;

/// `unit`'s pieces.
const UNIT_PAGES: u64 = 512;

/// Our side in one case: the case's name and the strategy.
pub type Entry = (&'static str, &'static str);

/// A guest and what it came to.
pub struct Contestant {
    pub guest: Guest,
    pub figures: Figures,
}

/// The same kernel calls without a guest.
struct Bare {
    kernel: Kernel,
    vcpus: Vec<Vcpu>,
    scripts: Vec<Script>,
    /// Those that ours makes, where `scripts` have more.
    own: Vec<Script>,
    unit: Option<u64>,
    figures: Figures,
    own_figures: Figures,
    left_out: replay::Counted,
}

/// All sides of one workload.
pub struct Contest<'a> {
    workload: &'a Workload,
    entries: &'a [Entry],
    pub stock: Contestant,
    pub ours: Vec<Contestant>,
    bare: Vec<Bare>,
}

impl<'a> Contest<'a> {
    /// Starts every side and brings it to where the timed requests begin.
    pub fn start(
        scenario: &Scenario,
        devices: &[String],
        entries: &'a [Entry],
        workload: &'a Workload,
        plan: Plan,
    ) -> Result<Self, Failure> {
        set_huge_shmem(workload.huge_shmem)?;
        let mut devices = devices.iter();
        let mut device = || {
            devices
                .next()
                .attempt(|| "L1 has too few edu devices".into())
        };
        let mut contestant = |side| -> Result<Contestant, Failure> {
            let mut guest = Guest::start(scenario, Plan { side, ..plan }, device()?)?;
            guest.all_private()?;
            guest.plug()?;
            scenario.progress(format!("{} is up, its device plugged in", side.name()));
            for batch in &workload.setup {
                guest.run(&batch.verb)?;
            }
            Ok(Contestant {
                guest,
                figures: Figures::default(),
            })
        };
        let stock = contestant(Side::Stock)?;
        let ours = entries
            .iter()
            .map(|(_, strategy)| contestant(Side::Gmem(strategy)))
            .collect::<Result<Vec<_>, _>>()?;
        let bytes = highest(workload);
        let bare = entries
            .iter()
            .map(|(_, strategy)| {
                let unit = (*strategy == "unit").then_some(UNIT_PAGES);
                let kernel = Kernel::new(bytes, Some((device()?, unit.is_some())))?;
                let vcpus = (0..workload.timed.requests.len() as u64)
                    .map(|number| kernel.vcpu(number))
                    .collect::<Result<_, _>>()?;
                let bare = Bare {
                    kernel,
                    vcpus,
                    scripts: Vec::new(),
                    own: Vec::new(),
                    unit,
                    figures: Figures::default(),
                    own_figures: Figures::default(),
                    left_out: replay::Counted::new(),
                };
                bare.plainly(&workload.setup)?;
                Ok(bare)
            })
            .collect::<Result<Vec<_>, Failure>>()?;
        Ok(Self {
            workload,
            entries,
            stock,
            ours,
            bare,
        })
    }

    /// The pass with tracing, which also tells the replays what to replay.
    pub fn count(&mut self, scenario: &Scenario) -> Result<(), Failure> {
        let Self {
            workload,
            stock,
            ours,
            bare,
            ..
        } = self;
        for (index, side) in ours.iter_mut().enumerate() {
            let bare = &mut bare[index];
            let requests = side.count(workload)?;
            let (steps, left_out) = replay::steps_of(side.guest.machine.pid(), &requests.calls())?;
            bare.left_out = left_out;
            bare.scripts = requests.scripts(workload, steps)?;
            if workload.bare_frees {
                bare.own = bare.scripts.clone();
                let added = bare
                    .scripts
                    .iter_mut()
                    .map(Script::free_at_once)
                    .sum::<u64>();
                bare.figures.fact("calls_that_ours_put_off", added);
            }
            for script in &bare.scripts {
                script.verify(&bare.kernel)?;
            }
            bare.plainly(&workload.undo)?;
            // Once more without a guest between the requests: with all caches warm, which no VMM's are.
            let times = replay::run_parallel(&bare.scripts, &bare.kernel, &[])?;
            let mut warm = Figures::default();
            replay::record(&mut warm, &times);
            bare.figures.fact("without_a_guest", warm.json());
            bare.plainly(&workload.undo)?;
        }
        stock.count(workload)?;
        scenario.progress("system calls counted");
        Ok(())
    }

    /// The timed runs: everybody once, then everybody again.
    pub fn race(&mut self, scenario: &Scenario) -> Result<(), Failure> {
        for run in 0..self.workload.runs {
            self.stock.timed(self.workload)?;
            for (ours, bare) in self.ours.iter_mut().zip(&mut self.bare) {
                ours.timed(self.workload)?;
                bare.timed(self.workload)?;
            }
            scenario.progress(format!("run {} of {}", run + 1, self.workload.runs));
        }
        Ok(())
    }

    /// The report's cases.
    pub fn cases(&self) -> Vec<Value> {
        self.entries
            .iter()
            .zip(self.ours.iter().zip(&self.bare))
            .map(|((name, _), (ours, bare))| {
                json!({
                    "name": name,
                    "requests": self.workload.timed.count(),
                    "stock": self.stock.figures.json(),
                    "gmem": ours.figures.json(),
                    "bare": bare.json(),
                })
            })
            .collect()
    }
}

/// A traced run.
struct Traced {
    run: Run,
    calls: Vec<super::calls::Call>,
    vcpus: Vec<u32>,
}

impl Traced {
    fn calls(&self) -> Vec<Vec<&super::calls::Call>> {
        by_request(&self.run, &self.calls, &self.vcpus)
    }

    /// For each sequence of calls that requests came to: how many did, and the median time from the exit to the beginning
    /// of each call and to the re-entry. Where a request's time goes, tracing included.
    fn timeline(&self) -> Value {
        let mut kinds: BTreeMap<Vec<String>, Vec<Vec<f64>>> = BTreeMap::new();
        for (exit, calls) in self.run.exits.iter().zip(self.calls()) {
            let calls: Vec<_> = calls.iter().filter(|call| !call.is_ours()).collect();
            if calls.len() > 8 {
                continue;
            }
            let names = calls.iter().map(|call| call.name()).collect();
            let mut times: Vec<f64> = calls
                .iter()
                .map(|call| call.ns as f64 - exit.exit_ns as f64)
                .collect();
            times.push(exit.nanoseconds() as f64);
            kinds.entry(names).or_default().push(times);
        }
        let kinds = kinds.into_iter().map(|(mut names, times)| {
            names.push("re-entry".into());
            let steps: Vec<String> = names
                .iter()
                .enumerate()
                .map(|(at, name)| {
                    let column: Vec<f64> = times.iter().map(|row| row[at]).collect();
                    format!("{name} {:.0}", median(&column) / 1000.0)
                })
                .collect();
            format!("{} x {}", times.len(), steps.join(", "))
        });
        json!(kinds.collect::<Vec<_>>())
    }

    /// One script for each vCPU that made requests.
    fn scripts(
        &self,
        workload: &Workload,
        steps: Vec<Vec<replay::Step>>,
    ) -> Result<Vec<Script>, Failure> {
        let mut by_vcpu: Vec<Vec<Vec<replay::Step>>> =
            vec![Vec::new(); workload.timed.requests.len()];
        for (exit, steps) in self.run.exits.iter().zip(steps) {
            by_vcpu
                .get_mut(exit.vcpu)
                .attempt(|| format!("a request of vCPU {} was not expected", exit.vcpu))?
                .push(steps);
        }
        workload
            .timed
            .requests
            .iter()
            .zip(by_vcpu)
            .map(|(requests, steps)| Script::new(requests.clone(), steps))
            .collect()
    }
}

impl Contestant {
    /// Where the time of one batch's requests goes, for a case that counts no calls.
    pub fn look_at(&mut self, verb: &str) -> Result<Value, Failure> {
        let vcpus = self.guest.vcpus()?;
        let (run, calls) = self.guest.run_traced(verb)?;
        Ok(Traced { run, calls, vcpus }.timeline())
    }

    fn count(&mut self, workload: &Workload) -> Result<Traced, Failure> {
        let vcpus = self.guest.vcpus()?;
        let (run, calls) = self.guest.run_traced(&workload.timed.verb)?;
        let traced = Traced { run, calls, vcpus };
        let mut counts = Counts::of(traced.calls().into_iter().flatten());
        // Whoever maps counts, wherever; what else other threads did was not for these requests.
        let elsewhere =
            Counts::of(by_others(&traced.run, &traced.calls, &traced.vcpus).into_iter());
        counts.map += elsewhere.map;
        counts.unmap += elsewhere.unmap;
        counts.attributes += elsewhere.attributes;
        self.figures.counts = Some(counts);
        self.figures
            .fact("microseconds_to_each_call", traced.timeline());
        self.figures
            .fact("syscalls_of_other_threads", json!(elsewhere.by_name));
        self.undo(workload)?;
        Ok(traced)
    }

    fn timed(&mut self, workload: &Workload) -> Result<(), Failure> {
        let mut messages = Messages::from_now()?;
        let before = slab_bytes()?;
        let huge = HugeShmem::now()?;
        let run = self.guest.run(&workload.timed.verb)?;
        let growth = slab_bytes()? - before;
        let after = HugeShmem::now()?;
        let faults = messages.count(&["DMAR", "fault addr"])?;
        let figures = &mut self.figures;
        figures.slab_bytes.get_or_insert(growth);
        figures.runs.push(run.seconds());
        figures
            .requests
            .extend(run.exits.iter().map(|exit| exit.nanoseconds()));
        figures.add("dma_faults", faults);
        if workload.huge_shmem {
            // Where the kernel had none, all of 2 MiB came as single pages.
            figures.add("huge_pages_allocated", after.allocated - huge.allocated);
            figures.add("huge_pages_not_found", after.not_found - huge.not_found);
        }
        for (name, index) in [("guest_p50_us", 3), ("guest_p99_us", 4)] {
            let nanoseconds = run.answer.get(index).copied().unwrap_or(0);
            figures.most(name, nanoseconds / 1000);
        }
        // What the device did, where it did something (bench-neighbours).
        for (name, index) in [
            ("neighbour_writes", 5),
            ("wrong_words", 6),
            ("unfinished_writes", 7),
        ] {
            if let Some(value) = run.answer.get(index) {
                figures.add(name, *value);
            }
        }
        self.describe()?;
        self.undo(workload)
    }

    /// What query-gmem says at the end of a run.
    fn describe(&mut self) -> Result<(), Failure> {
        let Some(gmem) = self.guest.gmem()? else {
            return Ok(());
        };
        let block = gmem.block("ram0")?;
        self.figures.fact("strategy", block.text("dma-strategy")?);
        self.figures.fact("areas", block.number("dma-areas")?);
        for name in ["remap-windows", "retries", "quarantined"] {
            if let Ok(value) = block.number(name) {
                self.figures.most(&name.replace('-', "_"), value);
            }
        }
        Ok(())
    }

    pub fn undo(&mut self, workload: &Workload) -> Result<(), Failure> {
        for batch in &workload.undo {
            self.guest.run(&batch.verb)?;
        }
        Ok(())
    }
}

impl Bare {
    fn plainly(&self, batches: &[Batch]) -> Result<(), Failure> {
        for request in batches
            .iter()
            .flat_map(|batch| batch.requests.iter().flatten())
        {
            replay::apply(&self.kernel, request, &replay::plain(request, self.unit))?;
        }
        Ok(())
    }

    fn timed(&mut self, workload: &Workload) -> Result<(), Failure> {
        let before = slab_bytes()?;
        let times = replay::run_parallel(&self.scripts, &self.kernel, &self.vcpus)?;
        let growth = slab_bytes()? - before;
        self.figures.slab_bytes.get_or_insert(growth);
        replay::record(&mut self.figures, &times);
        self.plainly(&workload.undo)?;
        if !self.own.is_empty() {
            let times = replay::run_parallel(&self.own, &self.kernel, &self.vcpus)?;
            replay::record(&mut self.own_figures, &times);
            self.plainly(&workload.undo)?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let mut side = match self.figures.json() {
            Value::Object(side) => side,
            _ => Map::new(),
        };
        side.insert("calls".into(), json!(replay::counts(&self.scripts)));
        side.insert("threads".into(), json!(self.scripts.len()));
        side.insert("not_replayed".into(), json!(self.left_out));
        if !self.own.is_empty() {
            let mut own = self.own_figures.json();
            own["calls"] = json!(replay::counts(&self.own));
            side.insert("calls_of_ours_only".into(), own);
        }
        Value::Object(side)
    }
}

/// The end of the highest range that a request names, in whole GiB.
fn highest(workload: &Workload) -> u64 {
    let batches = workload.setup.iter().chain(&workload.undo);
    batches
        .chain([&workload.timed])
        .flat_map(|batch| batch.requests.iter().flatten())
        .map(|request| request.address + request.pages * 4096)
        .max()
        .unwrap_or(0)
        .next_multiple_of(1 << 30)
}

/// L1's setting for all sides alike: whether shared memory may come in 2 MiB pages for those who ask for it, as the
/// administrator of a host for such guests would want for large requests, or comes in pages of 4 KiB. QEMU asks for it
/// on both sides (it advises all guest RAM); who is pinned page by page gets small pages all the same.
pub fn set_huge_shmem(huge: bool) -> Result<(), Failure> {
    const PATH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let value = if huge { "advise" } else { "never" };
    std::fs::write(PATH, value).attempt(|| format!("writing {value} to {PATH}"))
}

/// The kernel's counts of 2 MiB pages for shared memory.
struct HugeShmem {
    allocated: u64,
    not_found: u64,
}

impl HugeShmem {
    fn now() -> Result<Self, Failure> {
        Ok(Self {
            allocated: pages::count("thp_file_alloc")?,
            not_found: pages::count("thp_file_fallback")?,
        })
    }
}
