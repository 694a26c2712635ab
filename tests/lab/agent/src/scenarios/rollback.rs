// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions that fail in the middle, for real: an empty pool of huge pages, a limit on locked memory, a mapping of
//! somebody else's in the way, and every single allocation that the kernel makes for one, failed in turn. Each time the
//! guest gets an error, and attributes, memory and what devices reach are as before.
//!
//! In place there is one exception: the kernel hears that a range is shared before a device gets it. Where the device then
//! can't, the range stays shared and in quarantine, and the guest's next request for it tries again.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::{Attempt, Failure};
use crate::host::conversions;
use crate::host::faults::Faults;
use crate::host::huge_pages::Pool;
use crate::host::iommufd::{Iommufd, Page};
use crate::host::kernel;
use crate::host::memory::pinned;
use crate::host::passthrough::{two_to_vfio, EDU};
use crate::ledger::{Block, Ledger, PAGE};
use crate::machine::Surroundings;
use crate::qmp::Gmem;
use crate::release::Release;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;

const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 * MIB;
const EINVAL: i64 = libc::EINVAL as i64;
const RAM0_BYTES: u64 = 128 * MIB;
/// Right after the first, and in huge pages where shared bytes have a file of their own.
const RAM1_BYTES: u64 = 32 * MIB;
const RAM1: u64 = RAM0_BYTES;
const ORIGIN: u64 = 16 * MIB;
const ELSEWHERE: u64 = 17 * MIB;
const BYSTANDER: u64 = 40 * MIB;
const BYSTANDER_BYTES: u64 = 32 * PAGE;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let release = scenario.release();
    let pool = Pool::of(HUGE)?;
    if !kernel::in_place() {
        pool.resize(RAM1_BYTES / HUGE)?;
    }
    let devices = two_to_vfio(&EDU)?;
    let contexts = [Iommufd::open()?, Iommufd::open()?];
    let mut guest = start(scenario, &devices, &contexts, release)?;
    // Something private that no failure may touch.
    guest.convert(scenario, BYSTANDER, BYSTANDER_BYTES, true)?;
    guest.fill(BYSTANDER, BYSTANDER_BYTES, 40)?;
    guest.agree(scenario, "at start")?;

    match release {
        _ if guest.in_place => {}
        Release::Late => {
            scenario.prefix("kept from the pool: ");
            kept_from_the_pool(scenario, &mut guest, &pool)?;
        }
        _ => {
            scenario.prefix("empty pool: ");
            empty_pool(scenario, &mut guest, &pool)?;
        }
    }
    scenario.prefix("locked memory: ");
    locked_memory(scenario, &mut guest)?;
    scenario.prefix("foreign mapping: ");
    foreign_mapping(scenario, &mut guest, &contexts)?;
    // The rest fails the same way however long the memory of converted pages is kept.
    if release == Release::Soon {
        scenario.prefix("area lost: ");
        area_lost(scenario, &mut guest, &contexts[0])?;
        scenario.prefix("another address space: ");
        pointer_moved(scenario, &mut guest, &contexts[0])?;
        scenario.prefix("each allocation: ");
        each_allocation(scenario, &mut guest)?;
        scenario.prefix("attributes: ");
        attributes(scenario, &mut guest)?;
        scenario.prefix("allocations for good: ");
        no_allocations(scenario, &mut guest)?;
    }

    scenario.prefix("");
    guest.agree(scenario, "at the end")?;
    scenario.fact("agreements", guest.agreements);
    // What is mapped by file in an IOAS stays pinned for as long as somebody has its context: that is us, too.
    drop(contexts);
    guest.finish(scenario)
}

fn start(
    scenario: &Scenario,
    devices: &[String; 2],
    contexts: &[Iommufd; 2],
    release: Release,
) -> Result<Confidential, Failure> {
    let release = release.property();
    let context = |index: usize| {
        format!(
            "iommufd,id=iommufd{index},fd={}",
            contexts[index].descriptor()
        )
    };
    let device = |index: usize| format!("vfio-pci,host={},iommufd=iommufd{index}", devices[index]);
    let (second, huge) = match kernel::in_place() {
        true => (Block::small("ram1", RAM1_BYTES), ""),
        false => (
            Block::huge("ram1", RAM1_BYTES, HUGE),
            ",hugetlb=on,hugetlbsize=2M",
        ),
    };
    Confidential::start_in(
        scenario.directory(),
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM0_BYTES}{release}"),
            "-object",
            &format!("memory-backend-gmem,id=ram1,size={RAM1_BYTES}{huge}{release}"),
            "-numa",
            "node,nodeid=0,memdev=ram0",
            "-numa",
            "node,nodeid=1,memdev=ram1",
            "-m",
            &format!("{}M", (RAM0_BYTES + RAM1_BYTES) / MIB),
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0",
            "-object",
            &context(0),
            "-object",
            &context(1),
            "-device",
            &device(0),
            "-device",
            &device(1),
        ],
        Ledger::new(vec![Block::small("ram0", RAM0_BYTES), second]),
        Surroundings {
            inherited: &[contexts[0].descriptor(), contexts[1].descriptor()],
            limited: true,
            ..Surroundings::default()
        },
    )
}

/// What a conversion that fails must leave as it was, block by block.
#[derive(Debug, PartialEq)]
struct State(Vec<Vec<u64>>);

const KEPT: [&str; 8] = [
    "private",
    "shared",
    "private-runs",
    "dma-mapped",
    "dma-windows",
    "quarantined",
    "to-private",
    "to-shared",
];

impl State {
    fn of(guest: &mut Confidential) -> Result<Self, Failure> {
        let gmem = Gmem::query(&mut guest.machine.qmp)?;
        let mut state = Vec::new();
        for block in &guest.ledger.blocks {
            let block = gmem.block(block.id)?;
            let numbers = KEPT.iter().map(|name| block.number(name));
            state.push(numbers.collect::<Result<_, _>>()?);
        }
        Ok(Self(state))
    }
}

fn total(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?.total(name)
}

/// The guest asks, gets EINVAL, and everything is as before.
fn fails(
    scenario: &Scenario,
    guest: &mut Confidential,
    (gpa, bytes, private): (u64, u64, bool),
    why: &str,
) -> Outcome {
    let before = State::of(guest)?;
    let failures = total(guest, "failures")?;
    let result = guest.monitor.convert(gpa, bytes, private)?;
    scenario.check_equal(result, EINVAL, format!("{why}: what the guest gets"))?;
    scenario.check_equal(
        total(guest, "failures")?,
        failures + 1,
        format!("{why}: failures"),
    )?;
    if guest.in_place && !private {
        return stays_shared(scenario, guest, (gpa, bytes), why);
    }
    scenario.check_equal(State::of(guest)?, before, format!("{why}: {KEPT:?}"))
}

/// The kernel has made a range shared, and then a device could not have it.
fn stays_shared(
    scenario: &Scenario,
    guest: &mut Confidential,
    (gpa, bytes): (u64, u64),
    why: &str,
) -> Outcome {
    guest.ledger.convert(gpa, bytes, false);
    guest.quarantine = true;
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let quarantined = gmem.sum("quarantined")?;
    let (mapped, shared) = (gmem.sum("dma-mapped")?, gmem.sum("shared")?);
    scenario.check(
        quarantined > 0,
        format!("{why}: what is shared and not in reach of devices is quarantined"),
    )?;
    scenario.check(
        mapped < 2 * shared && mapped + 2 * quarantined >= 2 * shared,
        format!("{why}: what devices do not reach is quarantined: {mapped} of twice {shared} bytes mapped, {quarantined} quarantined"),
    )
}

/// A request that failed is made again and succeeds: nothing is in quarantine any more.
fn shared_at_last(scenario: &Scenario, guest: &mut Confidential, gpa: u64, bytes: u64) -> Outcome {
    guest.convert(scenario, gpa, bytes, false)?;
    guest.quarantine = false;
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    for (name, expected) in [("quarantined", 0), ("dma-mapped", 2 * gmem.sum("shared")?)] {
        scenario.check_equal(
            gmem.sum(name)?,
            expected,
            format!("query-gmem's {name} once what failed has succeeded"),
        )?;
    }
    Ok(())
}

/// Both devices reach a shared page.
fn both_reach(scenario: &Scenario, guest: &mut Confidential, page: u64) -> Outcome {
    for index in 0..2 {
        Engine::new(index, ORIGIN).reaches(scenario, guest, page)?;
    }
    Ok(())
}

/// Neither device reaches a private page; what it holds afterwards is the test's.
fn none_reaches(scenario: &Scenario, guest: &mut Confidential, page: u64) -> Outcome {
    for index in 0..2 {
        Engine::new(index, ORIGIN).misses(scenario, guest, page, ELSEWHERE)?;
    }
    Ok(())
}

/// A pool is empty as long as the huge pages of a private range are kept, and the range has them again when it is shared.
fn kept_from_the_pool(scenario: &mut Scenario, guest: &mut Confidential, pool: &Pool) -> Outcome {
    const START: u64 = RAM1 - 4 * MIB;
    const BYTES: u64 = 8 * MIB;
    guest.convert(scenario, START, BYTES, true)?;
    guest.fill(START, BYTES, 1)?;
    guest.agree(scenario, "private in two blocks")?;
    scenario.check_equal(pool.free()?, 0, "free huge pages while two are kept")?;
    guest.convert(scenario, START, BYTES, false)?;
    guest.fill(START, BYTES, 2)?;
    scenario.check_equal(pool.free()?, 0, "free huge pages when both are used again")?;
    both_reach(scenario, guest, START + PAGE)?;
    guest.agree(scenario, "shared again with what was kept")
}

/// One request over two blocks: the second can't have its huge pages, and the first gives back what it had reserved.
fn empty_pool(scenario: &mut Scenario, guest: &mut Confidential, pool: &Pool) -> Outcome {
    const START: u64 = RAM1 - 4 * MIB;
    const BYTES: u64 = 8 * MIB;
    guest.convert(scenario, START, BYTES, true)?;
    guest.fill(START, BYTES, 1)?;
    guest.agree(scenario, "private in two blocks")?;
    // What the pages had goes back to the pool a moment later.
    guest.settle()?;
    let free = pool.free()?;
    let taken = pool.take(free - 1)?;
    fails(
        scenario,
        guest,
        (START, BYTES, false),
        "one huge page where two are wanted",
    )?;
    let left = pool.free()?;
    scenario.fact("free huge pages after the failure, two wanted", left);
    scenario.check_equal(left, 1, "free huge pages after the failure")?;
    guest.agree(scenario, "refused for want of huge pages")?;
    none_reaches(scenario, guest, START + PAGE)?;
    drop(taken);
    guest.convert(scenario, START, BYTES, false)?;
    guest.fill(START, BYTES, 2)?;
    both_reach(scenario, guest, START + PAGE)?;
    guest.agree(scenario, "shared once there are huge pages")
}

/// The device's pages are counted against a limit that allows the first part of a request and not the second.
fn locked_memory(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = 48 * MIB;
    const HALF: u64 = MIB;
    guest.convert(scenario, START, 3 * HALF, true)?;
    guest.convert(scenario, START + HALF, HALF, false)?;
    guest.fill(START, 3 * HALF, 3)?;
    guest.agree(scenario, "two private runs")?;
    let locked = pinned(guest.machine.pid())?;
    scenario.fact("locked bytes", locked);
    for (more, what) in [
        (0, "no more"),
        (HALF + HALF / 2, "the first half and no more"),
    ] {
        guest.machine.limit_locked(locked + more)?;
        let request = (START, 3 * HALF, false);
        fails(scenario, guest, request, &format!("QEMU may lock {what}"))?;
        let now = pinned(guest.machine.pid())?;
        scenario.check(
            now == locked || guest.in_place && now <= locked + more,
            format!("bytes locked after the failure, where QEMU may lock {what}: {now}, {locked} before"),
        )?;
        guest.agree(scenario, "refused for want of locked memory")?;
    }
    none_reaches(scenario, guest, START + PAGE)?;
    guest.machine.limit_locked(libc::RLIM_INFINITY)?;
    shared_at_last(scenario, guest, START, 3 * HALF)?;
    both_reach(scenario, guest, START + PAGE)?;
    guest.agree(scenario, "shared once it may be locked")
}

/// Somebody else's page is in the middle of the range, in the first or in the second address space.
fn foreign_mapping(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    contexts: &[Iommufd; 2],
) -> Outcome {
    const START: u64 = 56 * MIB;
    const BYTES: u64 = 64 * PAGE;
    let page = Page::new()?;
    for (index, context) in contexts.iter().enumerate() {
        let ioas = context.ioas_with(START, &page)?;
        // Every second page: a request for all of it has 32 parts.
        alternate(scenario, guest, START, BYTES, index as u64 + 10)?;
        let foreign = START + BYTES / 2;
        context
            .map(ioas, foreign, &page)
            .attempt(|| format!("mapping a page at {foreign:#x} in IOAS {ioas}"))?;
        let why = format!("a foreign page in address space {index}");
        fails(scenario, guest, (START, BYTES, false), &why)?;
        fails(scenario, guest, (foreign, PAGE, false), &why)?;
        guest.agree(scenario, &why)?;
        if !guest.in_place {
            none_reaches(scenario, guest, START)?;
        }
        context
            .unmap(ioas, foreign, PAGE)
            .attempt(|| format!("unmapping {foreign:#x} again"))?;
        shared_at_last(scenario, guest, START, BYTES)?;
        guest.fill(START, BYTES, 12)?;
        both_reach(scenario, guest, foreign)?;
        scenario.fact(&why, "refused, then done without it");
    }
    guest.agree(scenario, "without foreign pages")
}

/// Somebody unmaps a page of QEMU's. Unmapping it for a conversion then finds nothing, which must not be taken for done.
fn area_lost(scenario: &mut Scenario, guest: &mut Confidential, context: &Iommufd) -> Outcome {
    const LOST: u64 = 60 * MIB;
    let page = Page::new()?;
    let ioas = context.ioas_with(LOST, &page)?;
    // Private and back: now it is an area of its own, which can be unmapped by itself.
    guest.convert(scenario, LOST, PAGE, true)?;
    guest.convert(scenario, LOST, PAGE, false)?;
    context
        .unmap(ioas, LOST, PAGE)
        .attempt(|| format!("unmapping QEMU's page at {LOST:#x}"))?;
    fails(
        scenario,
        guest,
        (LOST, PAGE, true),
        "an unmap that finds nothing",
    )?;
    both_reach(scenario, guest, LOST)?;
    scenario.fact("what QEMU makes of it", "the page is mapped again");
    guest.convert(scenario, LOST, PAGE, true)?;
    none_reaches(scenario, guest, LOST)?;
    guest.agree(scenario, "private after all")?;
    guest.convert(scenario, LOST, PAGE, false)
}

/// Which IOAS a cut applies to is one pointer of the whole context, and somebody else moves it: to an IOAS that has
/// something at the same address. What is cut is QEMU's all the same.
fn pointer_moved(scenario: &mut Scenario, guest: &mut Confidential, context: &Iommufd) -> Outcome {
    const START: u64 = 61 * MIB;
    const BYTES: u64 = 16 * PAGE;
    const CUT: u64 = START + 7 * PAGE;
    let page = Page::new()?;
    let other = context.allocate().attempt(|| "making an IOAS".into())?;
    context
        .map(other, CUT, &page)
        .attempt(|| format!("mapping a page at {CUT:#x} in IOAS {other}"))?;
    guest.convert(scenario, START, BYTES, true)?;
    guest.convert(scenario, START, BYTES, false)?;
    context
        .point_at(other)
        .attempt(|| format!("making cuts apply to IOAS {other}"))?;
    guest.convert(scenario, CUT, PAGE, true)?;
    none_reaches(scenario, guest, CUT)?;
    both_reach(scenario, guest, CUT + PAGE)?;
    let there = context.map(other, CUT, &page);
    scenario.check(
        there.is_err_and(|error| error.raw_os_error() == Some(libc::EEXIST)),
        "the other IOAS still has its page",
    )?;
    scenario.fact(
        "what is cut",
        "QEMU's IOAS, not the one that somebody chose",
    );
    guest.agree(scenario, "cut in the right IOAS")?;
    guest.convert(scenario, START, BYTES, false)
}

/// Every second page private, beginning with the first.
fn alternate(
    scenario: &Scenario,
    guest: &mut Confidential,
    start: u64,
    bytes: u64,
    seed: u64,
) -> Outcome {
    every(scenario, guest, 2, start, bytes)?;
    guest.fill(start, bytes, seed)
}

/// One page of each `stride` private, beginning with the first.
fn every(
    scenario: &Scenario,
    guest: &mut Confidential,
    stride: u64,
    start: u64,
    bytes: u64,
) -> Outcome {
    let pages = bytes / PAGE / stride;
    let results = guest
        .monitor
        .storm(pages, start, PAGE, true, stride * PAGE)?;
    scenario.check_equal(results, vec![(0, pages)], "results of single pages")?;
    for page in 0..pages {
        guest
            .ledger
            .convert(start + page * stride * PAGE, PAGE, true);
    }
    Ok(())
}

/// A request of many parts, made over and over with another allocation of the kernel failing each time.
struct Sweep {
    /// Allocations under this function of the kernel.
    function: &'static str,
    private: bool,
    /// Pages of both kinds, not all of one.
    runs: bool,
    start: u64,
    bytes: u64,
}

/// Where a sweep takes place.
enum Layout {
    /// Pages of both kinds, in small or in huge pages.
    Runs,
    HugeRuns,
    /// Two huge pages of one kind.
    Huge,
}

/// How a sweep went.
#[derive(Default)]
struct Swept {
    /// Allocations that were failed, one per attempt.
    positions: u64,
    /// Of these, how often the guest got an error.
    refused: u64,
    /// And how often the kernel or the library did without.
    absorbed: u64,
}

/// More allocations than any request here takes.
const MOST_POSITIONS: u32 = 400;
const PAGES: u64 = 8;
/// All of iommufd's calls.
const DMA: &str = "iommufd_fops_ioctl";

fn each_allocation(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = 64 * MIB;
    let mut positions = 0;
    let mut refused = 0;
    let mut place = START;
    for (what, function, private, layout) in [
        ("DMA, to private", DMA, true, Layout::Runs),
        ("DMA, to shared", DMA, false, Layout::Runs),
        ("DMA in huge pages, to private", DMA, true, Layout::HugeRuns),
        ("DMA in huge pages, to shared", DMA, false, Layout::HugeRuns),
        (
            "huge pages, to shared",
            "vfs_fallocate",
            false,
            Layout::Huge,
        ),
    ] {
        if guest.in_place && !matches!(layout, Layout::Runs) {
            continue;
        }
        let (start, bytes) = match layout {
            Layout::Runs => (place, PAGES * PAGE),
            Layout::HugeRuns => (RAM1 + 8 * MIB, PAGES * PAGE),
            Layout::Huge => (RAM1 + 8 * MIB, 2 * HUGE),
        };
        place += 2 * MIB;
        let runs = matches!(layout, Layout::Runs | Layout::HugeRuns);
        let sweep = Sweep {
            function,
            private,
            runs,
            start,
            bytes,
        };
        guest
            .ledger
            .forget_outside(BYSTANDER..BYSTANDER + BYSTANDER_BYTES);
        let swept = sweep.run(scenario, guest, what)?;
        positions += swept.positions;
        refused += swept.refused;
        scenario.fact(
            what,
            json!({
                "under": function, "failed": swept.positions,
                "refused": swept.refused, "absorbed": swept.absorbed,
            }),
        );
        scenario.progress(format!(
            "{what}: {} allocations failed in turn, {} requests refused, {} did without",
            swept.positions, swept.refused, swept.absorbed
        ));
    }
    scenario.fact("positions", positions);
    scenario.fact("refused", refused);
    // Small pages by file take fewer, and in place there are no others.
    let many = if guest.in_place { 10 } else { 20 };
    scenario.check(
        positions > many && refused > many / 2,
        format!("many allocations could be failed: {positions}, of which {refused} were noticed"),
    )
}

impl Sweep {
    fn run(
        &self,
        scenario: &Scenario,
        guest: &mut Confidential,
        what: &str,
    ) -> Result<Swept, Failure> {
        let faults = Faults::under(self.function)?;
        let vcpu = *guest
            .machine
            .vcpus()?
            .first()
            .attempt(|| "no vCPU".into())?;
        let mut swept = Swept::default();
        self.prepare(scenario, guest)?;
        for number in 1..=MOST_POSITIONS {
            let why = format!("{what}, allocation {number}");
            let before = State::of(guest)?;
            faults.fail_nth(vcpu, number)?;
            let (gpa, bytes) = self.request();
            let result = guest.monitor.convert(gpa, bytes, self.private)?;
            let failed = faults.failed(vcpu)?;
            if result == 0 {
                guest.ledger.convert(gpa, bytes, self.private);
                if swept.absorbed % 6 == 0 {
                    guest.fill(self.start, self.bytes, 20)?;
                    guest.agree(scenario, &why)?;
                }
                self.prepare(scenario, guest)?;
                if !failed {
                    return Ok(swept);
                }
                swept.absorbed += 1;
            } else {
                scenario.check(
                    failed && result == EINVAL,
                    format!(
                        "{why}: a request fails, with EINVAL, only if an allocation did: {result}"
                    ),
                )?;
                if guest.in_place && !self.private {
                    stays_shared(scenario, guest, (gpa, bytes), &why)?;
                    shared_at_last(scenario, guest, gpa, bytes)?;
                    self.prepare(scenario, guest)?;
                    swept.refused += 1;
                    swept.positions += 1;
                    continue;
                }
                scenario.check_equal(State::of(guest)?, before, format!("{why}: {KEPT:?}"))?;
                if swept.refused % 12 == 0 {
                    guest.agree(scenario, &why)?;
                    if self.runs || self.private {
                        both_reach(scenario, guest, self.start + 5 * PAGE)?;
                    }
                    if self.runs || !self.private {
                        none_reaches(scenario, guest, self.start + 4 * PAGE)?;
                    }
                }
                swept.refused += 1;
            }
            swept.positions += 1;
        }
        Err(Failure::new(format!(
            "{what}: after {MOST_POSITIONS} attempts there still was an allocation to fail"
        )))
    }

    /// One page of four is private, the three between are one area; or all is what it is not to be.
    fn prepare(&self, scenario: &Scenario, guest: &mut Confidential) -> Outcome {
        guest.convert(scenario, self.start, self.bytes, true)?;
        if self.runs {
            guest.convert(scenario, self.start, self.bytes, false)?;
            every(scenario, guest, 4, self.start, self.bytes)?;
        } else {
            guest.convert(scenario, self.start, self.bytes, !self.private)?;
        }
        guest.fill(self.start, self.bytes, 21)
    }

    /// To-private, it begins and ends within an area: both are cut, the others go whole, between them.
    fn request(&self) -> (u64, u64) {
        match self.private && self.runs {
            true => (self.start + 2 * PAGE, self.bytes - 3 * PAGE),
            false => (self.start, self.bytes),
        }
    }
}

/// KVM has no memory to note attributes. It asks twice for each piece, so that one failure is not enough.
fn attributes(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = 96 * MIB;
    const BYTES: u64 = 2 * MIB;
    // Bytes of slab that it gets before there is no more: 64 pages take some 600 as attributes of the VM.
    let (function, budgets) = match guest.in_place {
        true => match conversions::function()? {
            Ok(function) => (function, &[0][..]),
            Err(sentence) => {
                scenario.fact("no memory for attributes", format!("not tried: {sentence}"));
                return Ok(());
            }
        },
        false => ("kvm_vm_ioctl".into(), &[0, 700, 1400, 2800][..]),
    };
    let faults = Faults::under(&function)?;
    scenario.fact("attributes fail under", function);
    let vcpus = guest.machine.vcpus()?;
    guest.fill(START, 16 * PAGE, 25)?;
    let mut refused = 0;
    for &budget in budgets {
        faults.spare(budget)?;
        faults.fail_all(&vcpus, true)?;
        let why = format!("KVM has {budget} bytes for attributes");
        let outcome = fails(scenario, guest, (START, BYTES, true), &why);
        faults.fail_all(&vcpus, false)?;
        outcome?;
        refused += 1;
    }
    scenario.fact("requests refused", refused);
    guest.agree(scenario, "refused for want of attributes")?;
    both_reach(scenario, guest, START + PAGE)?;
    guest.convert(scenario, START, BYTES, true)?;
    guest.fill(START, BYTES, 26)?;
    none_reaches(scenario, guest, START + PAGE)?;
    guest.agree(scenario, "private once there is memory for attributes")?;
    guest.convert(scenario, START, BYTES, false)
}

/// From some moment on every allocation of iommufd's fails, so that what was undone can't all be mapped again: then a
/// range is quarantined. Attributes are right all the same, and all is well once there is memory again.
fn no_allocations(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = 80 * MIB;
    const BYTES: u64 = PAGES * PAGE;
    let faults = Faults::under(DMA)?;
    let vcpus = guest.machine.vcpus()?;
    let mut quarantined_most = 0;
    let mut refused = 0;
    for budget in (0..16).map(|step| step * 768) {
        guest.convert(scenario, START, BYTES, true)?;
        guest.convert(scenario, START, BYTES, false)?;
        every(scenario, guest, 4, START, BYTES)?;
        guest.fill(START, BYTES, 22)?;
        let before = State::of(guest)?;
        faults.spare(budget)?;
        faults.fail_all(&vcpus, true)?;
        let (gpa, bytes) = (START + 2 * PAGE, BYTES - 3 * PAGE);
        let result = guest.monitor.convert(gpa, bytes, true);
        faults.fail_all(&vcpus, false)?;
        let result = result?;
        let gmem = Gmem::query(&mut guest.machine.qmp)?;
        let block = gmem.block("ram0")?;
        let quarantined = block.number("quarantined")?;
        let mapped = block.number("dma-mapped")?;
        let shared = block.number("shared")?;
        quarantined_most = quarantined_most.max(quarantined);
        if result == 0 {
            guest.ledger.convert(gpa, bytes, true);
            guest.fill(START, BYTES, 23)?;
        } else {
            refused += 1;
            scenario.check_equal(result, EINVAL, "what the guest gets without allocations")?;
            let private = before.0[0][0];
            scenario.check_equal(
                block.number("private")?,
                private,
                "private bytes after a failure whose undoing failed",
            )?;
            scenario.check(
                mapped + 2 * quarantined >= 2 * shared && mapped <= 2 * shared,
                format!("what devices do not reach is quarantined: {mapped} of twice {shared} bytes mapped, {quarantined} quarantined"),
            )?;
            guest.monitor.ask("ping")?;
        }
        // The range converts again, and is out of quarantine.
        guest.convert(scenario, START, BYTES, true)?;
        guest.convert(scenario, START, BYTES, false)?;
        guest.fill(START, BYTES, 24)?;
        let gmem = Gmem::query(&mut guest.machine.qmp)?;
        let block = gmem.block("ram0")?;
        scenario.check_equal(
            block.number("quarantined")?,
            0,
            "quarantined bytes afterwards",
        )?;
        scenario.check_equal(
            block.number("dma-mapped")?,
            2 * block.number("shared")?,
            "bytes mapped afterwards, in two address spaces",
        )?;
    }
    scenario.fact("requests refused", refused);
    scenario.fact("most bytes quarantined", quarantined_most);
    scenario.check(refused > 0, "requests were refused without allocations")?;
    both_reach(scenario, guest, START)?;
    guest.agree(scenario, "after quarantine")
}
