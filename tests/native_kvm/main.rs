// SPDX-License-Identifier: MIT OR Apache-2.0
//! The library on the real kernel: guest_memfd files, memory slots, a guest of a few instructions
//! that reads and writes what the host does, conversions where a VM type has private pages.
//!
//! Needs nothing but the kernel at run time, so that a static build can be run anywhere.

#[path = "../common/mod.rs"]
mod common;
mod iommu;
mod kvm;
mod ordinary;
mod split;

/// The name that libtest gives a test.
fn name_of<T>(_: T) -> &'static str {
    let path = std::any::type_name::<T>();
    path.split_once("::").map_or(path, |(_, name)| name)
}

/// Bytes of memory that can't be reclaimed, in the whole system: guest_memfd pages count here.
fn unevictable() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find(|l| l.starts_with("Unevictable:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

/// Whether `measured` is `wanted` bytes, but for pages that CPUs hold back in batches and what else
/// may happen in the system.
fn about(measured: u64, wanted: u64) -> bool {
    measured.abs_diff(wanted) < wanted / 8
}
