// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a file's private runs leave behind in the host when the file is closed. The kernel keeps them in a maple
//! tree; one whose root has exactly 16 children was taken apart wrongly by Linux 7.3: an address was freed that had
//! never been allocated. That shows only where `slab_debug=FZPU,maple_node` is on L1's command line, and not always
//! there. The other fault of that file is a panic.
//!
//! The lab's kernel is cured of both, can have them back (`maple_tree.lab_faults`, 1 and 2), and says where they would
//! strike (4): so each test knows that it went where it wanted to.

use crate::{convert, in_place, name_of, skip, Converted, INIT_SHARED, PAGE, PRIVATE, SHARED};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
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
    let near = watch.end("files with private runs were closed");
    // 112 to 126 runs give a root 16 children, and some larger numbers.
    assert!(near.is_none_or(|near| near > 0), "no tree was a bad one");
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
    let near = watch.end(&format!(
        "files with private runs were closed, GMEM_SEED={seed}"
    ));
    println!("trees that would have been bad: {near:?}");
}

/// The library's way on a kernel that isn't cured: memory first, then each run by itself.
#[test]
fn runs_that_end_one_by_one_leave_nothing() {
    let test = name_of(runs_that_end_one_by_one_leave_nothing);
    let (Some(vm), Some(mut watch)) = (in_place(test), Watch::new(test)) else {
        return;
    };
    if !watch.have(REPORT | ROOT_OF_16) {
        return skip(test, "this kernel can't have the fault back").unwrap_or(());
    }
    let seed = seed();
    println!("GMEM_SEED={seed}");
    let mut state = seed;
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
    let near = watch.end(&format!("runs were ended, GMEM_SEED={seed}"));
    assert_eq!(near, Some(0), "bad trees");
}
