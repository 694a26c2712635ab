// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab life`: the scenario `random-life` for as long as one likes, as often as one likes, each time on a fresh L1.
//!
//! What it is for besides: to count how often L1 itself freezes, and to keep what L0 knows of its processors then.

use crate::machine::{self, Heard, Machine, Running, Shape};
use crate::mode::Mode;
use crate::nvme::Disk;
use crate::prepare::{self, Ground, Prepared};
use crate::report::Line;
use crate::scheduled::Scheduled;
use crate::{demo, interrupt, ui};
use anyhow::{bail, Context, Result};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const SCENARIO: &str = "random-life";
/// L1 reports after every 50 events, some 10 s on two cores.
const SILENCE: Duration = Duration::from_secs(150);
/// What L0 is asked of an L1 that is silent.
const QUESTIONS: &[&str] = &[
    "info status",
    "info cpus",
    "info lapic 0",
    "info lapic 1",
    "info registers -a",
];
const ANSWER: Duration = Duration::from_secs(3);
/// An NMI takes every processor once round its idle loop, which arms its timer anew. L1 that goes on then waited for
/// an interrupt that never came; L1 that does not has nothing to do.
const NUDGE: &str = "nmi";
const AFTER_NUDGE: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub struct Options {
    /// How long each life is
    #[arg(long, default_value_t = 240)]
    seconds: u64,
    /// The first life; the next ones count up from there [default: by the clock]
    #[arg(long)]
    seed: Option<u64>,
    /// How many lives, each on an L1 of its own
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// On the kernel that converts in place
    #[arg(long)]
    in_place: bool,
    /// L1's idle processors poll instead of halting
    #[arg(long)]
    poll: bool,
}

/// How a life ended.
enum End {
    Well(String),
    Failed(String),
    /// Nothing was heard of L1 any more.
    Silent(Silence),
}

struct Silence {
    /// When L1 said its last word.
    after: Duration,
    /// How long it was waited for another.
    lasted: Duration,
    /// What the emulator was given in this time.
    given: Scheduled,
}

impl Silence {
    /// An emulator that is not let run, or that computes, is no frozen one.
    fn is_frozen(&self) -> bool {
        self.given.stood_still(self.lasted)
    }
}

/// Runs them; says whether all ended well.
pub fn run(ground: &Ground, options: &Options, patience: f64) -> Result<bool> {
    let results = ground.tree.results();
    std::fs::create_dir_all(results.join("logs"))?;
    let _results = demo::results_lock(ground)?;
    let prepared = {
        let _cache = ground.cache.lock()?;
        prepare::prepare(ground)?
    };
    if options.in_place && !prepared.kernel.offers(Mode::InPlace) {
        bail!(demo::NO_IN_PLACE);
    }
    let shape = if options.poll {
        machine::POLLING
    } else {
        machine::SMALL
    };
    machine::require_memory(&shape)?;
    let (mut well, mut failed, mut frozen, mut silent) = (0, 0, 0, 0);
    for run in 0..options.runs {
        let seed = options.seed.map(|first| first + run);
        let place = format!("life-{}", run + 1);
        match live(ground, &prepared, shape, options, seed, &place, patience)? {
            End::Well(facts) => {
                well += 1;
                ui::line(&format!("{place}: ok  {facts}"));
            }
            End::Failed(why) => {
                failed += 1;
                ui::line(&format!("{place}: FAILED  {why}"));
            }
            End::Silent(silence) => {
                let what = if silence.is_frozen() {
                    frozen += 1;
                    "froze"
                } else {
                    silent += 1;
                    "is silent"
                };
                ui::line(&format!(
                    "{place}: L1 {what} after {} s: {}; what L0 knows of it is in target/lab/{place}.txt",
                    silence.after.as_secs(),
                    silence.given.in_words(silence.lasted)
                ));
            }
        }
    }
    ui::line(&format!(
        "{} lives of {} s: {well} ended well, {failed} failed, L1 froze in {frozen}, was silent otherwise in {silent}",
        options.runs, options.seconds
    ));
    Ok(failed + frozen + silent == 0)
}

fn live(
    ground: &Ground,
    prepared: &Prepared,
    shape: Shape,
    options: &Options,
    seed: Option<u64>,
    place: &str,
    patience: f64,
) -> Result<End> {
    let results = ground.tree.results();
    let disk = Disk::create(&results.join("nvme.img"))?;
    let monitor = results.join("l0.sock");
    let _ = std::fs::remove_file(&monitor);
    let mut words = format!("lab.seconds={}", options.seconds);
    if let Some(seed) = seed {
        words.push_str(&format!(" lab.seed={seed}"));
    }
    let machine = Machine {
        qemu: &prepared.qemu.binary,
        firmware: &prepared.firmware.share,
        images: &prepared.images,
        nvme: disk.path(),
        shape,
        mode: if options.in_place {
            Mode::InPlace
        } else {
            Mode::Split
        },
        words: &words,
        monitor: Some(&monitor),
    };
    let step = ui::step(place, "booting L1");
    let mut running = machine.start(
        &[SCENARIO],
        &results.join(format!("{place}-console.log")),
        &results.join("logs/l0.log"),
    )?;
    let end = listen(&mut running, SILENCE.mul_f64(patience), &step)?;
    if matches!(end, End::Silent(_)) {
        let ask = |questions: &[&str]| {
            ask_l0(&monitor, questions)
                .unwrap_or_else(|error| format!("L0 does not answer: {error}"))
        };
        let mut said = ask(QUESTIONS);
        said.push_str(&ask(&[NUDGE]));
        let again = matches!(running.listen(AFTER_NUDGE)?, Heard::Line(_));
        said.push_str(if again {
            "\nL1 goes on after an NMI: an interrupt was lost\n"
        } else {
            "\nL1 stays silent after an NMI\n"
        });
        said.push_str(&ask(QUESTIONS));
        let path = results.join(format!("{place}.txt"));
        std::fs::write(&path, said).with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(end)
}

fn listen(running: &mut Running, silence: Duration, step: &ui::Step) -> Result<End> {
    let begin = Instant::now();
    let mut heard = Instant::now();
    let mut before = running.scheduled();
    while heard.elapsed() < silence {
        interrupt::check()?;
        let line = match running.listen(Duration::from_millis(200))? {
            Heard::Line(text) => Line::parse(&text),
            Heard::Nothing => continue,
            Heard::End => return Ok(End::Failed("L1 went down".into())),
        };
        heard = Instant::now();
        before = running.scheduled();
        match line {
            Some(Line::Progress { text, .. }) => step.turn(&text),
            Some(Line::Result { error, facts, .. }) => {
                return Ok(match error {
                    None => End::Well(serde_json::to_string(&facts)?),
                    Some(why) => End::Failed(why),
                });
            }
            _ => (),
        }
    }
    Ok(End::Silent(Silence {
        after: heard - begin,
        lasted: heard.elapsed(),
        given: running.scheduled().since(before),
    }))
}

/// L0's own words, about its processors for example.
fn ask_l0(monitor: &Path, questions: &[&str]) -> Result<String> {
    let mut stream = UnixStream::connect(monitor).context("connecting to L0's monitor")?;
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut said = Vec::new();
    for question in questions {
        writeln!(stream, "{question}")?;
        let deadline = Instant::now() + ANSWER;
        let mut buffer = [0; 4096];
        while Instant::now() < deadline {
            if let Ok(count @ 1..) = stream.read(&mut buffer) {
                said.extend_from_slice(&buffer[..count]);
            }
        }
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}
