// SPDX-License-Identifier: MIT OR Apache-2.0
//! A confidential guest is reset while it has private pages: all of its memory is shared again, nothing is left in the
//! guest_memfd, and its device reaches all of it.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::ledger::PAGE;
use crate::machine::Surroundings;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const SOURCE: u64 = 16 * MIB;
const TARGET: u64 = 32 * MIB;
const TARGET_BYTES: u64 = 16 * MIB;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let mut guest =
        Confidential::with_one_device(scenario.directory(), RAM_BYTES, Surroundings::default())?;
    for by in ["QMP", "guest"] {
        scenario.prefix(&format!("reset by {by}: "));
        once(scenario, &mut guest, by)?;
    }
    scenario.prefix("");
    guest.finish(scenario)
}

fn dma_mapped(guest: &mut Confidential) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number("dma-mapped")
}

fn once(scenario: &mut Scenario, guest: &mut Confidential, by: &str) -> Outcome {
    let all_mapped = dma_mapped(guest)?;
    guest.convert(scenario, TARGET, TARGET_BYTES, true)?;
    guest.fill(TARGET, TARGET_BYTES, 1)?;
    guest.agree(scenario, "before the reset")?;
    scenario.check_equal(
        all_mapped - dma_mapped(guest)?,
        TARGET_BYTES,
        "bytes that the conversion took from the device",
    )?;

    match by {
        "QMP" => {
            guest.machine.qmp.execute("system_reset", json!({}))?;
        }
        _ => {
            guest.monitor.ask("reset")?;
        }
    }
    guest.monitor.wait_until_ready()?;
    guest.monitor.ask("ping")?;
    guest.ledger.reset();
    guest.agree(scenario, "after the reset")?;
    let mapped = dma_mapped(guest)?;
    scenario.fact("dma_mapped_bytes", mapped);
    scenario.check_equal(
        mapped,
        all_mapped,
        "bytes mapped for the device after the reset",
    )?;

    guest.monitor.fill(SOURCE, PAGE, 2)?;
    guest.monitor.zero(TARGET, PAGE)?;
    guest.monitor.edu_load(SOURCE)?;
    guest.monitor.edu_store(TARGET)?;
    let difference = guest.monitor.check_copy(TARGET, PAGE, 2, SOURCE)?;
    scenario.fact(
        "dma_to_once_private_page",
        difference.as_deref().unwrap_or("arrives"),
    );
    scenario.check_equal(
        difference,
        None,
        "DMA to a page that was private before the reset arrives",
    )
}
