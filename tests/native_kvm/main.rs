// SPDX-License-Identifier: MIT OR Apache-2.0
//! The library on the real kernel: guest_memfd files, memory slots, a guest of a few instructions
//! that reads and writes what the host does, conversions where a VM type has private pages.
//!
//! Needs nothing but the kernel at run time, so that a static build can be run anywhere.

mod c_abi;
#[path = "../common/mod.rs"]
mod common;
mod files;
mod guest;
mod held;
mod huge;
mod huge_in_place;
mod images;
mod in_place;
mod iommu;
mod kvm;
mod lost;
mod ordinary;
mod pool;
mod split;
mod stand_in;
mod transparent;

use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The name that libtest gives a test.
fn name_of<T>(_: T) -> &'static str {
    let path = std::any::type_name::<T>();
    path.split_once("::").map_or(path, |(_, name)| name)
}

/// For tests that take much memory or measure what the whole system has: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of memory that can't be reclaimed, in the whole system: guest_memfd pages count here.
fn unevictable() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find(|l| l.starts_with("Unevictable:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

/// Bytes of memory that a memfd holds, read or not. (SEEK_DATA passes over what is merely reserved.)
fn allocated(fd: RawFd) -> u64 {
    let mut stat = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: `stat` is there to be written.
    assert_eq!(unsafe { libc::fstat(fd, stat.as_mut_ptr()) }, 0);
    // SAFETY: zeroed, then filled.
    unsafe { stat.assume_init() }.st_blocks as u64 * 512
}

/// Whether `measured` is `wanted` bytes, but for pages that CPUs hold back in batches and what else
/// may happen in the system.
fn about(measured: u64, wanted: u64) -> bool {
    measured.abs_diff(wanted) < wanted / 8
}
