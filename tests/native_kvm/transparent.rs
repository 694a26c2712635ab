// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shared memory on a host that gives memfds huge pages by itself.

use crate::common::skipped;
use crate::kvm::Machine;
use crate::{about, allocated, name_of};
use gmem::{Attribute, Block, BlockConfig};
use std::fs;
use std::os::fd::AsRawFd;
use std::time::Duration;

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The host's setting, as it is or, where the host is nobody else's (the lab's), turned on for a test.
struct Setting {
    restore: Option<String>,
}

impl Setting {
    fn on(test: &str) -> Option<Self> {
        let text = fs::read_to_string(SETTING).unwrap_or_default();
        let now = text.split(['[', ']']).nth(1).unwrap_or("absent");
        let lab =
            fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("lab.role=l1"));
        let restore = match now {
            "never" if lab => {
                fs::write(SETTING, "advise").unwrap();
                Some(now.to_string())
            }
            "never" | "deny" | "absent" => {
                skipped(test, format_args!("{SETTING} is {now}"));
                return None;
            }
            _ => None,
        };
        Some(Self { restore })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Some(setting) = &self.restore {
            let _ = fs::write(SETTING, setting);
        }
    }
}

/// Bytes of huge pages that memfds and the like have, in the whole system.
fn huge_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find(|l| l.starts_with("ShmemHugePages:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn whole_huge_pages_are_taken_and_all_is_given_back() {
    let test = name_of(whole_huge_pages_are_taken_and_all_is_given_back);
    let Some(machine) = Machine::confidential(test) else {
        return;
    };
    let Some(_setting) = Setting::on(test) else {
        return;
    };
    let config = BlockConfig {
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", 4 * HUGE, Attribute::Private)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    let slot = block.memslot(0).unwrap();
    machine.add_slot(0, 0, 4 * HUGE, &slot).unwrap();
    block.bind(0, 4 * HUGE, 0).unwrap().keep();
    let convert = |gpa, size, attribute| machine.vm.convert(gpa, size, attribute).unwrap();
    let before = huge_bytes();

    // From the middle of the first huge page to the middle of the third.
    convert(HUGE / 2, 2 * HUGE, Attribute::Shared);
    assert!(about(
        allocated(block.file(Attribute::Shared).as_raw_fd()),
        2 * HUGE
    ));
    assert!(about(huge_bytes() - before, HUGE));

    for page in (HUGE / 2..HUGE * 5 / 2).step_by(PAGE as usize) {
        convert(page, PAGE, Attribute::Private);
    }
    assert_eq!(allocated(block.file(Attribute::Shared).as_raw_fd()), 0);
    assert_eq!(huge_bytes(), before);
}
