// SPDX-License-Identifier: MIT OR Apache-2.0
//! 4 GiB of each plane filled by the library, and by the best that as many threads can do with the kernel's calls alone.

use super::figures::{median, Figures};
use super::kernel::{self, Kernel, Plane};
use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::scenario::{Outcome, Scenario};
use gmem::{Attribute, Block, BlockConfig, Vm};
use serde_json::{json, Value};
use std::io;
use std::time::Instant;

const BYTES: u64 = 4 << 30;
const THREADS: u64 = 2;
const RUNS: usize = 5;
/// What a thread asks for at once. A guest_memfd's fallocate ends early when a signal comes, and small pieces let threads
/// end together.
const PIECE_BYTES: u64 = 64 << 20;

/// A way to fill a range of a plane.
type Way = (&'static str, fn(&Kernel, Plane, u64, u64) -> io::Result<()>);

const FALLOCATE: Way = ("fallocate", |kernel, plane, offset, bytes| {
    // A guest_memfd takes no other mode, and the size is what it is in either.
    kernel.fallocate(plane, libc::FALLOC_FL_KEEP_SIZE, offset, bytes)
});
const POPULATE: Way = ("populate_write", |kernel, _, offset, bytes| {
    kernel.madvise(libc::MADV_POPULATE_WRITE, offset, bytes)
});

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut cases = Vec::new();
    for (name, plane, ways) in [
        ("prealloc-shared", Plane::Shared, &[FALLOCATE, POPULATE][..]),
        // A private plane has no mapping to populate.
        ("prealloc-private", Plane::Private, &[FALLOCATE]),
    ] {
        cases.push(case(scenario, name, plane, ways)?);
        scenario.fact("cases", cases.clone());
    }
    Ok(())
}

fn case(scenario: &Scenario, name: &str, plane: Plane, ways: &[Way]) -> Result<Value, Failure> {
    let mut ours = Figures::default();
    let mut bare: Vec<Figures> = ways.iter().map(|_| Figures::default()).collect();
    // Each way once; the better one then takes turns with ours.
    for (way, figures) in ways.iter().zip(&mut bare) {
        figures.runs.push(by_hand(plane, *way)?);
    }
    let best = (0..ways.len())
        .min_by(|a, b| bare[*a].runs[0].total_cmp(&bare[*b].runs[0]))
        .attempt(|| "no way to fill memory".into())?;
    for run in 0..RUNS {
        ours.runs.push(by_the_library(plane)?);
        if run != 0 {
            bare[best].runs.push(by_hand(plane, ways[best])?);
        }
        scenario.progress(format!("{name}: run {} of {RUNS}", run + 1));
    }
    let facts: Vec<_> = ways
        .iter()
        .zip(&bare)
        .map(|((way, _), figures)| (format!("{way}_seconds"), median(&figures.runs)))
        .collect();
    for (name, seconds) in facts {
        bare[best].fact(&name, seconds);
    }
    bare[best].fact("method", ways[best].0);
    let mut side = bare[best].json();
    side["threads"] = json!(THREADS);
    Ok(json!({"name": name, "requests": 1, "gmem": ours.json(), "bare": side}))
}

fn by_the_library(plane: Plane) -> Result<f64, Failure> {
    let file = kernel::new_vm()?;
    let vm = Vm::new(&file).attempt(|| "giving the library a VM".into())?;
    let initial = match plane {
        Plane::Private => Attribute::Private,
        Plane::Shared => Attribute::Shared,
    };
    let block = Block::new(&vm, &BlockConfig::confidential("ram", BYTES, initial))
        .attempt(|| "making a block".into())?;
    let begin = Instant::now();
    block
        .preallocate(THREADS as usize)
        .attempt(|| "preallocating".into())?;
    Ok(begin.elapsed().as_secs_f64())
}

fn by_hand(plane: Plane, (name, fill): Way) -> Result<f64, Failure> {
    let kernel = Kernel::new(BYTES, None)?;
    let begin = Instant::now();
    let share = BYTES / THREADS;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let kernel = &kernel;
                scope.spawn(move || {
                    (0..share / PIECE_BYTES).try_for_each(|piece| {
                        let offset = thread * share + piece * PIECE_BYTES;
                        fill(kernel, plane, offset, PIECE_BYTES)
                    })
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("filling does not panic"))
    })
    .attempt(|| format!("filling {plane:?} memory by {name}"))?;
    Ok(begin.elapsed().as_secs_f64())
}
