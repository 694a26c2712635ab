// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages that go private and back over and over: while devices come and go, and while a device writes beside them.

use crate::commands::{ok, Answer, Results};
use crate::edu::Edu;
use crate::memory::{self, allowed};
use crate::protocol::{pattern, MAP_GPA_ENCRYPTED};
use crate::smp;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

const PAGE: u64 = 4096;

/// `count` times to private and back, at `places` places in turn, `stride` bytes apart.
pub fn flip(count: u64, address: u64, pages: u64, stride: u64, places: u64) -> Answer {
    let mut results = Results::default();
    for index in 0..count {
        let at = address.wrapping_add((index % places.max(1)).wrapping_mul(stride));
        results.count(memory::convert(at, pages, MAP_GPA_ENCRYPTED))?;
        results.count(memory::convert(at, pages, 0))?;
    }
    ok(format_args!("{count}"))?;
    results.print();
    Ok(())
}

/// How many places ahead of the conversions the device's next target lies: about half of what is converted in 100 ms.
const AHEAD: u64 = 40;

/// The device writes what it read at `origin` to odd pages from `first` on; until it has, one even page after the other
/// goes private and back, `places` in all, then from the beginning. Prints how many of `trials` writes did not arrive as
/// they should, the words that were wrong then, and the results of the conversions.
pub fn beside_dma(
    trials: u64,
    first: u64,
    places: u64,
    origin: u64,
    seed: u64,
    index: u64,
) -> Answer {
    let places = places.max(1);
    allowed(origin, PAGE)?;
    allowed(first, places * 2 * PAGE)?;
    let even = |place: u64| first + place % places * 2 * PAGE;
    let edu = Edu::find(index)?;
    memory::fill(origin, PAGE, seed);
    edu.load(origin, PAGE)?;
    let mut results = Results::default();
    let (mut lost, mut wrong_words, mut place) = (0, 0, 0);
    for _ in 0..trials {
        let target = even(place + AHEAD) + PAGE;
        memory::zero(target, PAGE);
        edu.start_store(target, PAGE)?;
        while edu.busy() {
            results.count(memory::convert(even(place), 1, MAP_GPA_ENCRYPTED))?;
            results.count(memory::convert(even(place), 1, 0))?;
            place += 1;
        }
        let expected = |at| pattern(seed, origin + (at - target));
        if let Some(difference) = memory::compare(target, PAGE, expected) {
            lost += 1;
            wrong_words += difference.words;
        }
    }
    ok(format_args!("{trials} {lost} {wrong_words}"))?;
    results.print();
    Ok(())
}

static PAGE_IN_TURN: AtomicU64 = AtomicU64::new(0);
static TURNS: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicBool = AtomicBool::new(false);

/// The second processor turns a page private and back `count` times while this one reads it all the time. Prints how often it
/// did, and how many of the conversions were refused.
pub fn beside_reads(count: u64, address: u64) -> Answer {
    allowed(address, PAGE)?;
    PAGE_IN_TURN.store(address, SeqCst);
    TURNS.store(count, SeqCst);
    REFUSED.store(0, SeqCst);
    DONE.store(false, SeqCst);
    let reads = smp::with_second(turns, || {
        let mut reads: u64 = 0;
        while !DONE.load(SeqCst) {
            memory::read(address);
            reads += 1;
        }
        reads
    })?;
    ok(format_args!("{reads} {}", REFUSED.load(SeqCst)))
}

fn turns(_: usize) {
    let address = PAGE_IN_TURN.load(SeqCst);
    for _ in 0..TURNS.load(SeqCst) {
        for attributes in [MAP_GPA_ENCRYPTED, 0] {
            if memory::convert(address, 1, attributes) != 0 {
                REFUSED.fetch_add(1, SeqCst);
            }
        }
    }
    DONE.store(true, SeqCst);
}

/// What each processor is to do.
static EACH: [AtomicU64; 5] = [const { AtomicU64::new(0) }; 5];
static WRONG: AtomicU64 = AtomicU64::new(0);
static SEEN: AtomicU64 = AtomicU64::new(0);

/// Each of so many processors turns a range of its own, `stride` bytes behind that of the one before, to private (or shared) and
/// back `count` times, and writes and reads it after each conversion. Prints how many conversions were refused, how many ranges
/// did not hold what had been written, and which processors were at it, a bit for each.
pub fn each(
    processors: usize,
    count: u64,
    address: u64,
    pages: u64,
    stride: u64,
    first: bool,
) -> Answer {
    for number in 0..processors as u64 {
        allowed(address + number * stride, pages * PAGE)?;
    }
    let task = [count, address, pages, stride, u64::from(first)];
    for (slot, value) in EACH.iter().zip(task) {
        slot.store(value, SeqCst);
    }
    for tally in [&REFUSED, &WRONG, &SEEN] {
        tally.store(0, SeqCst);
    }
    smp::with_others(processors - 1, turn_own, || turn_own(0))?;
    ok(format_args!(
        "{} {} {:#x}",
        REFUSED.load(SeqCst),
        WRONG.load(SeqCst),
        SEEN.load(SeqCst)
    ))
}

fn turn_own(number: usize) {
    let [count, address, pages, stride, first] = EACH.each_ref().map(|slot| slot.load(SeqCst));
    let own = address + number as u64 * stride;
    SEEN.fetch_or(1 << number, SeqCst);
    for turn in 0..2 * count {
        let private = (turn % 2 == 0) == (first != 0);
        let attributes = if private { MAP_GPA_ENCRYPTED } else { 0 };
        if memory::convert(own, pages, attributes) != 0 {
            REFUSED.fetch_add(1, SeqCst);
        }
        memory::fill(own, pages * PAGE, turn);
        let expected = |at| pattern(turn, at);
        if memory::compare(own, pages * PAGE, expected).is_some() {
            WRONG.fetch_add(1, SeqCst);
        }
    }
}

/// So many processors write the pattern of `seed` to a range, each the words whose turn it is: all of them are at each page at
/// the same time.
pub fn fill_each(processors: usize, address: u64, bytes: u64, seed: u64) -> Answer {
    allowed(address, bytes)?;
    let task = [processors as u64, address, bytes, seed, 0];
    for (slot, value) in EACH.iter().zip(task) {
        slot.store(value, SeqCst);
    }
    smp::with_others(processors - 1, fill_own, || fill_own(0))?;
    ok(format_args!("filled"))
}

fn fill_own(number: usize) {
    let [processors, address, bytes, seed, _] = EACH.each_ref().map(|slot| slot.load(SeqCst));
    let first = address + 8 * number as u64;
    for at in (first..address + bytes).step_by(8 * processors as usize) {
        memory::write(at, pattern(seed, at));
    }
}
