// SPDX-License-Identifier: MIT OR Apache-2.0
//! SNP and TDX guests convert memory by the calls that they have: SNP in one request, TDX in pieces of 2 MiB. To shared and back,
//! within blocks and across them, in holes, at devices and in QEMU's own ROMs; what is refused changes nothing but the pieces that
//! came before it, and the guest is told where that was. After every step guest, QEMU, files and KVM are asked and must agree.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::Failure;
use crate::host::kernel;
use crate::ledger::{Block, PAGE};
use crate::monitor::protocol;
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use crate::tee::{Host, Kind, Launch, ROM};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PIECE: u64 = 2 * MIB;

// Two blocks, told apart by their sizes, so that one range can lie in both; the second appears at two places.
const RAM0_BYTES: u64 = 64 * MIB;
const RAM1_BYTES: u64 = 32 * MIB;
const LOW_BYTES: u64 = RAM0_BYTES + RAM1_BYTES / 2;
const HIGH: u64 = 4 * GIB;
const HIGH_BYTES: u64 = RAM1_BYTES / 2;

/// What has no memory: behind RAM, and behind that above 4 GiB.
const HOLE: u64 = LOW_BYTES;
const HIGH_HOLE: u64 = HIGH + HIGH_BYTES;
const LOCAL_APIC: u64 = 0xfee0_0000;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = Host::of(scenario)?;
    let mut guest = start(scenario, &host)?;
    guest.machine.is_silent()?;
    guest.patient = true;
    guest.agree(scenario, "after start")?;
    pieces(scenario, &mut guest, host.kind)?;
    single_pages(scenario, &mut guest)?;
    two_blocks(scenario, &mut guest)?;
    above_4_gib(scenario, &mut guest)?;
    without_memory(scenario, &mut guest)?;
    half_in_a_hole(scenario, &mut guest, host.kind)?;
    roms(scenario, &mut guest, host.kind)?;
    nonsense(scenario, &mut guest)?;
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    for name in ["requests", "failures", "ignored-bytes", "convert-ns-max"] {
        scenario.fact(name, gmem.total(name)?);
    }
    scenario.fact("agreements", guest.agreements);
    guest.finish(scenario)?;
    if !kernel::in_place() {
        scenario.prefix("stock: ");
        stock(scenario, &host)?;
        scenario.prefix("");
    }
    Ok(())
}

fn start(scenario: &Scenario, host: &Host) -> Result<Confidential, Failure> {
    let blocks = vec![
        Block::small("ram0", RAM0_BYTES),
        Block::small("ram1", RAM1_BYTES),
    ];
    Launch::new(host, 0)
        .blocks(blocks, LOW_BYTES)
        .machine(&format!(",max-ram-below-4g={LOW_BYTES}"))
        .arguments(&[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM0_BYTES}"),
            "-object",
            &format!("memory-backend-gmem,id=ram1,size={RAM1_BYTES}"),
            "-numa",
            "node,nodeid=0,memdev=ram0",
            "-numa",
            "node,nodeid=1,memdev=ram1",
        ])
        .start(scenario.directory())
}

fn requests(guest: &mut Confidential) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?.total("requests")
}

/// A range to shared and back, with bytes in it each time.
fn to_and_fro(
    scenario: &Scenario,
    guest: &mut Confidential,
    gpa: u64,
    bytes: u64,
    what: &str,
) -> Outcome {
    guest.fill(gpa, bytes, 1)?;
    guest.convert(scenario, gpa, bytes, false)?;
    guest.expect_fresh(scenario, gpa, bytes)?;
    guest.fill(gpa, bytes, 2)?;
    guest.agree(scenario, &format!("{what}, shared"))?;
    guest.convert(scenario, gpa, bytes, true)?;
    guest.expect_fresh(scenario, gpa, bytes)?;
    guest.fill(gpa, bytes, 3)?;
    guest.agree(scenario, &format!("{what}, private again"))
}

/// KVM hands a TD's request on in pieces of 2 MiB from where it begins, an SNP guest's as it is.
fn pieces(scenario: &mut Scenario, guest: &mut Confidential, kind: Kind) -> Outcome {
    const START: u64 = 16 * MIB + 5 * PAGE;
    const BYTES: u64 = 4 * PIECE + 3 * PAGE;
    let before = requests(guest)?;
    to_and_fro(scenario, guest, START, BYTES, "a long range")?;
    let each = match kind {
        Kind::Snp => 1,
        Kind::Tdx => BYTES.div_ceil(PIECE),
    };
    let counted = requests(guest)? - before;
    scenario.fact("requests for a long range, there and back", counted);
    scenario.check_equal(
        counted,
        2 * each,
        "requests for a long range, there and back",
    )
}

fn single_pages(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    const START: u64 = 32 * MIB;
    const COUNT: u64 = 32;
    for private in [false, true] {
        for index in 0..COUNT {
            guest.convert(scenario, START + index * 3 * PAGE, PAGE, private)?;
        }
        guest.fill(START, COUNT * 3 * PAGE, 4)?;
        guest.agree(scenario, &format!("single pages, private: {private}"))?;
    }
    Ok(())
}

fn two_blocks(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    to_and_fro(scenario, guest, RAM0_BYTES - 3 * MIB, 5 * MIB, "two blocks")
}

fn above_4_gib(scenario: &Scenario, guest: &mut Confidential) -> Outcome {
    to_and_fro(scenario, guest, HIGH, HIGH_BYTES, "above 4 GiB")
}

/// The hypercall's result as it is, and where it stopped.
fn raw(
    guest: &mut Confidential,
    gpa: u64,
    bytes: u64,
    private: bool,
) -> Result<(u64, u64), Failure> {
    let attributes = if private {
        protocol::MAP_GPA_ENCRYPTED
    } else {
        0
    };
    guest.monitor.port_call(
        protocol::KVM_HC_MAP_GPA_RANGE,
        [gpa, bytes / PAGE, attributes],
    )
}

/// Where no memory is, everything is shared and nothing can be private.
fn without_memory(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    for (what, gpa, bytes) in [
        ("behind RAM", HOLE, PAGE),
        ("behind all RAM", HIGH_HOLE, 3 * PIECE),
        ("devices", LOCAL_APIC, PAGE),
        ("far away", 1 << 36, PIECE),
    ] {
        let (result, _) = raw(guest, gpa, bytes, false)?;
        scenario.check_equal(result, 0, format!("{what}: the result of to-shared"))?;
        let (result, _) = raw(guest, gpa, bytes, true)?;
        scenario.fact(&format!("{what}, to private"), result);
        scenario.check(result != 0, format!("{what}: to-private is refused"))?;
    }
    guest.agree(scenario, "without memory")
}

/// A TD's pieces before the one that is refused are done, and it learns where that is. An SNP guest's request is refused whole.
fn half_in_a_hole(scenario: &mut Scenario, guest: &mut Confidential, kind: Kind) -> Outcome {
    let start = HOLE - 2 * PIECE;
    guest.convert(scenario, start, 2 * PIECE, false)?;
    guest.fill(start, 2 * PIECE, 5)?;
    let (result, stopped) = raw(guest, start, 4 * PIECE, true)?;
    scenario.fact("half in a hole, to private", result);
    match kind {
        Kind::Snp => {
            scenario.check(result != 0, "half in a hole: to-private is refused")?;
            guest.agree(scenario, "half in a hole, refused")?;
            guest.convert(scenario, start, 2 * PIECE, true)?;
        }
        Kind::Tdx => {
            scenario.check_equal(
                (result, stopped),
                (protocol::MAP_GPA_INVALID_OPERAND, HOLE),
                "half in a hole: what a TD is told, and where it stopped",
            )?;
            guest.ledger.convert(start, 2 * PIECE, true);
        }
    }
    guest.fill(start, 2 * PIECE, 6)?;
    guest.agree(
        scenario,
        "half in a hole, private as far as there is memory",
    )?;
    // To shared there is nothing to refuse.
    guest.convert(scenario, start, 4 * PIECE, false)?;
    guest.fill(start, 2 * PIECE, 7)?;
    guest.agree(scenario, "half in a hole, shared")?;
    guest.convert(scenario, start, 2 * PIECE, true)
}

/// Memory of QEMU's own converts too, but not in one request with RAM.
fn roms(scenario: &mut Scenario, guest: &mut Confidential, kind: Kind) -> Outcome {
    let memory = match kind {
        Kind::Snp => ROM,
        // The payload was copied from there, and nobody needs it any more.
        Kind::Tdx => {
            let start = kind.firmware_range()?.start;
            start..start + 16 * PAGE
        }
    };
    let bytes = memory.end - memory.start;
    for private in [false, true] {
        let (result, _) = raw(guest, memory.start, bytes, private)?;
        scenario.check_equal(
            result,
            0,
            format!("the result for QEMU's own memory, private: {private}"),
        )?;
        if let Some(tee) = &mut guest.tee {
            tee.others_shared.clear();
            if !private {
                tee.others_shared.push(memory.clone());
            }
        }
        guest.agree(scenario, &format!("QEMU's own memory, private: {private}"))?;
    }
    if kind == Kind::Snp {
        let (result, _) = raw(guest, ROM.end - 2 * PAGE, 4 * PAGE, false)?;
        scenario.fact("RAM and ROMs at once", result);
        scenario.check(result != 0, "RAM and ROMs at once are refused")?;
        guest.agree(scenario, "RAM and ROMs at once")?;
    }
    Ok(())
}

fn nonsense(scenario: &mut Scenario, guest: &mut Confidential) -> Outcome {
    for (what, gpa, bytes) in [
        ("nothing", 32 * MIB, 0),
        ("half a page", 32 * MIB + PAGE / 2, PAGE),
        ("around the end", u64::MAX - PAGE + 1, 2 * PAGE),
    ] {
        for private in [false, true] {
            let (result, _) = raw(guest, gpa, bytes, private)?;
            scenario.check(
                result != 0,
                format!("{what} is refused, private: {private}"),
            )?;
        }
    }
    guest.agree(scenario, "after nonsense")
}

/// QEMU's own way with the same requests, as far as it has one.
fn stock(scenario: &mut Scenario, host: &Host) -> Outcome {
    let directory = scenario.directory().join("stock");
    let mut guest = Launch::new(host, RAM0_BYTES).stock().start(&directory)?;
    to_and_fro(scenario, &mut guest, 16 * MIB, 4 * PIECE, "a long range")?;
    single_pages(scenario, &mut guest)?;
    guest.finish(scenario)
}
