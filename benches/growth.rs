// SPDX-License-Identifier: MIT OR Apache-2.0
//! How time and memory grow with the number of private runs in a block of 1 TiB.
//!
//! Prints a line for what one request over alternating pages needs,
//! a line of JSON for a guest that makes every other page private and then each page in turn shared and private
//! again, so that no area of the IOMMU is larger than a page, and one for each number of runs; `cargo lab bench growth` draws them and holds them
//! against the goals.

mod common;
mod counting;

use common::{Random, Rig};
use counting::{in_use, Heap};
use gmem::{Attribute, PAGE_SIZE};
use std::hint::black_box;
use std::time::Duration;

const TIB: u64 = 1 << 40;
const LAST: u32 = 18;
const ROUNDS: usize = 201;
const CALLS: u64 = 1000;

/// How long this thread has run: time in which the machine did other things is nobody's cost.
fn on_processor() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the clock exists and the structure is ours.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The median over rounds of what one of many calls takes, in nanoseconds.
fn median_ns(mut call: impl FnMut()) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = on_processor();
            for _ in 0..CALLS {
                call();
            }
            (on_processor() - start).as_nanos() as f64 / CALLS as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

/// What the books cost at most under a guest that wants them large.
fn alternate(block_bytes: u64) {
    let before = in_use();
    let rig = Rig::new(block_bytes);
    let mut most = 0;
    for first in [0, 1] {
        for page in (first..block_bytes / PAGE_SIZE).step_by(2) {
            rig.convert(page * PAGE_SIZE, PAGE_SIZE, Attribute::Private);
            if first == 1 {
                rig.convert((page - 1) * PAGE_SIZE, PAGE_SIZE, Attribute::Shared);
            }
        }
        most = most.max(in_use() - before);
    }
    println!("{{\"block_bytes\": {block_bytes}, \"alternating_bytes\": {most}}}");
}

/// What one request needs that changes every other page.
fn request(block_bytes: u64) {
    let rig = Rig::without_devices(block_bytes, Duration::ZERO);
    rig.fragment(block_bytes / PAGE_SIZE / 2, 2 * PAGE_SIZE);
    let heap = Heap::now();
    rig.convert(0, block_bytes, Attribute::Private);
    println!(
        "{{\"request_bytes\": {block_bytes}, \"heap_bytes\": {}}}",
        heap.most_grown()
    );
}

fn main() {
    // cargo passes --bench, and `cargo test --benches` runs this program too: then one size will do.
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let sizes: Vec<u64> = if measuring {
        (0..=LAST)
            .step_by(2)
            .map(|power| 1u64 << power)
            .chain([1_000_000])
            .collect()
    } else {
        vec![16]
    };
    alternate(if measuring { 4 << 30 } else { 64 << 20 });
    request(if measuring { 64 << 30 } else { 64 << 20 });
    for runs in sizes {
        let rig = Rig::new(TIB);
        let before = in_use();
        let stride = TIB / runs / PAGE_SIZE * PAGE_SIZE;
        rig.fragment(runs, stride);
        let bytes = in_use() - before;
        let mut random = Random(runs);
        let look_up = median_ns(|| {
            black_box(rig.block.run_at(random.below(TIB))).expect("in the block");
        });
        let convert = median_ns(|| {
            // Between two private pages, so that the number of runs stays.
            let page = random.below(runs) * stride + stride / 2 / PAGE_SIZE * PAGE_SIZE;
            rig.convert(page, PAGE_SIZE, Attribute::Private);
            rig.convert(page, PAGE_SIZE, Attribute::Shared);
        });
        println!(
            "{{\"runs\": {runs}, \"look_up_ns\": {look_up:.1}, \"convert_4k_ns\": {:.1}, \
             \"bytes\": {bytes}}}",
            convert / 2.0
        );
    }
}
