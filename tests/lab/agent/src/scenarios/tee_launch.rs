// SPDX-License-Identifier: MIT OR Apache-2.0
//! SNP and TDX guests are launched, with one processor and with four: everything is private then but what the firmware shares, the
//! books are KVM's page for page, and of what the launch added nothing is left where it came from. Where kinds are in two files,
//! QEMU's own memory-backend-memfd does the same beside it.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::host::kernel;
use crate::host::tee::View;
use crate::ledger::PAGE;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use crate::tee::{handover, Host, Kind, Launch, OPEN};
use std::ops::Range;

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
const PRIVATE: u64 = 16 * MIB;
const SHARED: u64 = 32 * MIB;
const BYTES: u64 = MIB;
const TURNS: u64 = 4;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = Host::of(scenario)?;
    for processors in [1, 4] {
        scenario.prefix(&format!("{processors} processors: "));
        let directory = scenario.directory().join(format!("{processors}"));
        let launch = Launch::new(&host, RAM_BYTES).vcpus(processors);
        let mut guest = launch.start(&directory)?;
        // Of more processors than L1 has, QEMU warns.
        if processors == 1 {
            guest.machine.is_silent()?;
        }
        guest.monitor.ask("ping")?;
        once(scenario, &mut guest, host.kind)?;
        works(scenario, &mut guest, processors)?;
        if processors == 1 && !guest.in_place {
            all_is_held_once(scenario, &mut guest, host.kind)?;
        }
        nothing_is_left(scenario, &mut guest, host.kind)?;
        guest.finish(scenario)?;
    }
    if kernel::in_place() {
        scenario.prefix("");
        return Ok(());
    }
    scenario.prefix("stock: ");
    let directory = scenario.directory().join("stock");
    let mut guest = Launch::new(&host, RAM_BYTES)
        .stock()
        .vcpus(2)
        .start(&directory)?;
    once(scenario, &mut guest, host.kind)?;
    works(scenario, &mut guest, 2)?;
    guest.finish(scenario)?;
    scenario.prefix("");
    Ok(())
}

/// Right after the launch.
fn once(scenario: &mut Scenario, guest: &mut Confidential, kind: Kind) -> Outcome {
    guest.agree(scenario, "at start")?;
    let view = View::of(guest.machine.pid())?;
    let mut expected = kind.launched();
    expected.push(kind.firmware_range()?);
    scenario.check_equal(view.launched(), expected, "what the launch added")?;
    let pages: u64 = view.launched().iter().map(pages).sum();
    scenario.fact("pages that the launch added", pages);
    let of_ram = |range: &Range<u64>| range.end.min(RAM_BYTES) - range.start.min(RAM_BYTES);
    let private = view.runs.iter().filter(|run| run.private);
    let private: u64 = private.map(|run| of_ram(&run.addresses)).sum();
    scenario.fact("private", private);
    let expected = RAM_BYTES - (OPEN.end - OPEN.start);
    scenario.check_equal(private, expected, "what starts private, says KVM")?;
    if guest.is_ours() {
        let gmem = Gmem::query(&mut guest.machine.qmp)?;
        let private = gmem.block("ram0")?.number("private")?;
        scenario.check_equal(private, expected, "what starts private, says QEMU")?;
    }
    let beginning = guest.monitor.read(marked_page(kind))?;
    scenario.check(
        is_marked(kind, beginning),
        format!("the guest finds what the launch put there, and not {beginning:#x}"),
    )
}

fn pages(range: &Range<u64>) -> u64 {
    (range.end - range.start) / PAGE
}

/// A page that the launch puts something recognizable in.
fn marked_page(kind: Kind) -> u64 {
    u64::from(match kind {
        Kind::Snp => handover::SNP_CPUID_PAGE,
        Kind::Tdx => handover::TDX_HOB_PAGE,
    })
}

/// Whether its first word is that: a table of leaves that has some, a list that begins with a hand-off of 56 bytes.
fn is_marked(kind: Kind, word: u64) -> bool {
    match kind {
        Kind::Snp => (1..=64).contains(&word),
        Kind::Tdx => word == 56 << 16 | 1,
    }
}

/// Private and shared memory hold what the guest writes, and each processor converts.
fn works(scenario: &mut Scenario, guest: &mut Confidential, processors: u32) -> Outcome {
    guest.fill(PRIVATE, BYTES, 1)?;
    guest.convert(scenario, SHARED, BYTES, false)?;
    guest.fill(SHARED, BYTES, 2)?;
    guest.agree(scenario, "with a shared range")?;
    scenario.check_equal(
        (
            guest.monitor.is_private(PRIVATE)?,
            guest.monitor.is_private(SHARED)?,
        ),
        (true, false),
        "what the guest is told of its pages",
    )?;
    let each = guest.monitor.ask(&format!(
        "flip-each {processors} {TURNS} {PRIVATE:#x} 1 {:#x} 0",
        2 * PAGE
    ))?;
    let all = format!("{:#x}", (1 << processors) - 1);
    scenario.check_equal(
        each.join(" "),
        format!("0 0 {all}"),
        "refused requests, ranges with wrong contents, processors",
    )?;
    let used = 2 * PAGE * u64::from(processors);
    guest.ledger.forget(PRIVATE, used);
    guest.convert(scenario, SHARED, BYTES, true)?;
    guest.fill(SHARED, BYTES, 3)?;
    guest.agree(scenario, "all private again")
}

/// Once the guest has written to all of its private memory, the files hold that and the firmware, to the page.
fn all_is_held_once(scenario: &mut Scenario, guest: &mut Confidential, kind: Kind) -> Outcome {
    let (start, bytes) = (OPEN.end, RAM_BYTES - OPEN.end);
    guest.monitor.fill(start, bytes, 4)?;
    guest.ledger.forget(start, bytes);
    guest.settle()?;
    let firmware = kind.firmware_range()?;
    let held = guest.private_allocated()?;
    scenario.fact("private memory that is held", held);
    scenario.check_equal(
        held,
        bytes + (firmware.end - firmware.start),
        "what guest_memfds hold once all of it but the first 2 MiB was written to",
    )
}

/// What was added to private memory is nowhere else: a guest that shares such a page does not find it there.
fn nothing_is_left(scenario: &mut Scenario, guest: &mut Confidential, kind: Kind) -> Outcome {
    for range in kind.launched() {
        guest.convert(scenario, range.start, range.end - range.start, false)?;
    }
    let page = marked_page(kind);
    let found = guest.monitor.read(page)?;
    scenario.fact(
        "a shared page that the launch had filled",
        format!("{found:#x}"),
    );
    // In place it is the same page still.
    scenario.check(
        guest.in_place || !is_marked(kind, found),
        "the guest that shares a page of the launch's finds nothing of it",
    )?;
    for range in kind.launched() {
        if !guest.in_place {
            guest.expect_zeros(scenario, range.start, range.end - range.start)?;
        }
        guest.convert(scenario, range.start, range.end - range.start, true)?;
    }
    guest.agree(scenario, "after pages of the launch were shared")
}
