// SPDX-License-Identifier: MIT OR Apache-2.0
//! Blocks of confidential VMs on a kernel that converts pages where they are: one guest_memfd.

use crate::common::skipped;
use crate::guest::Guest;
use crate::kvm::Machine;
use crate::pool::{free, number, Pool, POOL};
use crate::{about, alone, name_of, unevictable};
use gmem::{Attribute, Backing, Block, BlockConfig, Cause};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use Attribute::{Private, Shared};

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
const MIB: u64 = 1 << 20;
/// The page that changes its attribute.
const DATA: u64 = 0x8000;

fn guest(test: &str, config: &BlockConfig) -> Option<Guest> {
    let machine = Machine::in_place(test)?;
    let block = Block::new(&machine.vm, config).unwrap();
    assert_eq!(block.backing(), Backing::InPlace);
    Some(Guest::on(machine, block))
}

fn shared(size: u64) -> BlockConfig {
    BlockConfig::confidential("ram", size, Shared)
}

/// Reads a page as another process would that may look at this one: None if the kernel refuses.
fn looks_at(block: &Block, offset: u64) -> Option<u16> {
    let memory = File::open("/proc/self/mem").unwrap();
    let mut bytes = [0; 2];
    let read = memory.read_exact_at(&mut bytes, block.host() as u64 + offset);
    read.ok().map(|()| u16::from_le_bytes(bytes))
}

/// Somebody who holds a page: it lies in a pipe.
struct Pipe {
    reader: File,
    _writer: OwnedFd,
}

impl Pipe {
    fn with(block: &Block, offset: u64) -> Self {
        let mut ends = [0; 2];
        // SAFETY: two numbers are there to be written, and are the pipe's and nobody else's then.
        let (reader, writer) = unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
            (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
        };
        let part = libc::iovec {
            iov_base: block.host().wrapping_add(offset as usize).cast(),
            iov_len: PAGE as usize,
        };
        // SAFETY: the page is in the block's mapping.
        let moved = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const part, 1, 0) };
        assert_eq!(moved, PAGE as isize);
        Self {
            reader: reader.into(),
            _writer: writer,
        }
    }

    /// Lets go once a conversion has met it: the block had so many retries before.
    fn read_after_a_retry(mut self, block: &Block, before: u64) {
        while block.stats().retries == before {
            std::thread::yield_now();
        }
        self.reader.read_exact(&mut [0; PAGE as usize]).unwrap();
    }
}

#[test]
fn a_page_converts_where_it_is() {
    let test = name_of(a_page_converts_where_it_is);
    let _turn = alone();
    let Some(guest) = guest(test, &shared(2 * MIB)) else {
        return;
    };
    let block = &guest.block;
    guest.stores(DATA, 0x1111);
    assert_eq!(looks_at(block, DATA), Some(0x1111));
    let before = unevictable();

    assert_eq!(guest.asks(DATA, PAGE, Private), 0);
    guest.stores(DATA, 0x2222);
    assert_eq!(guest.loads(DATA), 0x2222);
    assert_eq!(looks_at(block, DATA), None, "the host sees a private page");
    assert_eq!(
        block.check_access(DATA, 1).unwrap_err().errno(),
        libc::EACCES
    );
    assert_eq!(guest.asks(DATA, PAGE, Shared), 0);
    guest.stores(DATA, 0x3333);
    assert_eq!(guest.host_reads(DATA), 0x3333);
    assert!(unevictable().abs_diff(before) < MIB, "memory for it twice");

    let stats = block.stats();
    assert_eq!(
        (stats.to_private, stats.to_shared, stats.failures),
        (1, 1, 0)
    );
    assert_eq!((stats.bytes_private, stats.runs), (0, 0));
    assert_eq!(stats.attribute_calls, 2);
}

#[test]
fn a_split_block_is_refused_by_name() {
    let test = name_of(a_split_block_is_refused_by_name);
    let Some(machine) = Machine::in_place(test) else {
        return;
    };
    let mut config = shared(MIB);
    config.backing = gmem::BackingChoice::Only(Backing::Split);
    let error = Block::new(&machine.vm, &config).unwrap_err();
    assert_eq!(error.errno(), libc::ENOTSUP);
    assert!(error.to_string().contains("MEMORY_ATTRIBUTES"), "{error}");
}

#[test]
fn who_holds_a_page_keeps_it_shared_until_he_lets_go() {
    let test = name_of(who_holds_a_page_keeps_it_shared_until_he_lets_go);
    let Some(guest) = guest(test, &shared(2 * MIB)) else {
        return;
    };
    let vm = &guest.machine.vm;
    guest.stores(DATA + PAGE, 0x1111);
    let pipe = Pipe::with(&guest.block, DATA + PAGE);
    let error = vm.convert(DATA, 4 * PAGE, Private).unwrap_err();
    assert_eq!(error.errno(), libc::EAGAIN);
    assert!(error.to_string().contains("offset 0x9000"), "{error}");
    assert_eq!(guest.block.stats().bytes_private, 0);
    assert!(guest.block.stats().retries > 5);
    assert_eq!(guest.host_reads(DATA + PAGE), 0x1111);
    assert_eq!(
        guest.asks(DATA, 4 * PAGE, Private),
        libc::EINVAL as u64,
        "what a guest other than TDX's hears"
    );
    // Others may go meanwhile.
    vm.convert(DATA, PAGE, Private).unwrap();

    let patient = std::thread::scope(|scope| {
        let before = guest.block.stats().retries;
        let converting = scope.spawn(|| vm.convert(DATA, 4 * PAGE, Private));
        pipe.read_after_a_retry(&guest.block, before);
        converting.join().unwrap()
    });
    patient.unwrap();
    assert_eq!(guest.block.stats().bytes_private, 4 * PAGE);
}

#[test]
fn a_guest_may_make_so_many_runs_and_the_host_lives() {
    let test = name_of(a_guest_may_make_so_many_runs_and_the_host_lives);
    let Some(guest) = guest(test, &shared(16 * MIB)) else {
        return;
    };
    let vm = &guest.machine.vm;
    let refused = (0..2000).find_map(|run| {
        let converted = vm.convert(MIB + 2 * run * PAGE, PAGE, Private);
        converted.err().map(|error| (run, error))
    });
    let (runs, error) = refused.expect("nothing stopped the guest");
    assert_eq!((runs, error.errno()), (1400, libc::ENOSPC));
    let refused = Cause::MaxRuns {
        runs: 1401,
        most: 1400,
    };
    assert_eq!(*error.cause(), refused);
    assert!(error.to_string().contains("max-runs"), "{error}");
    assert_eq!(guest.block.stats().runs_refused, 1);
    vm.convert(MIB, 15 * MIB, Shared).unwrap();
}

#[test]
fn a_reset_and_a_rebuilt_vm_begin_as_at_first() {
    let test = name_of(a_reset_and_a_rebuilt_vm_begin_as_at_first);
    let Some(mut guest) = guest(test, &shared(2 * MIB)) else {
        return;
    };
    guest.machine.vm.convert(DATA, 4 * PAGE, Private).unwrap();
    guest.block.reset().unwrap();
    assert_eq!(guest.block.stats().bytes_private, 0);
    guest.stores(DATA, 0x1111);
    assert_eq!(guest.host_reads(DATA), 0x1111);

    guest.machine.vm.convert(DATA, 4 * PAGE, Private).unwrap();
    let Guest {
        mut machine,
        block,
        vcpu,
        ..
    } = guest;
    drop(vcpu);
    machine.remove_slot(0);
    let host = block.host();
    machine.rebuild(|_| ());
    assert_eq!(block.host(), host);
    assert_eq!(block.stats().bytes_private, 0);
    guest = Guest::on(machine, block);
    assert_eq!(guest.loads(DATA), 0, "what the old VM left");
    guest.stores(DATA, 0x2222);
    assert_eq!(guest.host_reads(DATA), 0x2222);
}

#[test]
fn preallocation_fills_both_attributes() {
    let test = name_of(preallocation_fills_both_attributes);
    let _turn = alone();
    let Some(machine) = Machine::in_place(test) else {
        return;
    };
    let block = Block::new(&machine.vm, &shared(64 * MIB)).unwrap();
    block.bind(0, 64 * MIB, 0).unwrap().keep();
    machine.vm.convert(16 * MIB, 32 * MIB, Private).unwrap();
    let before = unevictable();
    block.preallocate(2).unwrap();
    assert!(about(unevictable() - before, 64 * MIB));
}

/// A machine, a pool with so many free huge pages, and a block of all of them.
fn huge(test: &str, initial: Attribute, pages: u64) -> Option<(Pool, Machine, Arc<Block>)> {
    let machine = Machine::in_place(test)?;
    if machine.vm.probe().huge_page_sizes & HUGE == 0 {
        skipped(test, "this kernel's guest_memfds have no huge pages");
        return None;
    }
    let pool = Pool::with_free(test, POOL, pages)?;
    let config = BlockConfig {
        hugetlb: Some(HUGE),
        ..BlockConfig::confidential("ram", pages * HUGE, initial)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    block.bind(0, pages * HUGE, 0).unwrap().keep();
    Some((pool, machine, block))
}

fn pages_of(block: &Block) -> (u64, u64) {
    let stats = block.stats();
    (stats.huge_pages_whole, stats.huge_pages_split)
}

/// Sets every page's first byte to its number.
fn mark(block: &Block, first: u64, count: u64) {
    for page in first..first + count {
        block.check_access(page * PAGE, PAGE).unwrap();
        let host = block.host().wrapping_add((page * PAGE) as usize);
        // SAFETY: in the mapping, and shared.
        unsafe { host.write_volatile(page as u8) };
    }
}

fn is_marked(block: &Block, first: u64, count: u64) -> bool {
    (first..first + count).all(|page| {
        let host = block.host().wrapping_add((page * PAGE) as usize);
        // SAFETY: in the mapping, and shared.
        unsafe { host.read_volatile() == page as u8 }
    })
}

#[test]
fn huge_pages_are_set_aside_split_merged_and_given_back() {
    let test = name_of(huge_pages_are_set_aside_split_merged_and_given_back);
    let Some((_pool, machine, block)) = huge(test, Private, 4) else {
        return;
    };
    let reserved = || number(POOL, "resv_hugepages");
    assert_eq!(free() - reserved(), 0, "they are not set aside");
    assert_eq!(block.host() as u64 % HUGE, 0);
    assert_eq!(pages_of(&block), (4, 0));
    let vm = &machine.vm;
    vm.convert(HUGE + 3 * PAGE, PAGE, Shared).unwrap();
    assert_eq!(pages_of(&block), (3, 1));
    mark(&block, 515, 1);
    // Its other pages are private still.
    assert_eq!(looks_at(&block, HUGE), None);
    vm.convert(0, 4 * HUGE, Shared).unwrap();
    assert_eq!(pages_of(&block), (0, 4));
    assert!(
        is_marked(&block, 515, 1),
        "a page that stayed shared changed"
    );
    mark(&block, 0, 4 * 512);
    vm.convert(HUGE, 2 * HUGE, Private).unwrap();
    assert_eq!(pages_of(&block), (2, 2));
    assert!(is_marked(&block, 0, 512) && is_marked(&block, 3 * 512, 512));
    vm.convert(0, 4 * HUGE, Private).unwrap();
    assert_eq!(pages_of(&block), (4, 0));
    let stats = block.stats();
    assert_eq!((stats.huge_page_splits, stats.huge_page_merges), (4, 4));
    assert_eq!((stats.failures, stats.retries), (0, 0));
    vm.convert(HUGE + 3 * PAGE, PAGE, Shared).unwrap();
    block.unbind(0, 4 * HUGE, 0).unwrap();
    drop(block);
    assert_eq!((free(), reserved()), (4, 0));
}

#[test]
fn huge_pages_that_the_kernel_leaves_half_way_are_led_back() {
    let test = name_of(huge_pages_that_the_kernel_leaves_half_way_are_led_back);
    let Some((_pool, machine, block)) = huge(test, Shared, 4) else {
        return;
    };
    let vm = &machine.vm;
    mark(&block, 0, 4 * 512);
    let pipe = Pipe::with(&block, 2 * HUGE + 5 * PAGE);
    let error = vm.convert(0, 4 * HUGE, Private).unwrap_err();
    assert_eq!(error.errno(), libc::EAGAIN);
    assert!(error.to_string().contains("offset 0x405000"), "{error}");
    assert_eq!(pages_of(&block), (0, 4));
    assert_eq!(block.stats().bytes_private, 0);
    assert!(
        is_marked(&block, 2 * 512, 2 * 512),
        "what was never reached"
    );

    let before = block.stats();
    let patient = std::thread::scope(|scope| {
        let converting = scope.spawn(|| vm.convert(0, 4 * HUGE, Private));
        pipe.read_after_a_retry(&block, before.retries);
        converting.join().unwrap()
    });
    patient.unwrap();
    assert_eq!(block.stats().resumed, before.resumed + 1);
    assert_eq!(pages_of(&block), (4, 0));
}

#[test]
fn a_pool_that_is_too_small_is_an_error_that_names_it() {
    let test = name_of(a_pool_that_is_too_small_is_an_error_that_names_it);
    let Some((_pool, machine, block)) = huge(test, Private, 2) else {
        return;
    };
    let config = BlockConfig {
        hugetlb: Some(HUGE),
        ..BlockConfig::confidential("more", HUGE, Private)
    };
    let error = Block::new(&machine.vm, &config).unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM);
    assert!(matches!(error.cause(), Cause::PoolEmpty(_)), "{error:?}");
    assert!(error.to_string().contains(POOL), "{error}");
    drop(block);
    Block::new(&machine.vm, &config).unwrap();
}

#[test]
fn a_huge_page_that_is_preallocated_stays_one() {
    let test = name_of(a_huge_page_that_is_preallocated_stays_one);
    let Some((_pool, machine, block)) = huge(test, Private, 4) else {
        return;
    };
    machine.vm.convert(HUGE, PAGE, Shared).unwrap();
    block.preallocate(2).unwrap();
    assert_eq!(free(), 0);
    assert_eq!(pages_of(&block), (3, 1));
}

#[test]
fn what_is_discarded_is_the_hosts_and_keeps_its_attribute() {
    let test = name_of(what_is_discarded_is_the_hosts_and_keeps_its_attribute);
    let _turn = alone();
    let Some(guest) = guest(test, &shared(64 * MIB)) else {
        return;
    };
    let block = &guest.block;
    guest.stores(DATA, 0x1111);
    assert_eq!(guest.asks(32 * MIB, 32 * MIB, Private), 0);
    block.preallocate(1).unwrap();
    let before = unevictable();
    block.discard(16 * MIB, 32 * MIB).unwrap();
    assert!(about(before - unevictable(), 32 * MIB), "memory is held");
    assert_eq!(block.stats().bytes_private, 32 * MIB);
    assert_eq!(guest.loads(DATA), 0x1111);

    block.discard(DATA, PAGE).unwrap();
    assert_eq!(guest.loads(DATA), 0);
    assert_eq!(looks_at(block, DATA), Some(0));
    assert_eq!(guest.asks(DATA, PAGE, Private), 0);
    guest.stores(DATA, 0x2222);
    block.discard(DATA, PAGE).unwrap();
    assert_eq!(looks_at(block, DATA), None, "it is not private any more");
    assert_eq!(guest.loads(DATA), 0);
    guest.stores(DATA, 0x3333);
    assert_eq!(guest.loads(DATA), 0x3333);
}
