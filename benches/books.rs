// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the library itself costs: conversions and look-ups on a kernel that costs nothing.
//!
//! Goals: the books of a 4 KiB request in 300 ns, and no more than 1.2 times that where two threads convert
//! disjoint pages; a 4 KiB conversion with a device in 1 µs; a look-up among a million runs of a 1 TiB block in 500 ns.

mod common;

use common::{Random, Rig};
use divan::counter::ItemsCount;
use divan::Bencher;
use gmem::{Attribute, PAGE_SIZE};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const MILLION: u64 = 1_000_000;
/// A million runs, spread over a tebibyte.
const STRIDE: u64 = TIB / MILLION / PAGE_SIZE * PAGE_SIZE;

fn main() {
    divan::main();
}

/// A random page to private and back: from the request to its answer, twice.
#[divan::bench(args = [0, 1_000, 1_000_000], sample_count = 200, sample_size = 1000)]
fn convert_4k_there_and_back(bencher: Bencher, runs: u64) {
    let size = if runs == MILLION { TIB } else { 8 * GIB };
    let rig = Rig::new(size);
    let stride = size.checked_div(runs).unwrap_or(size) / PAGE_SIZE * PAGE_SIZE;
    rig.fragment(runs, stride);
    let mut random = Random(1);
    let places = runs.max(1 << 20);
    bencher.counter(ItemsCount::new(2u32)).bench_local(|| {
        // Half a stride from the pages of the fragmentation, so that the number of runs stays.
        let page = match runs {
            0 => random.below(places) * PAGE_SIZE,
            _ => random.below(places) % runs * stride + stride / 2 / PAGE_SIZE * PAGE_SIZE,
        };
        rig.convert(page, PAGE_SIZE, Attribute::Private);
        rig.convert(page, PAGE_SIZE, Attribute::Shared);
    });
}

/// The same page to private and back, among others that stay what they are.
fn there_and_back(bencher: Bencher, rig: &Rig) {
    // Else the books' first word comes and goes each time.
    rig.convert(GIB + 8 * PAGE_SIZE, PAGE_SIZE, Attribute::Private);
    bencher.counter(ItemsCount::new(2u32)).bench_local(|| {
        rig.convert(GIB + 17 * PAGE_SIZE, PAGE_SIZE, Attribute::Private);
        rig.convert(GIB + 17 * PAGE_SIZE, PAGE_SIZE, Attribute::Shared);
    });
}

/// The books of a request, and nothing else: no device has the block, and memory is released at once.
#[divan::bench(sample_count = 200, sample_size = 1000)]
fn request_of_4k(bencher: Bencher) {
    there_and_back(bencher, &Rig::without_devices(8 * GIB, Duration::ZERO));
}

/// The same with what pages leave kept for a while.
#[divan::bench(sample_count = 200, sample_size = 1000)]
fn request_of_4k_that_keeps_memory(bencher: Bencher) {
    let rig = Rig::without_devices(8 * GIB, Duration::from_millis(100));
    there_and_back(bencher, &rig);
}

/// By how many windows show the block.
#[divan::bench(args = [1, 4, 16], sample_count = 100, sample_size = 100)]
fn request_of_4k_by_windows(bencher: Bencher, windows: u32) {
    let mut rig = Rig::without_devices(8 * GIB, Duration::ZERO);
    (0..windows).for_each(|_| rig.show());
    there_and_back(bencher, &rig);
}

/// By how many blocks the VM has.
#[divan::bench(args = [1, 16, 256], sample_count = 100, sample_size = 1000)]
fn request_of_4k_by_blocks(bencher: Bencher, blocks: u32) {
    let mut rig = Rig::without_devices(8 * GIB, Duration::ZERO);
    (1..blocks).for_each(|_| rig.add_block());
    there_and_back(bencher, &rig);
}

/// By how many areas a window has: a guest that has converted so many pages of a block has as many, and as
/// many between.
#[divan::bench(args = [1_000, 100_000], sample_count = 100, sample_size = 1000)]
fn request_of_4k_by_areas(bencher: Bencher, areas: u64) {
    let rig = Rig::keeping(8 * GIB, Duration::ZERO);
    let stride = 8 * GIB / areas / PAGE_SIZE * PAGE_SIZE;
    for attribute in [Attribute::Private, Attribute::Shared] {
        (0..areas).for_each(|area| rig.convert(area * stride, PAGE_SIZE, attribute));
    }
    there_and_back(bencher, &rig);
}

/// One request for all of 256 MiB, every other page of which changes: for each of these.
#[divan::bench(args = [Attribute::Private, Attribute::Shared], sample_count = 20, sample_size = 1)]
fn run_of_a_large_request(bencher: Bencher, attribute: Attribute) {
    const BYTES: u64 = 256 << 20;
    const RUNS: u64 = BYTES / PAGE_SIZE / 2;
    let rig = Rig::keeping(BYTES, Duration::ZERO);
    let other = match attribute {
        Attribute::Private => Attribute::Shared,
        Attribute::Shared => Attribute::Private,
    };
    let alternate = || {
        rig.convert(0, BYTES, other);
        (0..RUNS).for_each(|run| rig.convert(2 * run * PAGE_SIZE, PAGE_SIZE, attribute));
    };
    bencher
        .counter(ItemsCount::new(RUNS))
        .with_inputs(alternate)
        .bench_local_values(|()| rig.convert(0, BYTES, attribute));
}

/// A request that changes nothing, as guests send them.
#[divan::bench]
fn convert_2m_that_is_so_already(bencher: Bencher) {
    let rig = Rig::new(GIB);
    bencher.bench_local(|| rig.convert(512 << 20, 2 << 20, Attribute::Shared));
}

/// The attribute of a random page and the end of its run.
#[divan::bench(sample_count = 200, sample_size = 1000)]
fn look_up_among_a_million_runs(bencher: Bencher) {
    let rig = Rig::new(TIB);
    rig.fragment(MILLION, STRIDE);
    let mut random = Random(1);
    bencher.bench_local(|| rig.block.run_at(random.below(TIB)).expect("in the block"));
}

/// What every access of the VMM asks.
#[divan::bench(sample_count = 200, sample_size = 1000)]
fn check_access_among_a_million_runs(bencher: Bencher) {
    let rig = Rig::new(TIB);
    rig.fragment(MILLION, STRIDE);
    let mut random = Random(1);
    bencher.bench_local(|| {
        let offset = random.below(MILLION) * STRIDE + STRIDE / 2;
        rig.block.check_access(offset, 64).expect("shared")
    });
}

/// Two vCPUs convert pages of disjoint halves, and nothing but the books is in their way.
#[divan::bench(threads = [1, 2], sample_count = 100, sample_size = 1000)]
fn convert_4k_by_threads(bencher: Bencher) {
    static THREADS: AtomicU64 = AtomicU64::new(0);
    thread_local!(static HALF: u64 = THREADS.fetch_add(1, Ordering::Relaxed) % 2);
    let rig = Rig::without_devices(8 * GIB, Duration::ZERO);
    for half in [0, 4 * GIB] {
        rig.convert(half + 8 * PAGE_SIZE, PAGE_SIZE, Attribute::Private);
    }
    bencher.counter(ItemsCount::new(2u32)).bench(|| {
        let page = HALF.with(|half| half * 4 * GIB);
        rig.convert(page, PAGE_SIZE, Attribute::Private);
        rig.convert(page, PAGE_SIZE, Attribute::Shared);
    });
}
