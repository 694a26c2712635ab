// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest whose one file is of huge pages: private, one is mapped whole; a single shared page in it splits it, and once
//! that is private again it is whole again. The pool is right at each step, the bytes of pages that did not convert stay,
//! and what fails half-way leaves all as it was.

use crate::boot::CommandLine;
use crate::confidential::Confidential;
use crate::dma::Engine;
use crate::failure::{Attempt, Failure};
use crate::host::conversions;
use crate::host::faults::Faults;
use crate::host::huge_pages::Pool;
use crate::host::mapped_sizes::MappedSizes;
use crate::host::passthrough::{to_vfio, EDU};
use crate::host::pins::Ring;
use crate::host::shared_pages::SharedPages;
use crate::ledger::{Block, Ledger, PAGE};
use crate::qmp::Gmem;
use crate::scenario::{Outcome, Scenario};
use serde_json::json;
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const HUGE: u64 = 2 * MIB;
const RAM_BYTES: u64 = 128 * MIB;
/// RAM goes on above 4 GiB.
const BELOW_BYTES: u64 = 64 * MIB;
const ABOVE: u64 = 4 * GIB;
const SPARE: u64 = 4;
const ORIGIN: u64 = 16 * MIB;
const ELSEWHERE: u64 = 18 * MIB;
const EINVAL: i64 = libc::EINVAL as i64;
/// What must be as it was after a request that fails.
const KEPT: [&str; 7] = [
    "private",
    "shared",
    "private-runs",
    "dma-mapped",
    "quarantined",
    "huge-pages-whole",
    "huge-pages-split",
];

pub fn run(scenario: &mut Scenario, _: &CommandLine) -> Outcome {
    let pool = Pool::of(HUGE)?;
    pool.resize(RAM_BYTES / HUGE + SPARE)?;
    sizes(scenario, &pool)?;
    failures(scenario, &pool)?;
    drop(pool);
    scenario.prefix("1 GiB: ");
    one_large(scenario)
}

/// A guest with RAM of huge pages below and above 4 GiB.
fn start(scenario: &Scenario, name: &str, more: &[&str]) -> Result<Confidential, Failure> {
    let object = format!("memory-backend-gmem,id=ram0,size={RAM_BYTES},hugetlb=on,hugetlbsize=2M");
    let size = format!("{}M", RAM_BYTES / MIB);
    let machine = format!(
        "q35,accel=kvm,smm=off,confidential-guest-support=cgs0,memory-backend=ram0,max-ram-below-4g={BELOW_BYTES}"
    );
    let mut arguments = vec!["-object", &object, "-m", &size, "-machine", &machine];
    arguments.extend(more);
    let ledger = Ledger::with_hole(vec![Block::small("ram0", RAM_BYTES)], BELOW_BYTES);
    Confidential::start(&scenario.directory().join(name), &arguments, ledger)
}

/// Of the block in huge pages, which is the last.
fn number(guest: &mut Confidential, name: &str) -> Result<u64, Failure> {
    let id = guest.ledger.blocks.last().map_or("", |block| block.id);
    Gmem::query(&mut guest.machine.qmp)?.block(id)?.number(name)
}

fn mapped(guest: &Confidential) -> Result<MappedSizes, Failure> {
    MappedSizes::of(guest.machine.pid())
}

/// The pool gives the guest all of its pages and no other, and QEMU counts them as they are.
fn counted(scenario: &mut Scenario, guest: &mut Confidential, pool: &Pool, step: &str) -> Outcome {
    let pages = RAM_BYTES / HUGE;
    let (total, free, reserved) = (pool.total()?, pool.free()?, pool.reserved()?);
    let whole = (0..RAM_BYTES / HUGE)
        .filter(|index| {
            let runs = guest.ledger.private_runs(0);
            let page = index * HUGE..(index + 1) * HUGE;
            runs.iter()
                .any(|run| run.start <= page.start && page.end <= run.end)
        })
        .count() as u64;
    scenario.fact(
        step,
        json!({
            "free": free, "reserved": reserved, "whole": whole,
            "splits": number(guest, "huge-page-splits")?, "merges": number(guest, "huge-page-merges")?,
        }),
    );
    scenario.check_equal(
        (total - free) + reserved,
        pages,
        format!("{step}: huge pages that the guest has or was promised"),
    )?;
    for (name, expected) in [
        ("huge-pages-whole", whole),
        ("huge-pages-split", pages - whole),
    ] {
        scenario.check_equal(
            number(guest, name)?,
            expected,
            format!("{step}: query-gmem's {name}"),
        )?;
    }
    Ok(())
}

/// Mappings, pool and counters, step by step, on both sides of 4 GiB.
fn sizes(scenario: &mut Scenario, pool: &Pool) -> Outcome {
    let mut guest = start(scenario, "sizes", &[])?;
    scenario.fact("free at start", pool.free()?);
    scenario.fact("reserved at start", pool.reserved()?);
    counted(scenario, &mut guest, pool, "at start")?;
    for (side, place) in [("below 4 GiB", 32 * MIB), ("above 4 GiB", ABOVE + 32 * MIB)] {
        scenario.prefix(&format!("{side}: "));
        one_side(scenario, &mut guest, pool, place)?;
    }
    scenario.prefix("");
    guest.agree_but_kernel(scenario, "both sides")?;
    let pid = guest.machine.pid();
    // All of it private, but for what the payload and its devices are in, and back.
    let begin = 8 * MIB;
    guest.convert(scenario, begin, BELOW_BYTES - begin, true)?;
    guest.fill(begin, BELOW_BYTES - begin, 4)?;
    counted(
        scenario,
        &mut guest,
        pool,
        "all but 8 MiB below 4 GiB private",
    )?;
    scenario.fact(
        "mappings of 2 MiB, most of it private",
        mapped(&guest)?.of_2m,
    );
    guest.convert(scenario, begin, BELOW_BYTES - begin, false)?;
    counted(scenario, &mut guest, pool, "shared again")?;

    let begin = Instant::now();
    guest.machine.kill()?;
    let total = pool.total()?;
    while pool.free()? != total {
        if begin.elapsed() > Duration::from_secs(30) {
            return Err(Failure::new(format!(
                "{} of {total} huge pages are free 30 s after QEMU was killed",
                pool.free()?
            )));
        }
        thread::sleep(Duration::from_millis(1));
    }
    scenario.fact(
        "milliseconds from SIGKILL to all huge pages free",
        begin.elapsed().as_millis() as u64,
    );
    scenario.check_equal(pool.reserved()?, 0, "huge pages promised to nobody")?;
    scenario.progress(format!("QEMU {pid} killed, all huge pages free"));
    Ok(())
}

fn one_side(scenario: &mut Scenario, guest: &mut Confidential, pool: &Pool, place: u64) -> Outcome {
    const SMALL: u64 = 7 * PAGE;
    let shared = place + SMALL;
    let merges = number(guest, "huge-page-merges")?;
    let splits = number(guest, "huge-page-splits")?;
    guest.fill(place, HUGE, 1)?;
    let before = mapped(guest)?;

    guest.convert(scenario, place, HUGE, true)?;
    counted(scenario, guest, pool, "whole")?;
    let untouched = mapped(guest)?;
    scenario.check(
        untouched.of_2m <= before.of_2m,
        "nothing is mapped whole before it is touched",
    )?;
    guest.fill(place, HUGE, 2)?;
    let whole = mapped(guest)?;
    scenario.fact("mapped, whole", sizes_fact(&whole, &before));
    scenario.check_equal(
        whole.of_2m - untouched.of_2m,
        1,
        "mappings of 2 MiB more, whole",
    )?;

    guest.convert(scenario, shared, PAGE, false)?;
    counted(scenario, guest, pool, "split")?;
    guest.fill(shared, PAGE, 3)?;
    intact(scenario, guest, place, SMALL)?;
    let split = mapped(guest)?;
    scenario.fact("mapped, split", sizes_fact(&split, &before));
    scenario.check_equal(
        split.of_2m - whole.of_2m,
        -1,
        "mappings of 2 MiB more, split",
    )?;
    scenario.check(
        split.small - whole.small >= (HUGE / PAGE) as i64,
        format!("split, all is mapped in small pages: {split:?} after {whole:?}"),
    )?;

    guest.convert(scenario, shared, PAGE, true)?;
    counted(scenario, guest, pool, "whole again")?;
    guest.fill(shared, PAGE, 2)?;
    intact(scenario, guest, place, SMALL)?;
    let again = mapped(guest)?;
    scenario.fact("mapped, whole again", sizes_fact(&again, &before));
    scenario.check_equal(
        again.of_2m - split.of_2m,
        1,
        "mappings of 2 MiB more, whole again",
    )?;
    scenario.check_equal(
        number(guest, "huge-page-merges")? - merges,
        2,
        "merges of query-gmem",
    )?;
    scenario.check_equal(
        number(guest, "huge-page-splits")? - splits,
        1,
        "splits of query-gmem",
    )?;
    scenario.fact("bytes of 511 pages", "intact, split and merged");
    Ok(())
}

fn sizes_fact(now: &MappedSizes, before: &MappedSizes) -> serde_json::Value {
    let since = now.since(before);
    json!({"2M": since.of_2m, "4K": since.small})
}

/// All but the one page have what the guest wrote while the huge page was whole.
fn intact(scenario: &Scenario, guest: &mut Confidential, place: u64, but: u64) -> Outcome {
    for (gpa, bytes) in [(place, but), (place + but + PAGE, HUGE - but - PAGE)] {
        let difference = guest.monitor.check(gpa, bytes, 2)?;
        scenario.check_equal(
            difference,
            None,
            "pages that did not convert keep their bytes",
        )?;
    }
    Ok(())
}

fn kept(guest: &mut Confidential) -> Result<Vec<u64>, Failure> {
    KEPT.iter().map(|name| number(guest, name)).collect()
}

/// A pin in the second of three huge pages, and no memory for a split.
fn failures(scenario: &mut Scenario, pool: &Pool) -> Outcome {
    const EVENT: &str = "GMEM_CONVERSION_FAILED";
    const PLACE: u64 = 32 * MIB;
    const BYTES: u64 = 3 * HUGE;
    const HELD: u64 = PLACE + HUGE + 5 * PAGE;
    let device = to_vfio(&EDU)?;
    let passthrough = format!("vfio-pci,host={device},iommufd=iommufd0");
    let mut guest = start(
        scenario,
        "failures",
        &["-object", "iommufd,id=iommufd0", "-device", &passthrough],
    )?;
    let engine = Engine::new(0, ORIGIN);
    scenario.prefix("held in the second of three: ");
    counted(scenario, &mut guest, pool, "with a device")?;
    let pages = SharedPages::of(guest.machine.pid(), RAM_BYTES)?;
    let ring = Ring::new()?;
    // The first two pages of the first are private already: an undoing that made all of it shared would show.
    guest.convert(scenario, PLACE, 2 * PAGE, true)?;
    guest.fill(PLACE, BYTES, 1)?;
    ring.register(&pages, HELD)
        .attempt(|| "registering an io_uring buffer".into())?;
    let before = kept(&mut guest)?;
    let result = guest.monitor.convert(PLACE, BYTES, true)?;
    scenario.fact("to-private", result);
    scenario.check_equal(result, EINVAL, "result of to-private while a page is held")?;
    let event = guest.machine.qmp.event(EVENT, Duration::from_secs(60))?;
    let error = event["data"]["error"].as_str().unwrap_or_default();
    scenario.fact("what QEMU says", error);
    scenario.check(
        error.contains(&format!("{HELD:#x}")),
        format!("the error names the offset {HELD:#x}: {error}"),
    )?;
    scenario.check_equal(
        kept(&mut guest)?,
        before,
        format!("{KEPT:?} after a refusal"),
    )?;
    // What the first huge page held while the kernel had it private is nobody's business: the contents of pages that
    // converted are lost, those of the second and third are not.
    guest.fill(PLACE, HUGE, 2)?;
    guest.agree_but_kernel(scenario, "refused half-way")?;
    for page in [PLACE + 2 * PAGE, HELD, PLACE + 2 * HUGE] {
        engine.reaches(scenario, &mut guest, page)?;
    }
    engine.misses(scenario, &mut guest, PLACE, ELSEWHERE)?;
    ring.unregister()
        .attempt(|| "unregistering an io_uring buffer".into())?;
    let whole = mapped(&guest)?;
    guest.convert(scenario, PLACE, BYTES, true)?;
    guest.fill(PLACE, BYTES, 3)?;
    scenario.check_equal(
        mapped(&guest)?.of_2m - whole.of_2m,
        3,
        "mappings of 2 MiB more, once let go",
    )?;
    scenario.fact("to-private, let go", "done");
    let fault = engine.is_kept_from(scenario, &mut guest, HELD, ELSEWHERE)?;
    scenario.fact("fault at the private page", fault);
    counted(scenario, &mut guest, pool, "three whole")?;
    drop((pages, ring));

    scenario.prefix("no memory for a split: ");
    no_memory(scenario, &mut guest, PLACE)?;
    scenario.prefix("");
    guest.agree_but_kernel(scenario, "at the end")?;
    guest.finish(scenario)?;
    scenario.check_equal(
        pool.free()?,
        pool.total()?,
        "free huge pages after the guest's end",
    )
}

/// Each allocation that the kernel makes to share one page of a whole huge page fails in turn.
fn no_memory(scenario: &mut Scenario, guest: &mut Confidential, place: u64) -> Outcome {
    const MOST: u32 = 64;
    let function = match conversions::function()? {
        Ok(function) => function,
        Err(sentence) => {
            scenario.fact("no memory for a split", format!("not tried: {sentence}"));
            return Ok(());
        }
    };
    let faults = Faults::under(&function)?;
    scenario.fact("splits fail under", function);
    let vcpu = *guest
        .machine
        .vcpus()?
        .first()
        .attempt(|| "no vCPU".into())?;
    let (mut refused, mut absorbed) = (0, 0);
    for position in 1..=MOST {
        let before = kept(guest)?;
        faults.fail_nth(vcpu, position)?;
        let result = guest.monitor.convert(place + 9 * PAGE, PAGE, false)?;
        let failed = faults.failed(vcpu)?;
        if result == 0 {
            guest.ledger.convert(place + 9 * PAGE, PAGE, false);
            guest.agree_but_kernel(scenario, "shared")?;
            guest.convert(scenario, place + 9 * PAGE, PAGE, true)?;
            guest.fill(place + 9 * PAGE, PAGE, 3)?;
            if !failed {
                break;
            }
            absorbed += 1;
            continue;
        }
        scenario.check(
            failed && result == EINVAL,
            format!("a split fails, with EINVAL, only if an allocation did: {result}"),
        )?;
        scenario.check_equal(kept(guest)?, before, format!("{KEPT:?} without memory"))?;
        // Nothing is lost, not even of the page that was asked for.
        guest.agree_but_kernel(scenario, "no memory for a split")?;
        refused += 1;
    }
    scenario.fact("allocations failed in turn", refused + absorbed);
    scenario.fact("requests refused", refused);
    scenario.fact("done without", absorbed);
    scenario.check(refused > 0, "a split was refused for want of memory")
}

/// The one page of 1 GiB that this machine has, at 4 GiB, behind RAM of small pages, so that all of it can be private.
fn one_large(scenario: &mut Scenario) -> Outcome {
    /// As much as q35 has below 4 GiB when there is more.
    const SMALL_BYTES: u64 = 2 * GIB;
    let pool = Pool::of(GIB)?;
    if pool.free()? == 0 {
        scenario.fact("skipped", "this machine has no free page of 1 GiB");
        return Ok(());
    }
    let mut guest = Confidential::start(
        &scenario.directory().join("1G"),
        &[
            "-object",
            &format!("memory-backend-gmem,id=ram0,size={SMALL_BYTES}"),
            "-object",
            &format!("memory-backend-gmem,id=ram1,size={GIB},hugetlb=on,hugetlbsize=1G"),
            "-numa",
            "node,nodeid=0,memdev=ram0",
            "-numa",
            "node,nodeid=1,memdev=ram1",
            "-m",
            "3G",
            "-machine",
            "q35,accel=kvm,smm=off,confidential-guest-support=cgs0",
        ],
        Ledger::with_hole(
            vec![Block::small("ram0", SMALL_BYTES), Block::small("ram1", GIB)],
            SMALL_BYTES,
        ),
    )?;
    guest.convert(scenario, ABOVE, GIB, true)?;
    let before = mapped(&guest)?;
    guest.fill(ABOVE + 512 * MIB, HUGE, 1)?;
    let whole = mapped(&guest)?;
    scenario.fact("mappings of 1 GiB, whole", whole.of_1g - before.of_1g);
    scenario.check_equal(
        whole.of_1g - before.of_1g,
        1,
        "mappings of 1 GiB more, whole",
    )?;
    guest.convert(scenario, ABOVE + 7 * PAGE, PAGE, false)?;
    guest.fill(ABOVE + 7 * PAGE, PAGE, 2)?;
    guest.agree_but_kernel(scenario, "one page of 1 GiB shared")?;
    let split = mapped(&guest)?;
    scenario.fact("mappings of 1 GiB, split", split.of_1g - before.of_1g);
    scenario.check_equal(split.of_1g, before.of_1g, "mappings of 1 GiB, split")?;
    scenario.check_equal(
        number(&mut guest, "huge-pages-split")?,
        1,
        "split huge pages",
    )?;
    guest.convert(scenario, ABOVE + 7 * PAGE, PAGE, true)?;
    guest.fill(ABOVE + 7 * PAGE, PAGE, 3)?;
    guest.agree_but_kernel(scenario, "whole again")?;
    let again = mapped(&guest)?;
    scenario.fact("mappings of 1 GiB, whole again", again.of_1g - before.of_1g);
    scenario.check_equal(
        again.of_1g - before.of_1g,
        1,
        "mappings of 1 GiB more, whole again",
    )?;
    guest.finish(scenario)?;
    scenario.check_equal(
        pool.free()?,
        pool.total()?,
        "free pages of 1 GiB at the end",
    )
}
