// SPDX-License-Identifier: MIT OR Apache-2.0
//! Blocks of confidential VMs: a memfd for shared pages, a guest_memfd for private ones.

use crate::guest::{Guest, LOAD};
use crate::kvm::{Exit, Machine, Regs};
use crate::{about, allocated, alone, name_of, unevictable};
use gmem::{Attribute, Backing, Block, BlockConfig};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// The page that changes its attribute.
const DATA: u64 = 0x8000;

/// A split guest with `size` bytes, whose memory goes as soon as a page leaves it.
fn guest(test: &str, size: u64) -> Option<Guest> {
    guest_that_keeps(test, size, Duration::ZERO)
}

/// One for which it is kept for a while.
fn guest_that_keeps(test: &str, size: u64, release_delay: Duration) -> Option<Guest> {
    let machine = Machine::confidential(test)?;
    let config = BlockConfig {
        release_delay,
        keeps_private: true,
        ..BlockConfig::confidential("ram", size, Attribute::Shared)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    assert_eq!(block.backing(), Backing::Split);
    Some(Guest::on(machine, block))
}

/// Bytes that the shared plane holds.
fn shared_plane(guest: &Guest) -> u64 {
    allocated(guest.block.file(Attribute::Shared).as_raw_fd())
}

#[test]
fn a_guest_converts_by_hypercall() {
    let test = name_of(a_guest_converts_by_hypercall);
    let Some(guest) = guest(test, 2 * MIB) else {
        return;
    };
    let block = &guest.block;
    guest.stores(DATA, 0x1111);
    assert_eq!(guest.host_reads(DATA), 0x1111);
    assert_eq!(shared_plane(&guest), 2 * PAGE, "code and data");

    assert_eq!(guest.asks(DATA, PAGE, Attribute::Private), 0);
    assert_eq!(
        block.run_at(DATA).unwrap(),
        (Attribute::Private, DATA + PAGE)
    );
    assert_eq!(shared_plane(&guest), PAGE, "double memory");
    guest.stores(DATA, 0x2222);
    assert_eq!(guest.loads(DATA), 0x2222);
    assert_eq!(shared_plane(&guest), PAGE, "a private store was shared");
    assert_eq!(
        block.check_access(DATA, 1).unwrap_err().errno(),
        libc::EACCES
    );
    assert_eq!(guest.host_reads(DATA), 0, "the host sees a private byte");

    // The host's read has put a page where none should be; a conversion to private sweeps it.
    assert_eq!(guest.asks(DATA, PAGE, Attribute::Shared), 0);
    assert_eq!(guest.loads(DATA), 0, "the shared page is a new one");
    guest.host_writes(DATA, &[0x33, 0x33]);
    assert_eq!(guest.loads(DATA), 0x3333);
    assert_eq!(guest.asks(DATA, PAGE, Attribute::Private), 0);
    assert_eq!(guest.loads(DATA), 0, "private memory outlived its time");
    assert_eq!(shared_plane(&guest), PAGE, "double memory");

    let stats = block.stats();
    assert_eq!((stats.to_private, stats.to_shared), (2, 1));
    assert_eq!((stats.bytes_private, stats.runs), (PAGE, 1));
    assert_eq!((stats.failures, stats.access_refused), (0, 1));
    assert_eq!(stats.release_failures, 0);
}

#[test]
fn a_page_that_comes_back_finds_what_it_left_and_the_host_nothing_private() {
    let test = name_of(a_page_that_comes_back_finds_what_it_left_and_the_host_nothing_private);
    let Some(guest) = guest_that_keeps(test, 2 * MIB, Duration::from_secs(3600)) else {
        return;
    };
    let block = &guest.block;
    guest.stores(DATA, 0x1111);
    assert_eq!(guest.asks(DATA, PAGE, Attribute::Private), 0);
    assert_eq!(guest.loads(DATA), 0, "shared bytes are no private ones");
    guest.stores(DATA, 0x2222);
    assert_eq!(
        guest.host_reads(DATA),
        0x1111,
        "what the host has seen before"
    );
    for _ in 0..3 {
        assert_eq!(guest.asks(DATA, PAGE, Attribute::Shared), 0);
        assert_eq!(guest.loads(DATA), 0x1111);
        assert_eq!(guest.host_reads(DATA), 0x1111);
        assert_eq!(guest.asks(DATA, PAGE, Attribute::Private), 0);
        assert_eq!(guest.loads(DATA), 0x2222);
    }
    assert_eq!(shared_plane(&guest), 2 * PAGE);
    assert_eq!(block.stats().double_bytes, PAGE);
    block.release_pending();
    assert_eq!(shared_plane(&guest), PAGE);
    assert_eq!(guest.loads(DATA), 0x2222);
    assert_eq!(guest.asks(DATA, PAGE, Attribute::Shared), 0);
    assert_eq!(guest.loads(DATA), 0, "the shared page is a new one");
    // After a reset nobody finds anything of before.
    guest.block.reset().unwrap();
    assert_eq!(guest.asks(DATA, PAGE, Attribute::Private), 0);
    assert_eq!(guest.loads(DATA), 0, "private memory outlived a reset");
}

#[test]
fn memory_that_nobody_comes_back_for_is_released_by_itself() {
    let test = name_of(memory_that_nobody_comes_back_for_is_released_by_itself);
    let Some(guest) = guest_that_keeps(test, 2 * MIB, Duration::from_millis(1)) else {
        return;
    };
    guest.stores(DATA, 0x1111);
    assert_eq!(guest.asks(DATA, PAGE, Attribute::Private), 0);
    let start = Instant::now();
    while shared_plane(&guest) != PAGE {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it is there still"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(guest.block.stats().double_bytes, 0);
}

#[test]
fn senseless_requests_come_back_to_the_guest() {
    let test = name_of(senseless_requests_come_back_to_the_guest);
    let Some(guest) = guest(test, 2 * MIB) else {
        return;
    };
    let refused = libc::EINVAL as u64;
    assert_eq!(guest.asks(2 * MIB, PAGE, Attribute::Private), refused);
    assert_eq!(
        guest.asks(2 * MIB - PAGE, 2 * PAGE, Attribute::Private),
        refused
    );
    assert_eq!(guest.block.stats().bytes_private, 0, "half of it was done");
    assert_eq!(guest.asks(2 * MIB - PAGE, 2 * PAGE, Attribute::Shared), 0);
    assert_eq!(guest.machine.vm.stats().ignored_bytes, PAGE);
    guest.stores(DATA, 0x4444);
    assert_eq!(guest.host_reads(DATA), 0x4444, "the guest goes on");
}

#[test]
fn a_page_has_memory_in_one_plane_only() {
    let test = name_of(a_page_has_memory_in_one_plane_only);
    let _turn = alone();
    let size = 66 * MIB;
    let Some(guest) = guest(test, size) else {
        return;
    };
    let (vm, block) = (&guest.machine.vm, &guest.block);
    let at_start = unevictable();
    block.preallocate(2).unwrap();
    assert_eq!(shared_plane(&guest), size);

    vm.convert(2 * MIB, 64 * MIB, Attribute::Private).unwrap();
    assert_eq!(shared_plane(&guest), 2 * MIB);
    block.preallocate(2).unwrap();
    assert_eq!(shared_plane(&guest), 2 * MIB);
    let private = unevictable().saturating_sub(at_start);
    assert!(
        about(private, 64 * MIB),
        "the private plane has {private:#x}"
    );

    // A hole in the middle, and one that is there already.
    vm.convert(32 * MIB, 2 * MIB, Attribute::Shared).unwrap();
    vm.convert(32 * MIB, MIB, Attribute::Shared).unwrap();
    assert_eq!(
        shared_plane(&guest),
        4 * MIB,
        "shared memory was to be reserved"
    );
    assert_eq!(block.stats().runs, 2);
    vm.convert(0x1_0000, size - 0x1_0000, Attribute::Shared)
        .unwrap();
    assert_eq!(shared_plane(&guest), size);
    let private = unevictable().saturating_sub(at_start);
    assert!(private < 4 * MIB, "the private plane keeps {private:#x}");
}

#[test]
fn a_reset_gives_every_page_its_first_attribute() {
    let test = name_of(a_reset_gives_every_page_its_first_attribute);
    let Some(guest) = guest(test, 2 * MIB) else {
        return;
    };
    assert_eq!(guest.asks(DATA, 4 * PAGE, Attribute::Private), 0);
    guest.stores(DATA, 0x5555);
    guest.block.reset().unwrap();
    assert_eq!(guest.block.stats().bytes_private, 0);
    assert_eq!(guest.loads(DATA), 0);
    guest.host_writes(DATA, &[0x66, 0x66]);
    assert_eq!(guest.loads(DATA), 0x6666);
}

#[test]
fn a_rebuilt_vm_knows_nothing_of_the_old_one() {
    let test = name_of(a_rebuilt_vm_knows_nothing_of_the_old_one);
    let Some(mut guest) = guest(test, 2 * MIB) else {
        return;
    };
    assert_eq!(guest.asks(DATA, 4 * PAGE, Attribute::Private), 0);
    guest.stores(DATA, 0x5555);
    guest.stores(DATA + 8 * PAGE, 0x6666);
    guest.machine.remove_slot(0);
    let Guest {
        mut machine,
        block,
        vcpu,
    } = guest;
    drop(vcpu);
    machine.rebuild(|_| {
        assert_eq!(allocated(block.file(Attribute::Shared).as_raw_fd()), 0);
    });
    assert_eq!(block.stats().bytes_private, 0);
    assert_eq!(block.run_at(0).unwrap(), (Attribute::Shared, 2 * MIB));
    guest = Guest::on(machine, block);
    assert_eq!(guest.loads(DATA), 0);
    assert_eq!(guest.loads(DATA + 8 * PAGE), 0);
    assert_eq!(guest.asks(DATA, PAGE, Attribute::Private), 0);
    guest.stores(DATA, 0x7777);
    assert_eq!(guest.host_reads(DATA), 0);
    assert_eq!(guest.loads(DATA), 0x7777);
}

/// Bindings come and go while a guest runs; what a page was, it still is afterwards.
#[test]
fn attributes_follow_a_block_to_another_address() {
    let test = name_of(attributes_follow_a_block_to_another_address);
    let Some(guest) = guest(test, 2 * MIB) else {
        return;
    };
    let (machine, block) = (&guest.machine, &guest.block);
    assert_eq!(guest.asks(DATA, PAGE, Attribute::Private), 0);
    guest.stores(DATA, 0x7777);
    block.unbind(0, 2 * MIB, 0).unwrap();
    machine.remove_slot(0);

    // Shifted by a page: the private page is now DATA + PAGE.
    let slot = block.memslot(0).unwrap();
    machine.add_slot(0, PAGE, 2 * MIB - PAGE, &slot).unwrap();
    block.bind(0, 2 * MIB - PAGE, PAGE).unwrap().keep();
    let load = |gpa| {
        let exit = guest.vcpu.start(Regs {
            rip: LOAD.0 + PAGE,
            rbx: gpa,
            ..Default::default()
        });
        assert_eq!(exit, Exit::Halt);
        guest.vcpu.regs().rax as u16
    };
    assert_eq!(load(DATA + PAGE), 0x7777);
    guest.host_writes(DATA - PAGE, &[0x88, 0x88]);
    assert_eq!(load(DATA), 0x8888, "the old address is private still");
}

#[test]
fn memory_may_start_private() {
    let test = name_of(memory_may_start_private);
    let Some(guest) = guest(test, 2 * MIB) else {
        return;
    };
    let (machine, vm) = (&guest.machine, &guest.machine.vm);
    let config = BlockConfig {
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("more", MIB, Attribute::Private)
    };
    let block = Block::new(vm, &config).unwrap();
    let slot = block.memslot(0).unwrap();
    machine.remove_slot(0);
    guest.block.unbind(0, 2 * MIB, 0).unwrap();
    // The code stays where it is; the new block takes its place from DATA on.
    let code = guest.block.memslot(0).unwrap();
    machine.add_slot(0, 0, DATA, &code).unwrap();
    guest.block.bind(0, DATA, 0).unwrap().keep();
    machine.add_slot(1, DATA, MIB, &slot).unwrap();
    block.bind(0, MIB, DATA).unwrap().keep();
    guest.stores(DATA, 0x9999);
    assert_eq!(guest.loads(DATA), 0x9999);
    // SAFETY: the first byte of the mapping.
    assert_eq!(
        unsafe { block.host().read() },
        0,
        "private bytes are in the memfd"
    );
    // A range across two blocks is one request.
    vm.convert(0x6000, 0x4000, Attribute::Private).unwrap();
    vm.convert(0x6000, 0x4000, Attribute::Shared).unwrap();
    assert_eq!(block.stats().bytes_private, MIB - 2 * PAGE);
    assert_eq!(guest.block.stats().bytes_private, 0);
    assert_eq!(guest.loads(DATA), 0);
}

#[test]
fn what_is_discarded_is_the_hosts_and_keeps_its_attribute() {
    let test = name_of(what_is_discarded_is_the_hosts_and_keeps_its_attribute);
    let _turn = alone();
    let Some(guest) = guest(test, 64 * MIB) else {
        return;
    };
    let block = &guest.block;
    guest.stores(DATA, 0x1111);
    assert_eq!(guest.asks(32 * MIB, 32 * MIB, Attribute::Private), 0);
    block.preallocate(1).unwrap();
    let before = unevictable();
    block.discard(16 * MIB, 32 * MIB).unwrap();
    assert_eq!(shared_plane(&guest), 16 * MIB);
    assert!(
        about(before - unevictable(), 16 * MIB),
        "private memory is held"
    );
    assert_eq!(block.stats().bytes_private, 32 * MIB);
    assert_eq!(guest.loads(DATA), 0x1111);

    // A page of either kind that the guest has written.
    block.discard(DATA, PAGE).unwrap();
    assert_eq!(guest.loads(DATA), 0);
    assert_eq!(guest.asks(DATA, PAGE, Attribute::Private), 0);
    guest.stores(DATA, 0x2222);
    block.discard(DATA, PAGE).unwrap();
    assert_eq!(
        block.run_at(DATA).unwrap(),
        (Attribute::Private, DATA + PAGE)
    );
    assert_eq!(guest.loads(DATA), 0);
    guest.stores(DATA, 0x3333);
    assert_eq!(guest.loads(DATA), 0x3333);
}
