// SPDX-License-Identifier: MIT OR Apache-2.0
//! A page of a guest that somebody outside holds can't become private: the guest gets an error that names the page, all
//! is as before, and the same request succeeds once it is let go. No device ever sees private bytes. References that come
//! and go cost a repetition and no failure.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::{Attempt, Failure};
use crate::host::engine::OwnEngine;
use crate::host::iommufd::Page;
use crate::host::passthrough::{two_to_vfio, EDU};
use crate::host::pins::{Ring, Spliced};
use crate::host::shared_pages::SharedPages;
use crate::ledger::{Block, Ledger, PAGE};
use crate::machine::Surroundings;
use crate::monitor::protocol::{pattern, MAP_GPA_ENCRYPTED};
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM_BYTES: u64 = 128 * MIB;
const ORIGIN: u64 = 16 * MIB;
const ELSEWHERE: u64 = 17 * MIB;
/// How many pages a request is for, and which of them is held.
const PAGES: u64 = 8;
const HELD: u64 = 5;
const EVENT: &str = "GMEM_CONVERSION_FAILED";
const EVENT_PATIENCE: Duration = Duration::from_secs(60);
const EINVAL: i64 = libc::EINVAL as i64;
/// What must be as it was after a request that fails.
const KEPT: [&str; 7] = [
    "private",
    "shared",
    "private-runs",
    "dma-mapped",
    "quarantined",
    "to-private",
    "to-shared",
];

/// What lets go of a page.
type Release<'a> = Box<dyn FnOnce() -> Result<(), Failure> + 'a>;

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let [device, own] = two_to_vfio(&EDU)?;
    let ring = Ring::new()?;
    let mut guest = start(scenario, &device, &ring)?;
    // At QEMU's own address, so that what the kernel says of the ring, which QEMU has too, means a page of QEMU's.
    let pages = SharedPages::where_qemu_has_them(guest.machine.pid(), RAM_BYTES)?;
    let own = OwnEngine::open(&own)?;
    let backing = Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .text("backing")?
        .to_string();
    scenario.check_equal(backing.as_str(), "in-place", "the block's backing")?;
    scenario.fact("backing", backing);

    scenario.prefix("io_uring buffer: ");
    let error = refused_then_done(scenario, &mut guest, &pages, 32 * MIB, |offset| {
        ring.register(&pages, offset)
            .attempt(|| "registering an io_uring buffer".into())?;
        Ok(Box::new(|| {
            ring.unregister()
                .attempt(|| "unregistering an io_uring buffer".into())
        }))
    })?;
    scenario.check(
        error.contains("held by io_uring ring"),
        format!("the error names the ring, which QEMU has open: {error}"),
    )?;

    scenario.prefix("page in a pipe: ");
    refused_then_done(scenario, &mut guest, &pages, 33 * MIB, |offset| {
        let spliced = Spliced::new(&pages, offset)?;
        Ok(Box::new(|| {
            spliced
                .read()
                .map(|_| ())
                .attempt(|| "reading the pipe".into())
        }))
    })?;

    scenario.prefix("another device: ");
    let place = 34 * MIB;
    let held = place + HELD * PAGE;
    refused_then_done(scenario, &mut guest, &pages, place, |offset| {
        own.iommufd
            .map_address(own.ioas, offset, pages.address(offset))
            .attempt(|| "mapping a page of the guest for this host's device".into())?;
        let (iommufd, ioas) = (&own.iommufd, own.ioas);
        Ok(Box::new(move || {
            iommufd
                .unmap(ioas, offset, PAGE)
                .attempt(|| "unmapping it".into())
        }))
    })?;
    own_device_sees_shared_only(scenario, &mut guest, &pages, &own, held)?;

    scenario.prefix("let go meanwhile: ");
    let_go_meanwhile(scenario, &mut guest, &pages, &ring)?;
    scenario.prefix("read meanwhile: ");
    read_meanwhile(scenario, &mut guest, &pages)?;

    scenario.prefix("");
    guest.agree_but_kernel(scenario, "at the end")?;
    let block = Gmem::query(&mut guest.machine.qmp)?;
    scenario.fact("retries", block.block("ram0")?.number("retries")?);
    drop((pages, own, ring));
    guest.finish(scenario)
}

fn start(scenario: &Scenario, device: &str, ring: &Ring) -> Result<Confidential, Failure> {
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    Confidential::start_in(
        scenario.directory(),
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={RAM_BYTES}"),
            "-m",
            &format!("{}M", RAM_BYTES / MIB),
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0",
            "-object",
            "iommufd,id=iommufd0",
            "-device",
            &passthrough,
        ],
        Ledger::new(vec![Block::small("ram0", RAM_BYTES)]),
        Surroundings {
            inherited: &[ring.descriptor()],
            ..Surroundings::default()
        },
    )
}

fn number(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    Gmem::query(&mut guest.machine.qmp)?
        .block("ram0")?
        .number(name)
}

fn kept(guest: &mut Confidential) -> Result<Vec<u64>, Failure> {
    let gmem = Gmem::query(&mut guest.machine.qmp)?;
    let block = gmem.block("ram0")?;
    KEPT.iter().map(|name| block.number(name)).collect()
}

/// One page of a range is held: the range can't become private and its other pages can; then it is let go. Returns what
/// QEMU said was wrong.
fn refused_then_done<'a>(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    pages: &SharedPages,
    place: u64,
    hold: impl FnOnce(u64) -> Result<Release<'a>, Failure>,
) -> Result<String, Failure> {
    const BYTES: u64 = PAGES * PAGE;
    let held = place + HELD * PAGE;
    let engine = Engine::new(0, ORIGIN);
    guest.fill(place, BYTES, 5)?;
    let release = hold(held)?;
    let before = kept(guest)?;
    let retries = number(guest, "retries")?;
    let failures = Gmem::query(&mut guest.machine.qmp)?.total("failures")?;

    let begin = Instant::now();
    let result = guest.monitor.convert(place, BYTES, true)?;
    scenario.fact("to-private, held", result);
    scenario.fact(
        "milliseconds until refused",
        begin.elapsed().as_millis() as u64,
    );
    scenario.check_equal(result, EINVAL, "result of to-private while a page is held")?;
    let error = told(scenario, guest, place)?;
    scenario.fact("what QEMU says", error.clone());
    scenario.check(
        error.contains(&format!("{held:#x}")),
        format!("the error names the offset {held:#x}: {error}"),
    )?;
    scenario.check_equal(kept(guest)?, before, format!("{KEPT:?} after a refusal"))?;
    scenario.check_equal(
        Gmem::query(&mut guest.machine.qmp)?.total("failures")?,
        failures + 1,
        "failures after a refusal",
    )?;
    scenario.fact("asked again", number(guest, "retries")? - retries);
    guest.agree_but_kernel(scenario, "refused")?;
    for page in [held, place] {
        engine.reaches(scenario, guest, page)?;
    }

    // The pages beside it, one of them on either side, are nobody's.
    for (gpa, bytes) in [
        (place, HELD * PAGE),
        (held + PAGE, (PAGES - HELD - 1) * PAGE),
    ] {
        guest.convert(scenario, gpa, bytes, true)?;
        guest.fill(gpa, bytes, 6)?;
    }
    engine.reaches(scenario, guest, held)?;
    let result = guest.monitor.convert(place, BYTES, true)?;
    scenario.check_equal(
        result,
        EINVAL,
        "result while all but the held page is private",
    )?;
    guest.agree_but_kernel(scenario, "all but the held page private")?;
    guest.convert(scenario, place, BYTES, false)?;
    guest.fill(place, BYTES, 7)?;

    release()?;
    guest.convert(scenario, place, BYTES, true)?;
    scenario.fact("to-private, let go", 0);
    guest.fill(place, BYTES, 8)?;
    let fault = engine.is_kept_from(scenario, guest, held, ELSEWHERE)?;
    scenario.fact("fault at the private page", fault);
    let refusal = pages.refusal(held);
    scenario.check(refusal.is_some(), "this host can't read the private page")?;
    scenario.fact("this host reads the private page", refusal);
    guest.agree_but_kernel(scenario, "private once let go")?;
    Ok(error)
}

/// What the event for a failure there says.
fn told(scenario: &Scenario, guest: &mut Confidential, place: u64) -> Result<String, Failure> {
    loop {
        let event = guest.machine.qmp.event(EVENT, EVENT_PATIENCE)?;
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

/// This host's own device, which had a page for as long as it was shared, has lost it.
fn own_device_sees_shared_only(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    pages: &SharedPages,
    own: &OwnEngine,
    held: u64,
) -> Outcome {
    /// Far from any address of the guest's.
    const SCRATCH: u64 = 1 << 30;
    const SECRET: u64 = 9;
    let holds = |page: &Page, seed: u64| {
        let words = (held..).step_by(8).zip(page.words());
        words
            .into_iter()
            .all(|(at, word)| word == pattern(seed, at))
    };
    let scratch = Page::new()?;
    own.iommufd
        .map(own.ioas, SCRATCH, &scratch)
        .attempt(|| "mapping a page of ours".into())?;

    guest.fill(held, PAGE, SECRET)?;
    own.load(held)?;
    own.store(SCRATCH)?;
    scenario.check(
        !holds(&scratch, SECRET),
        "this host's device does not read the private page",
    )?;
    own.store(held)?;
    let changed = guest.monitor.check(held, PAGE, SECRET)?;
    scenario.check_equal(changed, None, "this host's device does not write to it")?;
    let mapped = own.iommufd.map_address(own.ioas, held, pages.address(held));
    let refusal = mapped.err().map(|error| error.to_string());
    scenario.check(refusal.is_some(), "a private page can't be mapped for it")?;
    scenario.fact("mapping a private page for it", refusal);

    // The same with the page shared arrives, so that the device is no dummy.
    guest.convert(scenario, held, PAGE, false)?;
    guest.fill(held, PAGE, SECRET)?;
    own.iommufd
        .map_address(own.ioas, held, pages.address(held))
        .attempt(|| "mapping a shared page for this host's device".into())?;
    own.load(held)?;
    own.store(SCRATCH)?;
    scenario.check(
        holds(&scratch, SECRET),
        "this host's device reads the shared page",
    )?;
    for iova in [held, SCRATCH] {
        own.iommufd
            .unmap(own.ioas, iova, PAGE)
            .attempt(|| format!("unmapping {iova:#x}"))?;
    }
    scenario.fact("device of this host", "reads it shared, not private");
    Ok(())
}

/// A page is let go 20 ms after the kernel first said no: the request that was under way succeeds.
fn let_go_meanwhile(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    pages: &SharedPages,
    ring: &Ring,
) -> Outcome {
    /// Half of the time after which the library gives up. An emulated machine may oversleep.
    const IN_TIME: Duration = Duration::from_millis(50);
    const ATTEMPTS: usize = 10;
    for _ in 0..ATTEMPTS {
        let retries = number(guest, "retries")?;
        let (result, held_for) = held_for_a_moment(guest, pages, ring)?;
        if result != "0x0" && held_for > IN_TIME {
            continue;
        }
        scenario.check_equal(
            result.as_str(),
            "0x0",
            format!("result of the request during which the page was let go, after {held_for:?}"),
        )?;
        guest.ledger.convert(MOMENT, MOMENT_BYTES, true);
        let asked = number(guest, "retries")? - retries;
        scenario.fact("asked again", asked);
        scenario.fact("milliseconds held", held_for.as_millis() as u64);
        scenario.check(asked > 0, "the kernel was asked more than once")?;
        guest.fill(MOMENT, MOMENT_BYTES, 11)?;
        guest.agree_but_kernel(scenario, "let go meanwhile")?;
        return guest.convert(scenario, MOMENT, MOMENT_BYTES, false);
    }
    Err(Failure::new(format!(
        "in {ATTEMPTS} attempts this host never let go of a page within {IN_TIME:?}"
    )))
}

const MOMENT: u64 = 36 * MIB;
const MOMENT_BYTES: u64 = PAGES * PAGE;

/// A request, and a page of it held for a moment after the kernel was first asked: the result, and how long it was held.
fn held_for_a_moment(
    guest: &mut Confidential,
    pages: &SharedPages,
    ring: &Ring,
) -> Result<(String, Duration), Failure> {
    const HELD_FOR: Duration = Duration::from_millis(20);
    const PATIENCE: Duration = Duration::from_secs(60);
    let held = MOMENT + HELD * PAGE;
    guest.fill(MOMENT, MOMENT_BYTES, 10)?;
    ring.register(pages, held)
        .attempt(|| "registering an io_uring buffer".into())?;
    pages.touch(held).attempt(|| "touching a page".into())?;
    let begun = guest.monitor.begin(&format!(
        "convert {MOMENT:#x} {PAGES} {MAP_GPA_ENCRYPTED:#x}"
    ))?;
    // The kernel takes a page out of all processes before it looks who else has it.
    let deadline = Instant::now() + PATIENCE;
    while pages.is_mapped(held)? {
        if Instant::now() > deadline {
            return Err(Failure::new("the kernel was never asked to convert"));
        }
    }
    let begin = Instant::now();
    thread::sleep(HELD_FOR);
    ring.unregister()
        .attempt(|| "unregistering an io_uring buffer".into())?;
    let held_for = begin.elapsed();
    let words = guest.monitor.end(begun)?;
    Ok((words.first().cloned().unwrap_or_default(), held_for))
}

/// This host reads a page all the time, while it turns private and shared: no conversion fails.
fn read_meanwhile(
    scenario: &mut Scenario,
    guest: &mut Confidential,
    pages: &SharedPages,
) -> Outcome {
    const PLACE: u64 = 40 * MIB;
    const TIMES: u64 = 2000;
    let retries = number(guest, "retries")?;
    let done = AtomicBool::new(false);
    let (seen, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let results = thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; PAGE as usize];
            while !done.load(Relaxed) {
                let counter = match pages.read(&mut buffer, PLACE) {
                    Ok(()) => &seen,
                    Err(_) => &refused,
                };
                counter.fetch_add(1, Relaxed);
            }
        });
        let begun = guest.monitor.begin_flip(TIMES, PLACE, PAGE, 0, 1);
        let results = begun.and_then(|begun| guest.monitor.end_flip(begun));
        done.store(true, Relaxed);
        results
    })?;
    scenario.check_equal(results, vec![(0, 2 * TIMES)], "results of all conversions")?;
    scenario.fact("conversions", 2 * TIMES);
    scenario.fact("failures", 0);
    scenario.fact("asked again", number(guest, "retries")? - retries);
    scenario.fact("reads by this host", seen.into_inner());
    scenario.fact("reads that met a private page", refused.into_inner());
    Ok(())
}
