// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests of a virtio disk without a disk behind it: what it costs that QEMU looks at each access to the rings of a
//! confidential guest whether their pages are still shared.

use super::figures::Figures;
use super::guest::{Guest, Plan, Side};
use crate::boot::CommandLine;
use crate::failure::{Attempt, Failure};
use crate::ledger::PAGE;
use crate::scenario::{Outcome, Scenario};
use crate::virtio::{Buffer, Device, BLOCK};
use serde_json::{json, Value};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 256 * MIB;
/// All that is shared besides the payload's own: rings, then a page for requests.
const RINGS: u64 = 64 * MIB;
const REQUEST: u64 = RINGS + 16 * PAGE;
const SHARED_BYTES: u64 = 2 * MIB;
const SECTOR: u64 = 512;
const PATIENCE: Duration = Duration::from_secs(20);

/// Cases: how many times the guest kicks, with how many requests each time, and how many runs that takes: short ones, as the
/// machine below may have something else to do at any moment.
const CASES: [(&str, u64, u64, usize); 2] = [("rings", 100, 1, 25), ("rings-deep", 25, 64, 41)];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut sides = [Side::Stock, Side::Gmem("auto")]
        .into_iter()
        .map(|side| start(scenario, side))
        .collect::<Result<Vec<_>, _>>()?;
    let mut cases = Vec::new();
    for (name, kicks, depth, runs) in CASES {
        let mut figures = [Figures::default(), Figures::default()];
        // The first run is for caches.
        for run in 0..=runs {
            for (guest, figures) in sides.iter_mut().zip(&mut figures) {
                let seconds = once(guest, kicks, depth)?;
                if run > 0 {
                    figures.runs.push(seconds);
                }
            }
            scenario.progress(format!("{name}: run {run} of {runs}"));
        }
        cases.push(case(name, kicks * depth, &figures));
        scenario.fact("cases", cases.clone());
    }
    Ok(())
}

fn case(name: &str, requests: u64, [stock, ours]: &[Figures; 2]) -> Value {
    json!({"name": name, "requests": requests, "stock": stock.json(), "gmem": ours.json()})
}

fn disk() -> Device {
    Device {
        kind: BLOCK,
        index: 0,
        queue: 0,
        rings: RINGS,
    }
}

/// A guest whose memory is private, as that of real ones, but for what the disk is to reach.
fn start(scenario: &Scenario, side: Side) -> Result<Guest, Failure> {
    let plan = Plan {
        side,
        ram_bytes: RAM_BYTES,
        processors: 1,
        label: "",
        properties: "",
        more: &[
            "-blockdev",
            "null-co,node-name=null0,size=1048576,read-zeroes=off",
            "-device",
            "virtio-blk-pci,drive=null0,disable-legacy=on",
        ],
    };
    let mut guest = Guest::start(scenario, plan, "")?;
    guest.all_private()?;
    guest.convert(RINGS, SHARED_BYTES, false)?;
    // A request to read, of sector 0.
    guest.monitor.zero(REQUEST, PAGE)?;
    disk().start(&mut guest.monitor, 0)?;
    scenario.progress(format!("{} is up", side.name()));
    Ok(guest)
}

/// Seconds for so many requests, by the guest's clock.
fn once(guest: &mut Guest, kicks: u64, depth: u64) -> Result<f64, Failure> {
    let buffers = [
        Buffer::read(REQUEST, 16),
        Buffer::written(REQUEST + SECTOR, SECTOR),
        Buffer::written(REQUEST + 2 * SECTOR, 1),
    ];
    let answer = disk().serve(&mut guest.monitor, (kicks, depth), PATIENCE, &buffers)?;
    let status = guest.monitor.read(REQUEST + 2 * SECTOR)? & 0xff;
    match status {
        0 => Ok(answer as f64 / 1e9),
        _ => Err(Failure::new(format!("the disk's status is {status}"))),
    }
    .attempt(|| format!("{} kicks with {} requests each", kicks, depth))
}
