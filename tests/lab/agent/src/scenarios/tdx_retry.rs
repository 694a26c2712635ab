// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page of an SNP or TDX guest that somebody outside holds can't become private, where one file is both. A TD is told to retry, and
//! from where: the pieces of 2 MiB before that page's are done, nothing else is, again and again until the page is let go. Then the
//! same request goes on. An SNP guest, which has no such answer, gets an error for the whole request, with nothing changed.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::failure::{Attempt, Failure};
use crate::host::pins::{Ring, Spliced};
use crate::host::shared_pages::SharedPages;
use crate::ledger::PAGE;
use crate::machine::Surroundings;
use crate::monitor::protocol::{KVM_HC_MAP_GPA_RANGE, MAP_GPA_ENCRYPTED, MAP_GPA_RETRY as RETRY};
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use crate::tee::{Host, Kind, Launch};
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 64 * MIB;
/// How much KVM asks for at once for a TD.
const PIECE: u64 = 2 * MIB;
/// A request of four pieces, the last of them short.
const BYTES: u64 = 3 * PIECE + 3 * PAGE;
/// The page that is held, in the second.
const HELD: u64 = PIECE + 5 * PAGE;
const EVENT: &str = "GMEM_CONVERSION_FAILED";
const PATIENCE: Duration = Duration::from_secs(60);
const EINVAL: u64 = libc::EINVAL as u64;

/// What lets go of a page.
type Release<'a> = Box<dyn FnOnce() -> Result<(), Failure> + 'a>;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let host = Host::of(scenario)?;
    let ring = Ring::new()?;
    let surroundings = Surroundings {
        inherited: &[ring.descriptor()],
        ..Surroundings::default()
    };
    let mut guest = Launch::new(&host, RAM_BYTES)
        .surroundings(surroundings)
        .start(scenario.directory())?;
    guest.agree(scenario, "at start")?;
    // At QEMU's own address, so that what the kernel says of the ring, which QEMU has too, means a page of QEMU's.
    let pages = SharedPages::where_qemu_has_them(guest.machine.pid(), RAM_BYTES)?;

    scenario.prefix("io_uring buffer: ");
    let held_by_ring = |offset| -> Result<Release, Failure> {
        ring.register(&pages, offset)
            .attempt(|| "registering an io_uring buffer".into())?;
        Ok(Box::new(|| {
            ring.unregister()
                .attempt(|| "unregistering an io_uring buffer".into())
        }))
    };
    let error = refused_then_done(
        scenario,
        &mut guest,
        host.kind,
        &pages,
        16 * MIB,
        held_by_ring,
    )?;
    scenario.check(
        error.contains("held by io_uring ring"),
        format!("the error names the ring, which QEMU has open: {error}"),
    )?;

    scenario.prefix("page in a pipe: ");
    let held_by_pipe = |offset| -> Result<Release, Failure> {
        let spliced = Spliced::new(&pages, offset)?;
        Ok(Box::new(|| {
            let read = spliced.read().map(drop);
            read.attempt(|| "reading the pipe".into())
        }))
    };
    refused_then_done(
        scenario,
        &mut guest,
        host.kind,
        &pages,
        // Not where its pieces are aligned to what they are.
        32 * MIB + 7 * PAGE,
        held_by_pipe,
    )?;

    if host.kind == Kind::Tdx {
        scenario.prefix("let go meanwhile: ");
        let_go_meanwhile(scenario, &mut guest, &pages, &ring)?;
    }
    scenario.prefix("");
    guest.agree(scenario, "at the end")?;
    drop((pages, ring));
    guest.finish(scenario)
}

fn failures(guest: &mut Confidential) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?.total("failures")
}

/// One request to private, as the guest's firmware makes it: what it is told, and where it is to go on.
fn ask(guest: &mut Confidential, gpa: u64, end: u64) -> Result<(u64, u64), Failure> {
    let arguments = [gpa, (end - gpa) / PAGE, MAP_GPA_ENCRYPTED];
    guest.monitor.port_call(KVM_HC_MAP_GPA_RANGE, arguments)
}

/// Returns what QEMU says is wrong.
fn refused_then_done<'a>(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    kind: Kind,
    pages: &SharedPages,
    place: u64,
    hold: impl FnOnce(u64) -> Result<Release<'a>, Failure>,
) -> Result<String, Failure> {
    let (end, held) = (place + BYTES, place + HELD);
    guest.convert(scenario, place, BYTES, false)?;
    guest.fill(place, BYTES, 5)?;
    let release = hold(held)?;
    let before = failures(guest)?;

    let (told, stopped) = ask(guest, place, end)?;
    scenario.fact("told while a page is held", told);
    let error = match kind {
        Kind::Tdx => {
            scenario.check_equal(
                (told, stopped),
                (RETRY, place + PIECE),
                "what a TD is told while a page is held, and where to go on",
            )?;
            guest.ledger.convert(place, PIECE, true);
            guest.fill(place, PIECE, 6)?;
            reason(scenario, guest, stopped)?
        }
        Kind::Snp => {
            scenario.check_equal(
                told,
                EINVAL,
                "what an SNP guest is told while a page is held",
            )?;
            reason(scenario, guest, place)?
        }
    };
    scenario.check(
        error.contains(&format!("{held:#x}")),
        format!("the error names the offset {held:#x}: {error}"),
    )?;
    scenario.fact("what QEMU says", error.clone());
    guest.agree_but_kernel(scenario, "a page is held")?;

    // As often as it asks.
    let from = match kind {
        Kind::Tdx => stopped,
        Kind::Snp => place,
    };
    const TIMES: u64 = 3;
    for _ in 0..TIMES {
        scenario.check_equal(
            ask(guest, from, end)?.0,
            told,
            "what it is told the next time",
        )?;
    }
    // For an SNP guest QEMU asks again by itself.
    let counted = failures(guest)? - before;
    scenario.check(
        match kind {
            Kind::Tdx => counted == 1 + TIMES,
            Kind::Snp => counted > TIMES,
        },
        format!("each refusal is counted: {counted}"),
    )?;
    guest.agree_but_kernel(scenario, "asked again")?;
    // The pieces behind it are nobody's.
    let last = place + 2 * PIECE;
    guest.convert(scenario, last, end - last, true)?;
    guest.fill(last, end - last, 7)?;
    guest.agree_but_kernel(scenario, "all but the held page's piece")?;
    guest.convert(scenario, last, end - last, false)?;
    guest.fill(last, end - last, 8)?;

    release()?;
    scenario.check_equal(
        ask(guest, from, end)?.0,
        0,
        "what it is told once that is let go",
    )?;
    guest.ledger.convert(from, end - from, true);
    guest.fill(place, BYTES, 9)?;
    let refusal = pages.refusal(held);
    scenario.check(refusal.is_some(), "this host can't read the private page")?;
    guest.agree(scenario, "private once let go")?;
    Ok(error)
}

/// What the event for a failure there says.
fn reason(scenario: &Scenario, guest: &mut Confidential, place: u64) -> Result<String, Failure> {
    loop {
        let event = guest.machine.qmp.event(EVENT, PATIENCE)?;
        let data = &event["data"];
        if data["gpa"] == place {
            scenario.check_equal(
                data["to-private"].as_bool(),
                Some(true),
                "the direction in the event",
            )?;
            return data["error"]
                .as_str()
                .map(String::from)
                .attempt(|| format!("the event says no reason: {event}"));
        }
    }
}

/// A guest that retries by itself is done soon after the page is let go, and sees nothing of it.
fn let_go_meanwhile(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    pages: &SharedPages,
    ring: &Ring,
) -> Outcome {
    const PLACE: u64 = 48 * MIB;
    // The payload retries a few times, each of which QEMU waits a moment for. An emulated machine may oversleep.
    const ATTEMPTS: usize = 10;
    for _ in 0..ATTEMPTS {
        guest.convert(scenario, PLACE, BYTES, false)?;
        guest.fill(PLACE, BYTES, 10)?;
        let before = failures(guest)?;
        ring.register(pages, PLACE + HELD)
            .attempt(|| "registering an io_uring buffer".into())?;
        let begun = guest.monitor.begin(&format!(
            "convert {PLACE:#x} {:#x} {MAP_GPA_ENCRYPTED:#x}",
            BYTES / PAGE
        ))?;
        let deadline = Instant::now() + PATIENCE;
        while failures(guest)? == before {
            if Instant::now() > deadline {
                return Err(Failure::new("no request was refused while a page was held"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        ring.unregister()
            .attempt(|| "unregistering an io_uring buffer".into())?;
        let words = guest.monitor.end(begun)?;
        let told = words.first().map(String::as_str);
        if told == Some(format!("{RETRY:#x}").as_str()) {
            // Too late for it: its first piece is done.
            guest.ledger.convert(PLACE, PIECE, true);
            continue;
        }
        scenario.check_equal(told, Some("0x0"), "what the guest is told in the end")?;
        guest.ledger.convert(PLACE, BYTES, true);
        guest.fill(PLACE, BYTES, 11)?;
        scenario.fact("refused on the way", failures(guest)? - before);
        return guest.agree(scenario, "let go meanwhile");
    }
    Err(Failure::new(format!(
        "in {ATTEMPTS} attempts this host never let go of a page in time"
    )))
}
