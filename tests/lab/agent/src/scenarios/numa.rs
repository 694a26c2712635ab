// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two blocks bound to the host's two nodes: shared and private pages of each lie on its node, also when one request
//! converts in both; preallocation fills the plane that a page's attribute selects, there too, and no other.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::host::nodes;
use crate::ledger::{Block, Ledger, PAGE};
use crate::scenario::{Outcome, Scenario};

const MIB: u64 = 1 << 20;
/// The block that the guest boots from, on node 1, and the other, on node 0: not where most memory comes from anyway.
const RAM0_BYTES: u64 = 96 * MIB;
const RAM0_NODE: usize = 1;
const RAM1_BYTES: u64 = 64 * MIB;
const RAM1_NODE: usize = 0;
/// On both sides of the border.
const EACH: u64 = 8 * MIB;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    scenario.prefix("on demand: ");
    once(scenario, "demand", false)?;
    scenario.prefix("preallocated: ");
    once(scenario, "preallocated", true)
}

fn once(scenario: &mut Scenario, name: &str, preallocated: bool) -> Outcome {
    let before = in_guest_memfds()?;
    let mut guest = start(&scenario.directory().join(name), preallocated)?;
    for (block, bytes, node) in [(0, RAM0_BYTES, RAM0_NODE), (1, RAM1_BYTES, RAM1_NODE)] {
        let held = match guest.in_place {
            true => in_guest_memfds()?[node] - before[node],
            false => guest.shared[block].allocated()?,
        };
        scenario.fact(&format!("ram{block}_shared_bytes_at_start"), held);
        // A file in place is filled at once for the policy's sake.
        if preallocated || guest.in_place {
            scenario.check_equal(held, bytes, format!("shared bytes of ram{block} at start"))?;
            shared_on(scenario, &guest, (block, 0, bytes), node)?;
        } else {
            scenario.check(
                held < bytes / 2,
                format!("ram{block} is filled on demand: {held} bytes at start"),
            )?;
        }
    }
    let start = RAM0_BYTES - EACH;
    if !guest.in_place {
        scenario.check_equal(
            in_guest_memfds()?,
            before,
            "bytes in guest_memfds by node, at start",
        )?;
    }

    guest.fill(start, 2 * EACH, 1)?;
    if guest.in_place {
        // What one node has more than before, the other's block has not taken there.
        let now = in_guest_memfds()?;
        let held = guest.guest_memfd_bytes()?;
        scenario.fact("guest_memfd_bytes_by_node", now.to_vec());
        scenario.check(
            now[RAM1_NODE] - before[RAM1_NODE] <= RAM1_BYTES
                && now.iter().sum::<u64>() - before.iter().sum::<u64>() == held,
            format!("{held} bytes of both blocks lie on their nodes: {now:?}, {before:?} before"),
        )?;
    }
    let before = in_guest_memfds()?;
    shared_on(scenario, &guest, (0, RAM0_BYTES - EACH, EACH), RAM0_NODE)?;
    shared_on(scenario, &guest, (1, 0, EACH), RAM1_NODE)?;

    guest.convert(scenario, start, 2 * EACH, true)?;
    // Split, nobody's mapping can carry the policy: the memory is there, on its node, when the conversion returns. In place it
    // has been there before.
    let each = if guest.in_place { 0 } else { EACH };
    for when in ["before", "after"] {
        let now = in_guest_memfds()?;
        let grown = [now[0] - before[0], now[1] - before[1]];
        scenario.fact(
            &format!("private_bytes_by_node_{when}_a_touch"),
            grown.to_vec(),
        );
        scenario.check_equal(
            grown,
            [each, each],
            format!(
                "private bytes by node, half of them of each block, {when} the guest touches them"
            ),
        )?;
        guest.fill(start, 2 * EACH, 2)?;
    }
    guest.agree(scenario, "private on both sides of the border")?;

    // Only the first block's: the other node keeps what it has.
    guest.convert(scenario, start, EACH, false)?;
    guest.settle()?;
    let left = [
        in_guest_memfds()?[0] - before[0],
        in_guest_memfds()?[1] - before[1],
    ];
    let mut expected = [0; 2];
    expected[RAM1_NODE] = each;
    scenario.check_equal(
        left,
        expected,
        "private bytes by node once the first block is shared",
    )?;
    guest.convert(scenario, start, 2 * EACH, false)?;
    guest.fill(start, 2 * EACH, 3)?;
    guest.settle()?;
    scenario.check_equal(
        in_guest_memfds()?,
        before,
        "bytes in guest_memfds by node, at the end",
    )?;
    shared_on(scenario, &guest, (0, RAM0_BYTES - EACH, EACH), RAM0_NODE)?;
    shared_on(scenario, &guest, (1, 0, EACH), RAM1_NODE)?;
    guest.agree(scenario, "shared again")?;
    guest.finish(scenario)
}

/// Bytes in guest_memfds by node.
fn in_guest_memfds() -> Result<[u64; 2], Failure> {
    Ok([nodes::outside_shmem(0)?, nodes::outside_shmem(1)?])
}

/// A shared range of a block, all of which is allocated, lies on one node.
fn shared_on(
    scenario: &mut Scenario,
    guest: &Confidential,
    (block, offset, bytes): (usize, u64, u64),
    node: usize,
) -> Outcome {
    let pages = nodes::of_pages(&guest.shared[block], offset..offset + bytes)?;
    let mut expected = [0; 2];
    expected[node] = bytes / PAGE;
    scenario.fact(&format!("ram{block}_shared_pages_by_node"), pages.to_vec());
    scenario.check_equal(
        pages,
        expected,
        format!("nodes of the shared pages of ram{block}"),
    )
}

fn start(directory: &std::path::Path, preallocated: bool) -> Result<Confidential, Failure> {
    let object = |id, bytes, node| {
        let filled = if preallocated {
            ",prealloc=on,prealloc-threads=2"
        } else {
            ""
        };
        format!("memory-backend-gmem,id={id},size={bytes},host-nodes={node},policy=bind{filled}")
    };
    Confidential::start(
        directory,
        &[
            "-object",
            &object("ram0", RAM0_BYTES, RAM0_NODE),
            "-object",
            &object("ram1", RAM1_BYTES, RAM1_NODE),
            "-numa",
            "node,nodeid=0,memdev=ram0",
            "-numa",
            "node,nodeid=1,memdev=ram1",
            "-m",
            &format!("{}M", (RAM0_BYTES + RAM1_BYTES) / MIB),
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0",
        ],
        Ledger::new(vec![
            Block::small("ram0", RAM0_BYTES),
            Block::small("ram1", RAM1_BYTES),
        ]),
    )
}
