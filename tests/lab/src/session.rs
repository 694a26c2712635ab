// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs scenarios in L1 and turns what is heard, or not heard, into one outcome for each.

use crate::machine::{self, Heard, Machine, Running};
use crate::mode::{Mode, Run};
use crate::nvme::Disk;
use crate::report::{Line, Outcome};
use crate::scheduled::Scheduled;
use crate::{images::Images, interrupt, process, ui};
use anyhow::{Context, Result};
use serde_json::Map;
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const WITH_DISK: &str = "ordinary-vfio-nvme";

/// From power-on to the first report, and from the last one to power-off.
const BOOT: u64 = 60;
const BETWEEN: u64 = 60;
const CONSOLE_LINES: usize = 20;
/// The emulator now and then hangs while L1's kernel boots, before anything of ours runs: then L1 is
/// switched on again, and said so. One that does not come up so often in a row will not.
const FRUITLESS_BOOTS: usize = 3;

/// What a session needs from what was prepared.
pub struct Session<'a> {
    pub qemu: &'a Path,
    pub firmware: &'a Path,
    pub images: &'a Images,
    /// Those with the kernel as it came, for a session that has runs in that mode.
    pub unpatched: Option<&'a Images>,
    pub results: PathBuf,
    /// Multiplies every time limit; for machines slower than two cores of today.
    pub patience: f64,
    pub shape: machine::Shape,
    /// More for the kernel's command line.
    pub words: &'a str,
}

/// How one boot ended for the scenarios it was given.
struct Boot {
    outcomes: Vec<Outcome>,
    /// Why not even the first one began.
    stillborn: Option<Outcome>,
    /// The first failure of one that is to be tried again.
    again: Option<Outcome>,
}

/// Scenarios that failed once, and why. The emulator's nested SVM now and then corrupts a processor's
/// state (L1's own kernel then reports a bug, or a guest dies in its first second), so a failure is
/// tried once more on a fresh L1. Both the note and the fact `first_try` say so.
type FirstTries = HashMap<String, String>;

impl Session<'_> {
    /// Runs all scenarios, mode by mode, booting L1 again for the rest when one takes it down. Calls `ended` for each as it
    /// ends.
    pub fn run(&self, runs: &[Run], mut ended: impl FnMut(&Run, &Outcome)) -> Result<Vec<Outcome>> {
        machine::require_memory(&self.shape)?;
        remove_consoles(&self.results);
        let mut outcomes = Vec::new();
        let mut boot = 0;
        for mode in Mode::ALL {
            let waiting = runs.iter().filter(|run| run.mode == mode).cloned();
            outcomes.extend(self.run_mode(mode, waiting.collect(), &mut boot, &mut ended)?);
        }
        Ok(outcomes)
    }

    fn run_mode(
        &self,
        mode: Mode,
        mut waiting: VecDeque<Run>,
        boot: &mut usize,
        ended: &mut impl FnMut(&Run, &Outcome),
    ) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        let mut fruitless = 0;
        let mut tried = FirstTries::new();
        while !waiting.is_empty() {
            *boot += 1;
            let result = self.boot(*boot, mode, waiting.make_contiguous(), &tried, ended)?;
            waiting.drain(..result.outcomes.len());
            outcomes.extend(result.outcomes);
            if let Some(outcome) = result.again {
                let why = outcome.error.unwrap_or_default();
                ui::note(&format!(
                    "{} failed once and is tried again on a fresh L1: {why} (console in {})",
                    outcome.name,
                    machine::console_path(&self.results, *boot).display()
                ));
                tried.insert(outcome.name, why);
                continue;
            }
            let Some(outcome) = result.stillborn else {
                fruitless = 0;
                continue;
            };
            fruitless += 1;
            if fruitless < FRUITLESS_BOOTS {
                ui::note(&format!(
                    "L1 did not come up (its console is in {}); booting it again",
                    machine::console_path(&self.results, *boot).display()
                ));
                continue;
            }
            let mut outcome = Some(outcome);
            for run in waiting.drain(..) {
                let outcome = outcome.take().unwrap_or_else(|| {
                    failed(&run.name(), 0.0, "not run: L1 did not come up".into())
                });
                ended(&run, &outcome);
                outcomes.push(outcome);
            }
        }
        Ok(outcomes)
    }

    /// One boot of L1. Ends at least one scenario, or says why L1 did not come up.
    fn boot(
        &self,
        boot: usize,
        mode: Mode,
        runs: &[Run],
        tried: &FirstTries,
        ended: &mut impl FnMut(&Run, &Outcome),
    ) -> Result<Boot> {
        std::fs::create_dir_all(self.results.join("logs"))
            .with_context(|| format!("can't write to {}", self.results.display()))?;
        let disk = Disk::create(&self.results.join("nvme.img"))?;
        let console = machine::console_path(&self.results, boot);
        let machine = Machine {
            qemu: self.qemu,
            firmware: self.firmware,
            images: match mode {
                Mode::Unpatched => self.unpatched.context("there is no unpatched kernel")?,
                _ => self.images,
            },
            nvme: disk.path(),
            shape: self.shape,
            mode,
            words: self.words,
            monitor: None,
        };
        let names: Vec<&str> = runs.iter().map(|run| run.scenario).collect();
        let step = ui::step("L1", "booting");
        let errors = self.results.join("logs/l0.log");
        let mut running = machine.start(&names, &console, &errors)?;
        let mut watch = Watch {
            running: &mut running,
            scale: self.patience,
            since: Instant::now(),
            deadline: Instant::now(),
            before: Scheduled::default(),
        };
        let mut result = Boot {
            outcomes: Vec::new(),
            stillborn: None,
            again: None,
        };
        let mut came_up = false;
        for (index, run) in runs.iter().enumerate() {
            let before = if index == 0 { BOOT } else { BETWEEN };
            let (mut outcome, alive) = watch.scenario(run, before, &step, &mut came_up)?;
            if !alive {
                outcome.console = Some(process::tail(&console, CONSOLE_LINES));
                let said = process::tail(&errors, 3);
                if !said.is_empty() {
                    outcome.fail(format!("L0 said: {said}"));
                }
            } else if run.scenario == WITH_DISK && outcome.ok {
                disk.verify(&mut outcome)?;
            }
            if !came_up {
                result.stillborn = Some(outcome);
                return Ok(result);
            }
            match tried.get(&outcome.name) {
                Some(why) => {
                    outcome.facts.insert("first_try".into(), why.clone().into());
                }
                None if !outcome.ok => {
                    result.again = Some(outcome);
                    return Ok(result);
                }
                None => {}
            }
            ended(run, &outcome);
            result.outcomes.push(outcome);
            if !alive {
                return Ok(result);
            }
        }
        watch.power_off(&step)?;
        Ok(result)
    }
}

/// Listens to one running L1 against the clock.
struct Watch<'a> {
    running: &'a mut Running,
    scale: f64,
    since: Instant,
    deadline: Instant,
    /// What the emulator was given before this wait.
    before: Scheduled,
}

/// What ended a wait.
enum Event {
    Line(Line),
    TimedOut,
    End,
}

impl Watch<'_> {
    fn allow(&mut self, seconds: u64) {
        self.since = Instant::now();
        self.deadline = self.since + Duration::from_secs(seconds).mul_f64(self.scale);
        self.before = self.running.scheduled();
    }

    /// What L1 did with the time it was allowed.
    fn meanwhile(&self) -> String {
        let given = self.running.scheduled().since(self.before);
        given.in_words(self.since.elapsed())
    }

    fn next(&mut self) -> Result<Event> {
        loop {
            interrupt::check()?;
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Event::TimedOut);
            }
            match self.running.listen(left.min(Duration::from_millis(200)))? {
                Heard::Line(text) => {
                    if let Some(line) = Line::parse(&text) {
                        return Ok(Event::Line(line));
                    }
                }
                Heard::Nothing => (),
                Heard::End => return Ok(Event::End),
            }
        }
    }

    /// Waits for one scenario's start and result. Says also whether L1 is still there for the next one.
    fn scenario(
        &mut self,
        run: &Run,
        before: u64,
        step: &ui::Step,
        came_up: &mut bool,
    ) -> Result<(Outcome, bool)> {
        let (name, limit) = (run.name(), run.seconds);
        self.allow(before);
        let mut begin: Option<Instant> = None;
        loop {
            let seconds = begin.map_or(0.0, |time| time.elapsed().as_secs_f64());
            let lost = |what: &str| (failed(&name, seconds, what.into()), false);
            match self.next()? {
                Event::Line(Line::Start { scenario }) if scenario == run.scenario => {
                    *came_up = true;
                    begin = Some(Instant::now());
                    self.allow(limit);
                    step.turn(&name);
                }
                Event::Line(Line::Progress { scenario, text }) if scenario == run.scenario => {
                    step.turn(&format!("{name}: {text}"));
                }
                Event::Line(Line::Result {
                    scenario,
                    ok,
                    seconds,
                    facts,
                    error,
                }) if scenario == run.scenario => {
                    let outcome = Outcome {
                        name,
                        // A failure has a reason and a success has none; anything else is a broken agent.
                        ok: ok && error.is_none(),
                        seconds,
                        facts,
                        error: error.or_else(|| (!ok).then(|| "no reason given".to_string())),
                        console: None,
                    };
                    return Ok((outcome, true));
                }
                Event::Line(Line::Done) => {
                    return Ok(lost(
                        "L1 says that it is done and never reported this scenario",
                    ));
                }
                Event::Line(_) => (),
                Event::TimedOut if begin.is_none() => {
                    return Ok(lost(&format!(
                        "L1 did not begin it within {} s ({})",
                        (before as f64 * self.scale).round(),
                        self.meanwhile()
                    )));
                }
                Event::TimedOut => {
                    return Ok(lost(&format!(
                        "no result within {} s ({})",
                        (limit as f64 * self.scale).round(),
                        self.meanwhile()
                    )));
                }
                Event::End if begin.is_none() => return Ok(lost("L1 went down before it began")),
                Event::End => return Ok(lost("L1 went down while it ran (a kernel panic?)")),
            }
        }
    }

    /// Lets L1 switch itself off; if it does not, dropping it does.
    fn power_off(&mut self, step: &ui::Step) -> Result<()> {
        step.turn("powering off");
        self.allow(BETWEEN);
        loop {
            match self.next()? {
                Event::Line(_) => (),
                Event::TimedOut => {
                    ui::note("L1 did not power off by itself; it was switched off");
                    return Ok(());
                }
                Event::End => return Ok(()),
            }
        }
    }
}

fn failed(name: &str, seconds: f64, error: String) -> Outcome {
    Outcome {
        name: name.into(),
        ok: false,
        seconds,
        facts: Map::new(),
        error: Some(error),
        console: None,
    }
}

/// A console of an earlier run would be taken for one of this.
fn remove_consoles(results: &Path) {
    let Ok(entries) = std::fs::read_dir(results) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("console") && name.ends_with(".log") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
