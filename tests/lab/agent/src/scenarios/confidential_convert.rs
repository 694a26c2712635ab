// SPDX-License-Identifier: MIT OR Apache-2.0
//! A confidential guest converts memory the way real guests do. After every step guest, QEMU and kernel are asked
//! separately and must agree.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::host::memory::threads;
use crate::host::programs::build_id;
use crate::host::tracing::{Ioctls, KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_MEMORY_ATTRIBUTES2};
use crate::ledger::{Block, Ledger, PAGE};
use crate::place;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

// Two blocks, so that one range can lie in both; the second appears at two places, so that some of it is above 4 GiB.
const BLOCKS: [&str; 2] = ["ram0", "ram1"];
const RAM0_BYTES: u64 = 512 * MIB;
const RAM1_BYTES: u64 = 256 * MIB;
const RAM1_LOW_BYTES: u64 = 128 * MIB;
const HIGH: u64 = 4 * GIB;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let ioctls = Ioctls::start()?;
    let mut guest = start(scenario)?;
    guest.patient = true;
    guest.machine.is_silent()?;
    guest.agree(scenario, "after start")?;
    let start = Calls::now(&ioctls, &mut guest)?;
    tdx(scenario, &mut guest)?;
    snp(scenario, &mut guest)?;
    single_pages(scenario, &mut guest)?;
    two_blocks(scenario, &mut guest)?;
    above_4_gib(scenario, &mut guest)?;
    mixed(scenario, &mut guest)?;
    let refusal = guest.host_is_refused(scenario)?;
    scenario.fact("host_reads_guest_memfd", refusal);
    all_back(scenario, &mut guest)?;

    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    scenario.fact("requests", gmem.total("requests")?);
    scenario.fact("failures", gmem.total("failures")?);
    scenario.fact("convert_ns_max", gmem.total("convert-ns-max")?);
    scenario.check_equal(gmem.total("failures")?, 0, "failed conversions")?;
    let backing = if guest.in_place { "in-place" } else { "split" };
    scenario.fact("backing", backing);
    for id in BLOCKS {
        let block = gmem.block(id)?;
        for name in ["to-private", "to-shared", "attribute-calls", "bindings"] {
            scenario.fact(&format!("{id}_{name}"), block.number(name)?);
        }
        scenario.check_equal(block.text("backing")?, backing, format!("backing of {id}"))?;
    }
    let end = Calls::now(&ioctls, &mut guest)?;
    let counted = end.kernel - start.kernel;
    scenario.fact("kernel_attribute_calls", counted);
    if ioctls.count() {
        scenario.check(counted > 0, "the kernel was told about attributes")?;
        scenario.check_equal(
            counted,
            end.library - start.library,
            "calls that set attributes, by the kernel's count and by query-gmem",
        )?;
    }
    if guest.in_place {
        scenario.check_equal(end.of_vm, 0, "calls that set attributes of the VM")?;
    }
    scenario.fact("qemu_build_id", build_id(&place::qemu())?);
    for (index, file) in guest.shared.iter().enumerate() {
        let name = format!("{}_file_bytes_at_the_end", guest.ledger.blocks[index].id);
        scenario.fact(&name, file.allocated()?);
    }
    scenario.fact("agreements", guest.agreements);
    scenario.fact("compared_bytes", guest.compared_bytes);
    guest.finish(scenario)
}

/// Calls that told the kernel about attributes so far: on what is asked which is the kernel's affair.
struct Calls {
    kernel: u64,
    of_vm: u64,
    library: u64,
}

impl Calls {
    fn now(ioctls: &Ioctls, guest: &mut Confidential) -> Result<Self, Failure> {
        let calls = ioctls.by_command(&threads(guest.machine.pid())?)?;
        let count = |command| calls.get(&command).copied().unwrap_or(0);
        let of_vm = count(KVM_SET_MEMORY_ATTRIBUTES);
        let gmem = Gmem::query(&mut guest.machine.qmp)?;
        let mut library = 0;
        for id in BLOCKS {
            library += gmem.block(id)?.number("attribute-calls")?;
        }
        Ok(Self {
            kernel: if guest.in_place {
                count(KVM_SET_MEMORY_ATTRIBUTES2)
            } else {
                of_vm
            },
            of_vm,
            library,
        })
    }
}

fn start(scenario: &Scenario) -> Result<Confidential, Failure> {
    let blocks = vec![
        Block::small("ram0", RAM0_BYTES),
        Block::small("ram1", RAM1_BYTES),
    ];
    let low = RAM0_BYTES + RAM1_LOW_BYTES;
    Confidential::start(
        scenario.directory(),
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM0_BYTES}"),
            "-object",
            &format!("memory-backend-gmem,id=ram1,size={RAM1_BYTES}"),
            "-numa",
            "node,nodeid=0,memdev=ram0",
            "-numa",
            "node,nodeid=1,memdev=ram1",
            "-m",
            &format!("{}M", (RAM0_BYTES + RAM1_BYTES) / MIB),
            "-machine",
            &format!(
                "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,max-ram-below-4g={low}"
            ),
        ],
        Ledger::with_hole(blocks, low),
    )
}

/// TDX: a guest's request reaches the VMM in pieces of 2 MiB.
fn tdx(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = 64 * MIB;
    const BYTES: u64 = 16 * MIB;
    guest.fill(START, BYTES, 1)?;
    guest.agree(scenario, "shared pattern")?;
    for at in (START..START + BYTES).step_by(2 * MIB as usize) {
        guest.convert(scenario, at, 2 * MIB, true)?;
    }
    guest.expect_fresh(scenario, START, BYTES)?;
    guest.fill(START, BYTES, 2)?;
    guest.agree(scenario, "2 MiB requests, to private")?;
    for at in (START..START + BYTES).step_by(2 * MIB as usize) {
        guest.convert(scenario, at, 2 * MIB, false)?;
    }
    guest.expect_fresh(scenario, START, BYTES)?;
    guest.fill(START, BYTES, 3)?;
    guest.agree(scenario, "2 MiB requests, back to shared")
}

/// SNP: KVM collects up to 128 MiB of page state changes into one request.
fn snp(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = 128 * MIB;
    const BYTES: u64 = 128 * MIB;
    guest.convert(scenario, START, BYTES, true)?;
    guest.expect_fresh(scenario, START, BYTES)?;
    guest.fill(START, BYTES, 4)?;
    guest.agree(scenario, "128 MiB at once")
}

/// Where single pages are converted: every second one of the first 2 * SINGLES.
const SINGLES_START: u64 = 32 * MIB;
const SINGLES: u64 = 64;

/// Every second page of a range, one request each: as many runs as there can be.
fn single_pages(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    const BYTES: u64 = 2 * SINGLES * PAGE;
    guest.fill(SINGLES_START, BYTES, 5)?;
    let results = guest
        .monitor
        .storm(SINGLES, SINGLES_START, PAGE, true, 2 * PAGE)?;
    scenario.check_equal(
        results,
        vec![(0, SINGLES)],
        "results of single-page requests",
    )?;
    for index in 0..SINGLES {
        let at = SINGLES_START + 2 * index * PAGE;
        guest.ledger.convert(at, PAGE, true);
    }
    guest.expect_fresh_pages(scenario, SINGLES_START, SINGLES, 2 * PAGE)?;
    let shared = guest
        .monitor
        .check_pages(SINGLES_START + PAGE, SINGLES, 2 * PAGE, 5)?;
    scenario.check_equal(
        shared,
        None,
        "the shared pages between them keep their bytes",
    )?;
    guest.fill(SINGLES_START, BYTES, 6)?;
    guest.agree(scenario, "single pages")
}

/// One request over the end of one block and the beginning of the next.
fn two_blocks(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = RAM0_BYTES - 4 * MIB;
    const BYTES: u64 = 8 * MIB;
    guest.fill(START, BYTES, 7)?;
    guest.convert(scenario, START, BYTES, true)?;
    guest.expect_fresh(scenario, START, BYTES)?;
    guest.fill(START, BYTES, 8)?;
    guest.agree(scenario, "one range in two blocks")
}

/// The second place where the second block appears.
fn above_4_gib(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = HIGH + 16 * MIB;
    const BYTES: u64 = 16 * MIB;
    guest.fill(START - MIB, BYTES + 2 * MIB, 9)?;
    guest.convert(scenario, START, BYTES, true)?;
    guest.expect_fresh(scenario, START, BYTES)?;
    guest.fill(START, BYTES, 10)?;
    guest.agree(scenario, "above 4 GiB")
}

/// Requests over pages of both kinds: those that are already as wanted keep their bytes.
fn mixed(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    guest.convert(scenario, SINGLES_START, MIB, true)?;
    let kept = guest
        .monitor
        .check_pages(SINGLES_START, SINGLES, 2 * PAGE, 6)?;
    scenario.check_equal(
        kept,
        None,
        "pages that were private already keep their bytes",
    )?;
    guest.expect_fresh_pages(scenario, SINGLES_START + PAGE, SINGLES, 2 * PAGE)?;
    let rest = 2 * SINGLES * PAGE;
    guest.expect_fresh(scenario, SINGLES_START + rest, MIB - rest)?;
    guest.fill(SINGLES_START, MIB, 11)?;
    guest.agree(scenario, "mixed, to private")?;

    const BIG: u64 = 128 * MIB;
    const BIG_BYTES: u64 = 128 * MIB;
    const AROUND: u64 = 8 * MIB;
    guest.fill(BIG - AROUND, AROUND, 12)?;
    guest.fill(BIG + BIG_BYTES, AROUND, 12)?;
    guest.convert(scenario, BIG - AROUND, BIG_BYTES + 2 * AROUND, false)?;
    guest.expect_fresh(scenario, BIG, BIG_BYTES)?;
    guest.fill(BIG, 16 * MIB, 13)?;
    guest.agree(scenario, "mixed, to shared")
}

/// Everything shared again, also by one request over two blocks with shared memory around.
fn all_back(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    guest.convert(scenario, SINGLES_START, MIB, false)?;
    guest.expect_fresh(scenario, SINGLES_START, MIB)?;
    guest.convert(scenario, RAM0_BYTES - 16 * MIB, 32 * MIB, false)?;
    guest.expect_fresh(scenario, RAM0_BYTES - 4 * MIB, 8 * MIB)?;
    guest.convert(scenario, HIGH, RAM1_BYTES - RAM1_LOW_BYTES, false)?;
    guest.expect_fresh(scenario, HIGH + 16 * MIB, 16 * MIB)?;
    scenario.check_equal(
        guest.ledger.all_private_bytes(),
        0,
        "private bytes in the ledger at the end",
    )?;
    guest.agree(scenario, "all shared again")
}
