// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a file's private runs leave behind in the host when the file is closed. The kernel keeps them in a maple
//! tree; one whose root has exactly 16 children was taken apart wrongly by Linux 7.3: an address was freed that had
//! never been allocated. That shows only where `slab_debug=FZPU,maple_node` is on L1's command line, and not always
//! there. The other fault of that file is a panic.
//!
//! The lab's kernel is cured of both, can have them back (`maple_tree.lab_faults`, 1 and 2), and says where they would
//! strike (4): so each test knows that it went where it wanted to. The numbers of runs that the second fault was seen to strike
//! at are tried each time, with a few others; `cargo lab test --full` tries all.

use crate::{convert, in_place, name_of, skip, Converted, INIT_SHARED, PAGE, PRIVATE, SHARED};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

const FAULTS: &str = "/sys/module/maple_tree/parameters/lab_faults";
const CHECKS: &str = "/sys/kernel/slab/maple_node/sanity_checks";
/// A root of 16 children loses one.
const ROOT_OF_16: u32 = 2;
/// It is said where a fault would strike.
const REPORT: u32 = 4;
const WOULD_STRIKE: &str = "of which one would be lost";
const MOST: u64 = 700;
/// Made in order, so many runs give a root 16 children; made at random, some of these do.
const STRUCK: RangeInclusive<u64> = 94..=126;
/// How many other numbers are tried each time.
const OTHERS: usize = 16;

/// The kernel's messages about maple nodes from now on.
struct Watch {
    messages: File,
    /// How often a fault would have struck.
    near: u64,
    /// What the parameter was, if there is one.
    before: Option<String>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(FAULTS, before.trim());
        }
    }
}

impl Watch {
    fn new(test: &'static str) -> Option<Self> {
        if !fs::read_to_string(CHECKS).is_ok_and(|text| text.trim() == "1") {
            return skip(
                test,
                "nothing shows without slab_debug=FZPU,maple_node on the kernel's command line",
            );
        }
        let messages = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg");
        let messages = match messages {
            Ok(messages) => messages,
            Err(error) => return skip(test, format_args!("/dev/kmsg: {error}")),
        };
        // SAFETY: lseek touches no memory; on this device SEEK_END means after the newest message.
        unsafe { libc::lseek(messages.as_raw_fd(), 0, libc::SEEK_END) };
        let mut watch = Self {
            messages,
            near: 0,
            before: fs::read_to_string(FAULTS).ok(),
        };
        watch.have(REPORT);
        Some(watch)
    }

    /// Has these bits set, beside those that were. False if this kernel can't.
    fn have(&mut self, bits: u32) -> bool {
        let Some(before) = &self.before else {
            return false;
        };
        let before: u32 = before.trim().parse().unwrap();
        fs::write(FAULTS, (before | bits).to_string()).unwrap();
        true
    }

    /// The next complaint, if there is one by now.
    fn complaint(&mut self) -> Option<String> {
        let mut record = [0; 8192];
        loop {
            match self.messages.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    self.near += u64::from(text.contains(WOULD_STRIKE));
                    if text.contains("BUG maple_node") {
                        let text = text.split_once(';').map_or(&*text, |(_, text)| text);
                        return Some(text.lines().next().unwrap_or_default().to_string());
                    }
                }
                // Some were overwritten; the next read goes on with the oldest.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) => panic!("/dev/kmsg: {error}"),
            }
        }
    }

    fn check(&mut self, what: &str) {
        if let Some(complaint) = self.complaint() {
            panic!("{complaint}: {what}");
        }
    }

    /// The kernel has freed what it postponed, as far as can be told, and did not complain. How often the second fault
    /// would have struck, where the kernel says so.
    fn end(mut self, what: &str) -> Option<u64> {
        for _ in 0..5 {
            // SAFETY: only numbers are passed; MEMBARRIER_CMD_GLOBAL waits for RCU.
            unsafe { libc::syscall(libc::SYS_membarrier, 1, 0, 0) };
        }
        self.check(what);
        self.before.as_ref().map(|_| self.near)
    }
}

/// A file in which `count` single pages are private, with shared ones between, made so in some order.
fn alternating(
    vm: &crate::sys::Vm,
    count: u64,
    order: impl FnOnce(&mut [u64]),
) -> crate::sys::Gmem {
    let gmem = vm.gmem(2 * count * PAGE, INIT_SHARED).unwrap();
    let mut pages: Vec<u64> = (0..count).map(|run| 2 * run).collect();
    order(&mut pages);
    for page in pages {
        assert_eq!(convert(&gmem, page, 1, PRIVATE), Converted::Yes);
    }
    gmem
}

/// A seed of its own each time, which is told, or `GMEM_SEED`.
fn seed() -> u64 {
    let given = std::env::var("GMEM_SEED").ok();
    let given = given.map(|text| text.parse().expect("GMEM_SEED is a number"));
    let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    given.unwrap_or_else(|| now().as_nanos() as u64) | 1
}

/// xorshift
fn random(state: &mut u64, below: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % below
}

fn shuffle(state: &mut u64, pages: &mut [u64]) {
    for last in (1..pages.len()).rev() {
        pages.swap(last, random(state, last as u64 + 1) as usize);
    }
}

/// The numbers that a fault strikes at, and a few others.
fn some(state: &mut u64) -> Vec<u64> {
    let others = (0..OTHERS).map(|_| 2 + random(state, MOST - 1));
    STRUCK.chain(others).collect()
}

/// A seed that is told if the test fails.
fn told_seed() -> u64 {
    let seed = seed();
    println!("GMEM_SEED={seed}");
    seed
}

/// Files with so many private runs each, made in order or not, are closed. How many of their trees would have been bad, where
/// the kernel says so.
fn close(test: &'static str, counts: &[u64], mut order: impl FnMut(&mut [u64])) -> Option<u64> {
    let (Some(vm), Some(mut watch)) = (in_place(test), Watch::new(test)) else {
        return None;
    };
    for &count in counts {
        drop(alternating(&vm, count, &mut order));
        watch.check(&format!("a file with {count} private runs was closed"));
    }
    let near = watch.end("files with private runs were closed");
    println!(
        "trees that would have been bad: {near:?} of {}",
        counts.len()
    );
    near
}

/// The library's way on a kernel that isn't cured: memory first, then each run by itself.
fn end_one_by_one(test: &'static str, counts: &[u64], mut state: u64) {
    let (Some(vm), Some(mut watch)) = (in_place(test), Watch::new(test)) else {
        return;
    };
    if !watch.have(REPORT | ROOT_OF_16) {
        return skip(test, "this kernel can't have the fault back").unwrap_or(());
    }
    for &count in counts {
        for at_random in [false, true] {
            let gmem = alternating(&vm, count, |pages| {
                if at_random {
                    shuffle(&mut state, pages);
                }
            });
            for run in 0..count {
                gmem.punch(2 * run, 1).unwrap();
                assert_eq!(convert(&gmem, 2 * run, 1, SHARED), Converted::Yes);
            }
        }
        watch.check(&format!("{count} runs were ended"));
    }
    let near = watch.end("runs were ended");
    assert_eq!(near, Some(0), "bad trees");
}

#[test]
fn files_with_about_a_hundred_runs_can_be_closed() {
    let test = name_of(files_with_about_a_hundred_runs_can_be_closed);
    let counts = some(&mut told_seed());
    let near = close(test, &counts, |_| {});
    assert!(near.is_none_or(|near| near > 0), "no tree was a bad one");
}

#[test]
fn files_with_about_a_hundred_runs_in_any_order_can_be_closed() {
    let test = name_of(files_with_about_a_hundred_runs_in_any_order_can_be_closed);
    let mut state = told_seed();
    let counts = some(&mut state);
    close(test, &counts, |pages| shuffle(&mut state, pages));
}

#[test]
fn about_a_hundred_runs_that_end_one_by_one_leave_nothing() {
    let test = name_of(about_a_hundred_runs_that_end_one_by_one_leave_nothing);
    let mut state = told_seed();
    let counts = some(&mut state);
    end_one_by_one(test, &counts, state);
}

#[test]
#[ignore = "takes long: cargo lab test --full runs it"]
fn files_with_any_number_of_runs_can_be_closed() {
    let test = name_of(files_with_any_number_of_runs_can_be_closed);
    let counts: Vec<u64> = (2..=MOST).collect();
    let near = close(test, &counts, |_| {});
    assert!(near.is_none_or(|near| near > 0), "no tree was a bad one");
}

#[test]
#[ignore = "takes long: cargo lab test --full runs it"]
fn files_with_any_number_of_runs_in_any_order_can_be_closed() {
    let test = name_of(files_with_any_number_of_runs_in_any_order_can_be_closed);
    let mut state = told_seed();
    let counts: Vec<u64> = (2..=MOST).collect();
    close(test, &counts, |pages| shuffle(&mut state, pages));
}

#[test]
#[ignore = "takes long: cargo lab test --full runs it"]
fn any_number_of_runs_that_end_one_by_one_leaves_nothing() {
    let test = name_of(any_number_of_runs_that_end_one_by_one_leaves_nothing);
    let counts: Vec<u64> = (2..=MOST).step_by(3).collect();
    end_one_by_one(test, &counts, told_seed());
}
