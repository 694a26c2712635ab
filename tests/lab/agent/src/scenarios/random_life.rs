// SPDX-License-Identifier: MIT OR Apache-2.0
//! A confidential guest lives a random life, with a ledger beside it: conversions of any size, DMA to shared and private pages,
//! senseless requests, stop and cont, reads by the monitor, resets, devices and memory that come and go.
//!
//! The kernel command line says how long and which: `lab.seconds=`, `lab.seed=`. One seed is one sequence of events; the console
//! has each of them before it happens.

use crate::boot::CommandLine;
use crate::confidential::{many_runs, Confidential};
use crate::dma::Engine;
use crate::failure::{Attempt, Failure};
use crate::host::passthrough::{to_vfio, EDU};
use crate::ledger::PAGE;
use crate::monitor::protocol::{pattern, MAP_GPA_ENCRYPTED};
use crate::plugging::{Module, Port};
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
/// Pages that stay shared, for the device to carry from and to.
const ORIGIN: u64 = 8 * MIB;
const ELSEWHERE: u64 = 9 * MIB;
/// What is converted, in RAM and in the module.
const RAM: (u64, u64) = (16 * MIB, 96 * MIB);
const MODULE: Module = Module {
    device: "dimm0",
    backend: "mem1",
    bytes: 64 * MIB,
};
const PORT: Port = Port {
    bus: "port0",
    device: "edu0",
};
const SECONDS: u64 = 60;
/// Guest, QEMU and kernel are asked whether they agree after so many events.
const AGREE_EVERY: u64 = 50;
/// Requests are as often of 1 page as of 2, 4, … up to this.
const MOST_PAGES_LOG2: u64 = 10;

pub fn run(scenario: &mut Scenario, command_line: &CommandLine) -> Outcome {
    let number = |name: &str| command_line.value(name).map(str::parse::<u64>).transpose();
    let seconds = number("lab.seconds").attempt(|| "lab.seconds= wants a number".into())?;
    let seed = number("lab.seed").attempt(|| "lab.seed= wants a number".into())?;
    let seconds = seconds.unwrap_or(SECONDS);
    let seed = seed.unwrap_or_else(a_new_seed);
    scenario.fact("seed", seed);
    scenario.progress(format!("seed {seed}, {seconds} s"));

    let device = to_vfio(&EDU)?;
    let guest = Confidential::with_one_block(
        scenario.directory(),
        RAM_BYTES,
        many_runs(),
        &[
            "-m",
            "slots=2,maxmem=1G",
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            "pcie-root-port,id=port0,chassis=1",
        ],
    )?;
    let mut life = Life {
        guest,
        device,
        chance: Chance(seed),
        plugged: false,
        module: None,
        happened: BTreeMap::new(),
        fills: 0,
    };
    let outcome = life.lead(scenario, Duration::from_secs(seconds));
    // Which life it was is in the report of a failure, too.
    outcome.map_err(|failure| Failure::new(format!("seed {seed}: {failure}")))?;
    for (event, times) in &life.happened {
        scenario.fact(event, *times);
    }
    scenario.fact("agreements", life.guest.agreements);
    scenario.fact("compared_bytes", life.guest.compared_bytes);
    life.guest.finish(scenario)
}

struct Life {
    guest: Confidential,
    device: String,
    chance: Chance,
    plugged: bool,
    /// Where the module is, if it is there.
    module: Option<u64>,
    happened: BTreeMap<&'static str, u64>,
    fills: u64,
}

/// What can happen next.
#[derive(Clone, Copy, Debug)]
enum Event {
    ToPrivate,
    ToShared,
    Fill,
    Check,
    DmaToShared,
    DmaToPrivate,
    StopAndCont,
    MonitorRead,
    Senseless,
    Reset,
    Device,
    Module,
}

/// With how often each comes, in relation to the others.
const EVENTS: &[(Event, &str, u64)] = &[
    (Event::ToPrivate, "conversions to private", 30),
    (Event::ToShared, "conversions to shared", 25),
    (Event::Fill, "fills", 10),
    (Event::Check, "checks", 10),
    (Event::DmaToShared, "DMA to shared pages", 6),
    (Event::DmaToPrivate, "DMA to private pages", 6),
    (Event::StopAndCont, "stop and cont", 4),
    (Event::MonitorRead, "reads by the monitor", 6),
    (Event::Senseless, "senseless requests", 6),
    (Event::Reset, "resets", 1),
    (Event::Device, "devices plugged or unplugged", 2),
    (Event::Module, "modules plugged or unplugged", 1),
];

impl Life {
    fn lead(&mut self, scenario: &mut Scenario, how_long: Duration) -> Outcome {
        let begin = Instant::now();
        let mut count = 0;
        while begin.elapsed() < how_long {
            count += 1;
            let (event, name) = self.choose();
            self.happens(scenario, event)
                .map_err(|failure| Failure::new(format!("event {count} ({event:?}): {failure}")))?;
            *self.happened.entry(name).or_default() += 1;
            if count % AGREE_EVERY == 0 {
                self.agree(scenario, count)?;
            }
        }
        scenario.fact("events", count);
        self.agree(scenario, count)
    }

    fn agree(&mut self, scenario: &Scenario, count: u64) -> Outcome {
        self.guest
            .agree(scenario, &format!("after {count} events"))?;
        let gmem = Gmem::query(&mut self.guest.machine.qmp)?;
        let expected = match self.plugged {
            true => gmem.sum("shared")?,
            false => 0,
        };
        scenario.check_equal(
            gmem.sum("dma-mapped")?,
            expected,
            format!("after {count} events: bytes that the device reaches"),
        )
    }

    fn choose(&mut self) -> (Event, &'static str) {
        let all: u64 = EVENTS.iter().map(|(.., weight)| weight).sum();
        let mut at = self.chance.below(all);
        for &(event, name, weight) in EVENTS {
            if at < weight {
                return (event, name);
            }
            at -= weight;
        }
        unreachable!("the weights add up to what was drawn from")
    }

    fn happens(&mut self, scenario: &Scenario, event: Event) -> Outcome {
        match event {
            Event::ToPrivate => {
                let (gpa, bytes) = self.range();
                self.said(format_args!("to private: {gpa:#x} + {bytes:#x}"));
                self.guest.convert(scenario, gpa, bytes, true)?;
                // Touched, so that the kernel's count is the ledger's.
                self.fill(gpa, bytes)
            }
            Event::ToShared => {
                let (gpa, bytes) = self.range();
                self.said(format_args!("to shared: {gpa:#x} + {bytes:#x}"));
                self.guest.convert(scenario, gpa, bytes, false)
            }
            Event::Fill => {
                let (gpa, bytes) = self.range();
                self.said(format_args!("fill: {gpa:#x} + {bytes:#x}"));
                self.fill(gpa, bytes)
            }
            Event::Check => self.check(scenario),
            Event::DmaToShared => self.dma(scenario, false),
            Event::DmaToPrivate => self.dma(scenario, true),
            Event::StopAndCont => {
                self.said(format_args!("stop and cont"));
                self.guest.machine.qmp.execute("stop", json!({}))?;
                self.monitor_read(scenario)?;
                self.guest.machine.qmp.execute("cont", json!({}))?;
                self.guest.monitor.ask("ping").map(|_| ())
            }
            Event::MonitorRead => self.monitor_read(scenario),
            Event::Senseless => self.senseless(scenario),
            Event::Reset => self.reset(),
            Event::Device => self.device(),
            Event::Module => self.module(),
        }
    }

    /// Some range, as often short as long, and never over an end.
    fn range(&mut self) -> (u64, u64) {
        let (start, bytes) = self.area();
        let most = self.chance.below(MOST_PAGES_LOG2 + 1);
        let pages = 1 + self.chance.below(1 << most);
        let first = self.chance.below(bytes / PAGE - pages + 1);
        (start + first * PAGE, pages * PAGE)
    }

    fn area(&mut self) -> (u64, u64) {
        match self.module {
            Some(gpa) if self.chance.below(4) == 0 => (gpa, MODULE.bytes),
            _ => RAM,
        }
    }

    /// A page of this kind, if one is found quickly.
    fn page(&mut self, private: bool) -> Option<u64> {
        (0..256).find_map(|_| {
            let (start, bytes) = self.area();
            let page = start + self.chance.below(bytes / PAGE) * PAGE;
            (self.guest.ledger.is_private(page) == private).then_some(page)
        })
    }

    fn fill(&mut self, gpa: u64, bytes: u64) -> Outcome {
        self.fills += 1;
        self.guest.fill(gpa, bytes, 100_000 + self.fills)
    }

    fn known(&mut self) -> Option<(u64, u64, u64)> {
        let known = self.guest.ledger.contents();
        let count = known.len() as u64;
        (count > 0).then(|| known[self.chance.below(count) as usize])
    }

    fn check(&mut self, scenario: &Scenario) -> Outcome {
        let Some((gpa, bytes, seed)) = self.known() else {
            return Ok(());
        };
        self.said(format_args!("check: {gpa:#x} + {bytes:#x}"));
        let difference = self.guest.monitor.check(gpa, bytes, seed)?;
        self.guest.compared_bytes += bytes;
        scenario.check_equal(
            difference,
            None,
            format!("the guest finds what it wrote to {bytes:#x} bytes at {gpa:#x}"),
        )
    }

    fn dma(&mut self, scenario: &Scenario, private: bool) -> Outcome {
        let Some(target) = self.page(private).filter(|_| self.plugged) else {
            return Ok(());
        };
        self.said(format_args!("DMA, private {private}: {target:#x}"));
        let engine = Engine::new(0, ORIGIN);
        match private {
            true => engine.misses(scenario, &mut self.guest, target, ELSEWHERE),
            false => engine.reaches(scenario, &mut self.guest, target),
        }
    }

    /// The monitor sees the first word of a shared page, and not that of a private one.
    fn monitor_read(&mut self, scenario: &Scenario) -> Outcome {
        let Some((page, _, seed)) = self.known() else {
            return Ok(());
        };
        self.said(format_args!("read by the monitor: {page:#x}"));
        let answer = self.guest.machine.qmp.execute(
            "human-monitor-command",
            json!({"command-line": format!("xp /1xg {page:#x}")}),
        )?;
        let word = format!("0x{:016x}", pattern(seed, page));
        let private = self.guest.ledger.is_private(page);
        scenario.check_equal(
            answer.as_str().is_some_and(|text| text.contains(&word)),
            !private,
            format!("whether the monitor sees {word} at {page:#x}, private {private}: {answer}"),
        )
    }

    /// Nothing changes, whatever the answer is; where there is no memory it is an error.
    fn senseless(&mut self, scenario: &Scenario) -> Outcome {
        let hole = (1 << 40) + self.chance.below(1 << 20) * PAGE;
        let (gpa, pages) = match self.chance.below(5) {
            0 => (hole, 1 + self.chance.below(512)),
            1 => (RAM.0 + 8, 1),
            2 => (RAM.0, 0),
            3 => (RAM_BYTES - PAGE, 2 + self.chance.below(1 << 20)),
            _ => (RAM.0, u64::MAX - self.chance.below(1 << 30)),
        };
        self.said(format_args!("senseless: {gpa:#x}, {pages:#x} pages"));
        let monitor = &mut self.guest.monitor;
        let result = monitor.convert_raw(gpa, pages, MAP_GPA_ENCRYPTED)?;
        scenario.check(
            result != 0,
            format!("to private of {pages:#x} pages at {gpa:#x} is an error"),
        )
    }

    fn reset(&mut self) -> Outcome {
        let by_guest = self.chance.below(2) == 0;
        self.said(format_args!("reset, by guest {by_guest}"));
        match by_guest {
            true => {
                self.guest.monitor.ask("reset")?;
            }
            false => {
                let qmp = &mut self.guest.machine.qmp;
                qmp.execute("system_reset", json!({}))?;
            }
        }
        self.guest.monitor.wait_until_ready()?;
        self.guest.monitor.ask("ping")?;
        self.guest.ledger.reset();
        Ok(())
    }

    fn device(&mut self) -> Outcome {
        self.said(format_args!("device, there is one: {}", self.plugged));
        match self.plugged {
            true => PORT.unplug(&mut self.guest)?,
            false => PORT.plug(&mut self.guest, &self.device, "iommufd0")?,
        }
        self.plugged = !self.plugged;
        Ok(())
    }

    fn module(&mut self) -> Outcome {
        self.said(format_args!("module, there is one: {:x?}", self.module));
        match self.module.take() {
            Some(_) => {
                MODULE.unplug(&mut self.guest)?;
                MODULE.is_freed(&mut self.guest)
            }
            None => {
                MODULE.plug(&mut self.guest)?;
                self.module = Some(MODULE.is_there(&mut self.guest)?);
                Ok(())
            }
        }
    }

    /// On the console, where it is found when nothing follows.
    fn said(&self, event: std::fmt::Arguments) {
        println!("life: {event}");
    }
}

/// Numbers that look random and depend on the seed alone (SplitMix64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `limit`, which is small beside 2^64: none is noticeably more likely.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

fn a_new_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    // Short enough to be typed.
    now.map_or(1, |time| Chance(time.as_nanos() as u64).below(1_000_000))
}

#[cfg(test)]
mod tests {
    use super::{Chance, EVENTS};

    #[test]
    fn a_seed_is_a_sequence() {
        let of = |seed| {
            let mut chance = Chance(seed);
            [(); 4].map(|()| chance.below(1000))
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    #[test]
    fn everything_can_happen() {
        assert!(EVENTS.iter().all(|(.., weight)| *weight > 0));
    }
}
