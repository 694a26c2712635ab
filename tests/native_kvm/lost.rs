// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages that the host is said to have lost, and in the lab, whose machine may be harmed, some that
//! its kernel has given up.

use crate::common::skipped;
use crate::guest::Guest;
use crate::kvm::Machine;
use crate::name_of;
use gmem::{Attribute, Block, BlockConfig};
use Attribute::{Private, Shared};

const PAGE: u64 = 4096;
const SIZE: u64 = 2 << 20;
const DATA: u64 = 0x8000;

#[test]
fn a_reset_brings_fresh_memory_for_lost_pages_alone() {
    let test = name_of(a_reset_brings_fresh_memory_for_lost_pages_alone);
    let Some(machine) = Machine::private(test) else {
        return;
    };
    let config = BlockConfig::confidential("ram", SIZE, Shared);
    let block = Block::new(&machine.vm, &config).unwrap();
    let guest = Guest::on(machine, block);
    let vm = &guest.machine.vm;
    for page in 0..4 {
        guest.stores(DATA + page * PAGE, 0x1000 + page as u16);
    }
    vm.convert(DATA + 2 * PAGE, 2 * PAGE, Private).unwrap();
    for page in 2..4 {
        guest.stores(DATA + page * PAGE, 0x1000 + page as u16);
    }
    // One of each kind.
    vm.poison(DATA + PAGE, 1).unwrap();
    guest.block.poison(DATA + 2 * PAGE + 5, 1).unwrap();
    assert_eq!(guest.block.stats().bytes_poisoned, 2 * PAGE);
    let error = vm.convert(DATA, 4 * PAGE, Shared).unwrap_err();
    assert_eq!(error.errno(), libc::EIO, "{error}");
    assert_eq!(guest.loads(DATA), 0x1000);
    assert_eq!(guest.loads(DATA + 3 * PAGE), 0x1003);

    guest.block.reset().unwrap();
    assert_eq!(guest.block.stats().bytes_poisoned, 0);
    assert_eq!(guest.block.run_at(0).unwrap(), (Shared, SIZE));
    assert_eq!(guest.loads(DATA), 0x1000, "it was never lost");
    assert_eq!(guest.loads(DATA + PAGE), 0);
    assert_eq!(guest.loads(DATA + 2 * PAGE), 0);
    guest.stores(DATA + PAGE, 0x2222);
    assert_eq!(guest.loads(DATA + PAGE), 0x2222);
    vm.convert(DATA, 4 * PAGE, Private).unwrap();
}

#[test]
fn a_guest_that_meets_a_lost_page_can_be_reset() {
    let test = name_of(a_guest_that_meets_a_lost_page_can_be_reset);
    let machine_is_ours = std::fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| line.split_whitespace().any(|word| word == "lab.role=l1"));
    if !machine_is_ours {
        return skipped(
            test,
            "it takes a page from this machine until it is switched off",
        );
    }
    let Some(machine) = Machine::in_place(test) else {
        return;
    };
    let config = BlockConfig::confidential("ram", SIZE, Shared);
    let block = Block::new(&machine.vm, &config).unwrap();
    let guest = Guest::on(machine, block);
    let vm = &guest.machine.vm;
    guest.stores(DATA, 0x1111);
    guest.stores(DATA + PAGE, 0x2222);
    let page = guest.block.host().wrapping_add(DATA as usize);
    // Who had it mapped is told by a signal, which can't be ignored.
    extern "C" fn told(_: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = told;
    // SAFETY: the handler does nothing; a page of the block's mapping, which nobody touches until the
    // block's reset.
    let (given_up, error) = unsafe {
        let before = libc::signal(libc::SIGBUS, handler as libc::sighandler_t);
        let given_up = libc::madvise(page.cast(), PAGE as usize, libc::MADV_HWPOISON);
        let error = std::io::Error::last_os_error();
        libc::signal(libc::SIGBUS, before);
        (given_up, error)
    };
    // EBUSY: it is lost, and could not be freed, since a file has it.
    if given_up != 0 && error.raw_os_error() != Some(libc::EBUSY) {
        return skipped(test, format_args!("MADV_HWPOISON: {error}"));
    }

    let failed = guest.try_to_load(DATA).unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(libc::EHWPOISON));
    let (gpa, size) = guest.vcpu.memory_fault();
    assert_eq!((gpa, size), (DATA, PAGE));
    vm.poison(gpa, size).unwrap();
    assert_eq!(guest.block.stats().bytes_poisoned, PAGE);
    let error = vm.convert(DATA, 2 * PAGE, Private).unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    guest.block.preallocate(1).unwrap();
    assert_eq!(guest.loads(DATA + PAGE), 0x2222);

    guest.block.reset().unwrap();
    assert_eq!(guest.loads(DATA), 0);
    guest.stores(DATA, 0x3333);
    assert_eq!(guest.loads(DATA), 0x3333);
    assert_eq!(guest.loads(DATA + PAGE), 0x2222);
    vm.convert(DATA, 2 * PAGE, Private).unwrap();
    assert_eq!(guest.loads(DATA), 0x3333);
}
