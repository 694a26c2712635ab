// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a file's private runs leave behind in the host when the file is closed. The kernel keeps them in a maple
//! tree; one whose root has exactly 16 children was taken apart wrongly by Linux 7.3: an address was freed that had
//! never been allocated. That shows only where `slab_debug=FZPU,maple_node` is on L1's command line, and there does no
//! harm.
//!
//! The lab's kernel is cured of it, and can have the fault back (`maple_tree.lab_faults`): each test ends by that, and
//! sees what it would have seen.

use crate::{convert, in_place, name_of, skip, Converted, INIT_SHARED, PAGE, PRIVATE, SHARED};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// 1: metadata is taken for a child. 2: a root of 16 children loses one.
const FAULTS: &str = "/sys/module/maple_tree/parameters/lab_faults";
const CHECKS: &str = "/sys/kernel/slab/maple_node/sanity_checks";
/// As many single private pages, one after the other, give a root 16 children.
const BAD: u64 = 120;
const MOST: u64 = 700;
const PATIENCE: Duration = Duration::from_secs(30);

/// The kernel's messages about maple nodes from now on.
struct Watch {
    test: &'static str,
    messages: File,
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
        stay_on_this_cpu();
        Some(Self { test, messages })
    }

    /// The next complaint, if there is one by now.
    fn complaint(&mut self) -> Option<String> {
        let mut record = [0; 8192];
        loop {
            match self.messages.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
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

    /// Nothing was complained of, which would have been seen: what the kernel frees it frees in turn.
    fn end(mut self, vm: &crate::sys::Vm, what: &str) {
        let before = fs::read_to_string(FAULTS);
        let Ok(before) = before else {
            for _ in 0..3 {
                // SAFETY: only numbers are passed; MEMBARRIER_CMD_GLOBAL waits for RCU.
                unsafe { libc::syscall(libc::SYS_membarrier, 1, 0, 0) };
            }
            self.check(what);
            let line = "this kernel can't have the fault back, so that nothing shows that it would be seen";
            println!("{}: {line}", self.test);
            return;
        };
        fs::write(FAULTS, "2").unwrap();
        let gmem = alternating(vm, BAD, |_| {});
        drop(gmem);
        let begun = Instant::now();
        let seen = loop {
            match self.complaint() {
                Some(complaint) => break Some(complaint),
                None if begun.elapsed() > PATIENCE => break None,
                None => std::thread::yield_now(),
            }
        };
        fs::write(FAULTS, before.trim()).unwrap();
        assert!(seen.is_some(), "the fault was back, and nothing showed");
        self.check(what);
    }
}

/// RCU's callbacks of one processor run in turn.
fn stay_on_this_cpu() {
    // SAFETY: the set is made and read here, and the thread is this one.
    unsafe {
        let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed().assume_init();
        libc::CPU_SET(libc::sched_getcpu() as usize, &mut set);
        assert_eq!(libc::sched_setaffinity(0, size_of_val(&set), &set), 0);
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
fn shuffle(state: &mut u64, pages: &mut [u64]) {
    for last in (1..pages.len()).rev() {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        pages.swap(last, (*state % (last as u64 + 1)) as usize);
    }
}

#[test]
fn any_number_of_runs_can_be_closed() {
    let test = name_of(any_number_of_runs_can_be_closed);
    let (Some(vm), Some(mut watch)) = (in_place(test), Watch::new(test)) else {
        return;
    };
    for count in 2..=MOST {
        drop(alternating(&vm, count, |_| {}));
        watch.check(&format!(
            "a file with up to {count} private runs was closed"
        ));
    }
    watch.end(&vm, "files with private runs were closed");
}

#[test]
fn any_number_of_runs_in_any_order_can_be_closed() {
    let test = name_of(any_number_of_runs_in_any_order_can_be_closed);
    let (Some(vm), Some(mut watch)) = (in_place(test), Watch::new(test)) else {
        return;
    };
    let seed = seed();
    println!("GMEM_SEED={seed}");
    let mut state = seed;
    for count in 2..=MOST {
        drop(alternating(&vm, count, |pages| {
            shuffle(&mut state, pages);
        }));
        watch.check(&format!(
            "a file with up to {count} private runs was closed, GMEM_SEED={seed}"
        ));
    }
    watch.end(
        &vm,
        &format!("files with private runs were closed, GMEM_SEED={seed}"),
    );
}

/// The library's way on a kernel that isn't cured: memory first, then each run by itself.
#[test]
fn runs_that_end_one_by_one_leave_nothing() {
    let test = name_of(runs_that_end_one_by_one_leave_nothing);
    let (Some(vm), Some(mut watch)) = (in_place(test), Watch::new(test)) else {
        return;
    };
    let Ok(before) = fs::read_to_string(FAULTS) else {
        return skip(test, "this kernel can't have the fault back").unwrap_or(());
    };
    let seed = seed();
    println!("GMEM_SEED={seed}");
    let mut state = seed;
    fs::write(FAULTS, "2").unwrap();
    for count in (2..=MOST).step_by(3) {
        for random in [false, true] {
            let gmem = alternating(&vm, count, |pages| {
                if random {
                    shuffle(&mut state, pages);
                }
            });
            for run in 0..count {
                gmem.punch(2 * run, 1).unwrap();
                assert_eq!(convert(&gmem, 2 * run, 1, SHARED), Converted::Yes);
            }
        }
        watch.check(&format!("{count} runs were ended, GMEM_SEED={seed}"));
    }
    fs::write(FAULTS, before.trim()).unwrap();
    watch.end(&vm, &format!("runs were ended, GMEM_SEED={seed}"));
}
