// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device is plugged into a guest with 1 GiB shared in pieces.

use super::calls::Counts;
use super::contest::Contestant;
use super::figures::{slab_bytes, Figures};
use super::guest::{Guest, Plan, Side};
use crate::boot::CommandLine;
use crate::failure::Attempt;
use crate::host::passthrough::{all_to_vfio, EDU};
use crate::scenario::{Outcome, Scenario};
use serde_json::json;

const MIB: u64 = 1 << 20;
const BASE: u64 = 128 * MIB;
const PIECE_PAGES: u64 = 512;
const PIECES: u64 = 512;
const RUNS: usize = 5;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let devices = all_to_vfio(&EDU)?;
    let mut sides = Vec::new();
    for (side, device) in [Side::Stock, Side::Gmem("cut")].into_iter().zip(&devices) {
        let plan = Plan {
            side,
            ram_bytes: 1280 * MIB,
            processors: 1,
            label: "",
            properties: "",
            more: &[],
        };
        let mut guest = Guest::start(scenario, plan, device)?;
        guest.all_private()?;
        // Every other piece first: what lies side by side in the end was not asked for as one.
        for parity in [0, 1] {
            for piece in (parity..PIECES).step_by(2) {
                let address = BASE + piece * PIECE_PAGES * 4096;
                guest.convert(address, PIECE_PAGES * 4096, false)?;
            }
        }
        sides.push(Contestant {
            guest,
            figures: Figures::default(),
        });
        scenario.progress(format!("{} is up", side.name()));
    }
    for side in &mut sides {
        let calls = side.guest.plug_traced()?;
        side.figures.counts = Some(Counts::of(calls.iter()));
        if let Some(gmem) = side.guest.gmem()? {
            let block = gmem.block("ram0")?;
            side.figures.fact("areas", block.number("dma-areas")?);
            side.figures.fact("strategy", block.text("dma-strategy")?);
            // The kernel's count has more: what probes whether cutting works, and the BIOS, which stock maps as well.
            let of_ram = block.number("map-file-calls")?;
            side.figures.fact("maps_of_ram_by_query_gmem", of_ram);
        }
        side.guest.unplug()?;
    }
    for run in 0..RUNS {
        for side in &mut sides {
            let before = slab_bytes()?;
            let took = side.guest.plug()?;
            side.figures
                .slab_bytes
                .get_or_insert(slab_bytes()? - before);
            side.figures.runs.push(took.as_secs_f64());
            side.guest.unplug()?;
        }
        scenario.progress(format!("run {} of {RUNS}", run + 1));
    }
    let [stock, ours] = sides
        .as_slice()
        .try_into()
        .ok()
        .attempt(|| "L1 has too few edu devices".into())
        .map(|sides: &[Contestant; 2]| [sides[0].figures.json(), sides[1].figures.json()])?;
    let case = json!({"name": "attach", "requests": 1, "stock": stock, "gmem": ours});
    scenario.fact("cases", vec![case]);
    Ok(())
}
