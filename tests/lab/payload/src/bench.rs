// SPDX-License-Identifier: MIT OR Apache-2.0
//! A benchmark's requests, one after the other, each timed with the guest's clock.
//!
//! The answer to each verb that makes requests: how many, how many were refused, nanoseconds in all, 50th and 99th percentile
//! of one.

use crate::edu::Edu;
use crate::memory::{self, convert};
use crate::protocol::{pattern, MAP_GPA_ENCRYPTED, SHARED_FOR_EVER_END};
use crate::sequence::{boot, linear, Flavour, Random, Request, WorkingSet};
use crate::serial::Serial;
use crate::{platform, smp};
use core::arch::x86_64::_rdtsc;
use core::fmt::Write;
use core::ptr::addr_of_mut;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

/// Requests that can be timed in one run.
const MOST_SAMPLES: usize = 1 << 16;
const PAGE: u64 = 4096;

/// Cycles of each request; the second processor has the second half.
static mut SAMPLES: [u32; MOST_SAMPLES] = [0; MOST_SAMPLES];

#[derive(Default)]
struct Tally {
    count: usize,
    refused: u64,
    cycles: u64,
}

/// Runs one verb; None if there is no such one.
pub fn run(verb: &str, arguments: &[u64]) -> Option<Result<(), &'static str>> {
    let result = match (verb, arguments) {
        ("bench-linear", &[address, count, pages, private]) => {
            alone(address, linear(address, count, pages, private != 0))
        }
        ("bench-once", &[address, region_pages, set, spread, private]) => {
            let set = working_set(address, region_pages, set, spread);
            alone(address, set.once(private != 0))
        }
        ("bench-churn", &[address, region_pages, set, spread, count, seed]) => {
            let set = working_set(address, region_pages, set, spread);
            alone(address, set.churn(count, seed))
        }
        ("bench-boot", &[flavour, ram, swiotlb, high, allocations]) => {
            let flavour = match flavour {
                0 => Flavour::Tdx,
                _ => Flavour::Snp,
            };
            alone(
                swiotlb.min(high),
                boot(flavour, ram, swiotlb, high, allocations),
            )
        }
        ("bench-two", &[address, region_pages, set, count, seed]) => {
            two(address, region_pages, set, count, seed)
        }
        ("bench-neighbours", &[address, region_pages, set, spread, count, seed, source]) => {
            neighbours(
                working_set(address, region_pages, set, spread),
                count,
                seed,
                source,
            )
        }
        ("bench-turns", &[address, region_pages, set, spread, count, seed, first]) => {
            let set = working_set(address, region_pages, set, spread);
            used(address, set.turns(count, seed, first != 0))
        }
        ("bench-touch", &[address, bytes]) => touch(address, bytes),
        ("bench-walk", &[address, bytes, count, seed]) => walk(address, bytes, count, seed),
        ("bench-scan", &[address, bytes]) => scan(address, bytes),
        ("bench-compute", &[count]) => compute(count),
        _ => return None,
    };
    Some(result)
}

fn working_set(address: u64, region_pages: u64, set: u64, spread: u64) -> WorkingSet {
    WorkingSet {
        address,
        region_pages,
        set,
        spread,
    }
}

fn alone(lowest: u64, requests: impl Iterator<Item = Request>) -> Result<(), &'static str> {
    check(lowest)?;
    // SAFETY: no second processor runs now.
    let samples = unsafe { &mut *addr_of_mut!(SAMPLES) };
    let tally = measure(requests, samples);
    answer(&tally, &mut samples[..tally.count])
}

/// As `alone`, and each page that was converted is written to at once. The answer goes on: nanoseconds of those writes.
fn used(lowest: u64, requests: impl Iterator<Item = Request>) -> Result<(), &'static str> {
    check(lowest)?;
    // SAFETY: no second processor runs now.
    let samples = unsafe { &mut *addr_of_mut!(SAMPLES) };
    let mut tally = Tally::default();
    let mut used_cycles = 0;
    for request in requests {
        measure_one(&request, samples, &mut tally);
        let before = cycles();
        memory::write(request.address, 0);
        used_cycles += cycles().wrapping_sub(before);
    }
    answer(&tally, &mut samples[..tally.count])?;
    let _ = write!(Serial, " {}", nanoseconds(used_cycles)?);
    Ok(())
}

/// Writes to each page, so that there is memory behind it. The answer: how many pages, nanoseconds.
fn touch(address: u64, bytes: u64) -> Result<(), &'static str> {
    memory::allowed(address, bytes)?;
    timed(bytes / PAGE, || {
        for at in (address..address + bytes).step_by(PAGE as usize) {
            memory::write(at, 0);
        }
    })
}

/// Reads a word of `count` pages at random. The answer: how many, nanoseconds.
fn walk(address: u64, bytes: u64, count: u64, seed: u64) -> Result<(), &'static str> {
    memory::allowed(address, bytes)?;
    let pages = bytes / PAGE;
    if pages == 0 {
        return Err("there is nothing to walk over");
    }
    let mut random = Random(seed | 1);
    timed(count, || {
        for _ in 0..count {
            let number = random.next();
            memory::read(address + number % pages * PAGE + (number >> 52 << 3) % PAGE);
        }
    })
}

/// Reads a word of each cache line in order. The answer: how many, nanoseconds.
fn scan(address: u64, bytes: u64) -> Result<(), &'static str> {
    const LINE: u64 = 64;
    memory::allowed(address, bytes)?;
    timed(bytes / LINE, || {
        for at in (address..address + bytes).step_by(LINE as usize) {
            memory::read(at);
        }
    })
}

/// Numbers without memory. The answer: how many, nanoseconds.
fn compute(count: u64) -> Result<(), &'static str> {
    let mut random = Random(1);
    timed(count, || {
        for _ in 0..count {
            core::hint::black_box(random.next());
        }
    })
}

fn timed(count: u64, work: impl FnOnce()) -> Result<(), &'static str> {
    timed_if(count, || {
        work();
        Ok(true)
    })
}

/// As `timed`, for work that may come to no end.
pub fn timed_if(
    count: u64,
    work: impl FnOnce() -> Result<bool, &'static str>,
) -> Result<(), &'static str> {
    let before = cycles();
    if !work()? {
        return Err("it did not end in time");
    }
    let took = cycles().wrapping_sub(before);
    let _ = write!(Serial, "ok {count} {}", nanoseconds(took)?);
    Ok(())
}

fn check(lowest: u64) -> Result<(), &'static str> {
    match lowest < SHARED_FOR_EVER_END {
        true => Err("that is the payload's own memory"),
        false => Ok(()),
    }
}

fn measure(requests: impl Iterator<Item = Request>, samples: &mut [u32]) -> Tally {
    let mut tally = Tally::default();
    for request in requests {
        measure_one(&request, samples, &mut tally);
    }
    tally
}

fn measure_one(request: &Request, samples: &mut [u32], tally: &mut Tally) {
    let attributes = if request.private {
        MAP_GPA_ENCRYPTED
    } else {
        0
    };
    let before = cycles();
    let result = convert(request.address, request.pages, attributes);
    let took = cycles().wrapping_sub(before);
    tally.refused += u64::from(result != 0);
    tally.cycles += took;
    if let Some(sample) = samples.get_mut(tally.count) {
        *sample = u32::try_from(took).unwrap_or(u32::MAX);
        tally.count += 1;
    }
}

fn cycles() -> u64 {
    // SAFETY: every processor that has long mode has it.
    unsafe { _rdtsc() }
}

/// What a millisecond has in cycles, taken anew each time: it takes a fiftieth of a second.
fn per_millisecond() -> Result<u64, &'static str> {
    platform::cycles_per_millisecond(cycles).ok_or("there is no timer to set the TSC by")
}

fn nanoseconds(cycles: u64) -> Result<u64, &'static str> {
    let rate = per_millisecond()?;
    Ok((u128::from(cycles) * 1_000_000 / u128::from(rate)) as u64)
}

fn answer(tally: &Tally, samples: &mut [u32]) -> Result<(), &'static str> {
    samples.sort_unstable();
    let per_millisecond = per_millisecond()?;
    let nanoseconds =
        |cycles: u64| (u128::from(cycles) * 1_000_000 / u128::from(per_millisecond)) as u64;
    let percentile = |percent: usize| match samples.len() {
        0 => 0,
        length => nanoseconds(u64::from(samples[(length - 1) * percent / 100])),
    };
    let _ = write!(
        Serial,
        "ok {} {} {} {} {}",
        samples.len(),
        tally.refused,
        nanoseconds(tally.cycles),
        percentile(50),
        percentile(99)
    );
    Ok(())
}

/// What the second processor is to do, and what came of it.
static TASK: [AtomicU64; 7] = [const { AtomicU64::new(0) }; 7];
static SECOND: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

fn give(task: &[u64]) {
    for (slot, value) in TASK.iter().zip(task) {
        slot.store(*value, SeqCst);
    }
}

fn task(index: usize) -> u64 {
    TASK[index].load(SeqCst)
}

/// Both processors at once, on working sets that do not touch.
fn two(
    address: u64,
    region_pages: u64,
    set: u64,
    count: u64,
    seed: u64,
) -> Result<(), &'static str> {
    check(address)?;
    give(&[
        address + region_pages * PAGE,
        region_pages,
        set,
        count,
        seed.wrapping_mul(3),
    ]);
    let half = MOST_SAMPLES / 2;
    let first = smp::with_second(second_churn, || {
        // SAFETY: the second processor keeps to the other half.
        let samples = unsafe { &mut (&mut *addr_of_mut!(SAMPLES))[..half] };
        measure(
            working_set(address, region_pages, set, 1).churn(count, seed),
            samples,
        )
    })?;
    // SAFETY: the second processor is asleep.
    let samples = unsafe { &mut *addr_of_mut!(SAMPLES) };
    let second = SECOND[0].load(SeqCst) as usize;
    samples.copy_within(half..half + second, first.count);
    let tally = Tally {
        count: first.count + second,
        refused: first.refused + SECOND[1].load(SeqCst),
        cycles: first.cycles.max(SECOND[2].load(SeqCst)),
    };
    answer(&tally, &mut samples[..tally.count])
}

fn second_churn(_: usize) {
    // SAFETY: the first processor keeps to the other half.
    let samples = unsafe { &mut (&mut *addr_of_mut!(SAMPLES))[MOST_SAMPLES / 2..] };
    let set = working_set(task(0), task(1), task(2), 1);
    let tally = measure(set.churn(task(3), task(4)), samples);
    SECOND[0].store(tally.count as u64, SeqCst);
    SECOND[1].store(tally.refused, SeqCst);
    SECOND[2].store(tally.cycles, SeqCst);
}

static CURRENT: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

/// Churn here, while the second processor has a device write the pages on both sides of the one under conversion.
/// The answer goes on: writes of the device, words that were wrong after one, writes that did not end.
fn neighbours(set: WorkingSet, count: u64, seed: u64, source: u64) -> Result<(), &'static str> {
    check(set.address.min(source))?;
    for index in 0..2 {
        memory::fill(source + index * PAGE, PAGE, index + 1);
    }
    give(&[Edu::find(0)?.registers(), source]);
    CURRENT.store(set.page(0), SeqCst);
    STOP.store(false, SeqCst);
    let tally = smp::with_second(device_writes, || {
        // SAFETY: the second processor takes no samples.
        let samples = unsafe { &mut *addr_of_mut!(SAMPLES) };
        let requests = set
            .churn(count, seed)
            .inspect(|request| CURRENT.store(request.address, SeqCst));
        let tally = measure(requests, samples);
        STOP.store(true, SeqCst);
        tally
    })?;
    // SAFETY: the second processor is asleep.
    let samples = unsafe { &mut *addr_of_mut!(SAMPLES) };
    answer(&tally, &mut samples[..tally.count])?;
    for number in &SECOND {
        let _ = write!(Serial, " {}", number.load(SeqCst));
    }
    Ok(())
}

fn device_writes(_: usize) {
    let edu = Edu::at(task(0));
    let source = task(1);
    let (mut writes, mut wrong, mut unfinished) = (0, 0, 0);
    while !STOP.load(SeqCst) {
        let index = writes & 1;
        let from = source + index * PAGE;
        // Neighbours take turns, and each gets both patterns.
        let target = match writes & 2 {
            0 => CURRENT.load(SeqCst) - PAGE,
            _ => CURRENT.load(SeqCst) + PAGE,
        };
        if !edu.load_at_once(from, PAGE) || !edu.store_at_once(target, PAGE) {
            unfinished += 1;
            break;
        }
        writes += 1;
        let expected = |at: u64| pattern(index + 1, from + (at - target));
        wrong += memory::compare(target, PAGE, expected).map_or(0, |found| found.words);
    }
    SECOND[0].store(writes, SeqCst);
    SECOND[1].store(wrong, SeqCst);
    SECOND[2].store(unfinished, SeqCst);
}
