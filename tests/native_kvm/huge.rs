// SPDX-License-Identifier: MIT OR Apache-2.0
//! Shared memory from the host's pool of huge pages, which must have room for it.

use crate::common::skipped;
use crate::kvm::Machine;
use crate::name_of;
use crate::pool::{free, number, Pool, GIB_POOL, POOL};
use crate::stand_in::StandIn;
use gmem::{Attribute, Block, BlockConfig, Cause, NumaPolicy, PolicyMode, Vm};
use std::sync::Arc;
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// A VM with private memory; where the host has none, one of which KVM doesn't know it.
fn vm(test: &str) -> Option<(Machine, Arc<Vm>)> {
    let machine = Machine::any(test)?;
    let vm = match machine.vm.probe().private_attribute {
        true => machine.vm.clone(),
        false => Vm::with_kernel(Arc::new(StandIn), machine.file()).unwrap(),
    };
    if let Err(error) = Block::new(&vm, &BlockConfig::confidential("ram", HUGE, Private)) {
        skipped(test, error);
        return None;
    }
    Some((machine, vm))
}

fn config(initial: Attribute, huge_pages: u64) -> BlockConfig {
    BlockConfig {
        hugetlb: Some(HUGE),
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", huge_pages * HUGE, initial)
    }
}

fn byte(block: &Block, offset: u64) -> *mut u8 {
    assert!(offset < block.span().end());
    // SAFETY: in the mapping.
    unsafe { block.host().add(offset as usize) }
}

fn write(block: &Block, offset: u64, value: u8) {
    // SAFETY: a shared page, which has memory.
    unsafe { byte(block, offset).write_volatile(value) };
}

fn read(block: &Block, offset: u64) -> u8 {
    // SAFETY: a shared page, which has memory.
    unsafe { byte(block, offset).read_volatile() }
}

#[test]
fn a_huge_page_is_the_hosts_again_with_its_last_shared_page() {
    let test = name_of(a_huge_page_is_the_hosts_again_with_its_last_shared_page);
    let Some(_pool) = Pool::with_free(test, POOL, 4) else {
        return;
    };
    let Some((_machine, vm)) = vm(test) else {
        return;
    };
    let block = Block::new(&vm, &config(Private, 4)).unwrap();
    assert_eq!(block.host() as u64 % HUGE, 0);
    block.bind(0, 4 * HUGE, 0).unwrap().keep();
    let convert = |offset, size, attribute| vm.convert(offset, size, attribute).unwrap();
    assert_eq!(free(), 4, "the mapping reserves");

    convert(PAGE, PAGE, Shared);
    assert_eq!(free(), 3);
    convert(HUGE - PAGE, 2 * PAGE, Shared);
    assert_eq!(free(), 2);
    for offset in [PAGE, HUGE - PAGE, HUGE] {
        write(&block, offset, 42);
    }
    assert_eq!(block.stats().huge_pages_shared, 2);
    convert(HUGE - PAGE, 2 * PAGE, Private);
    assert_eq!(free(), 3, "the first has a shared page still");
    assert_eq!(read(&block, PAGE), 42);
    convert(HUGE - PAGE, PAGE, Shared);
    assert_eq!(read(&block, HUGE - PAGE), 0, "a byte survived");
    convert(0, 4 * HUGE, Shared);
    assert_eq!(free(), 0);
    assert_eq!(read(&block, PAGE), 42);
    // In pieces that meet in the middle of huge pages.
    for piece in 0..8 {
        convert(piece * HUGE / 2, HUGE / 2, Private);
        assert_eq!(free(), piece.div_ceil(2));
    }
    let stats = block.stats();
    assert_eq!((stats.huge_pages_shared, stats.release_failures), (0, 0));
}

#[test]
fn a_discard_frees_huge_pages_that_are_not_promised_and_zeroes_others() {
    let test = name_of(a_discard_frees_huge_pages_that_are_not_promised_and_zeroes_others);
    let Some(_pool) = Pool::with_free(test, POOL, 4) else {
        return;
    };
    let Some((_machine, vm)) = vm(test) else {
        return;
    };
    for reserve in [true, false] {
        let config = BlockConfig {
            reserve,
            ..config(Private, 4)
        };
        let block = Block::new(&vm, &config).unwrap();
        block.bind(0, 4 * HUGE, 0).unwrap().keep();
        vm.convert(0, 3 * HUGE, Shared).unwrap();
        let places = [0, PAGE, HUGE, 2 * HUGE - PAGE, 2 * HUGE, 3 * HUGE - PAGE];
        for offset in places {
            write(&block, offset, 42);
        }
        assert_eq!(free(), 1);
        block.discard(PAGE, 2 * HUGE).unwrap();
        assert_eq!(free(), if reserve { 1 } else { 2 });
        let left = places.map(|offset| read(&block, offset));
        assert_eq!(left, [42, 0, 0, 0, 0, 42]);
        assert_eq!(block.stats().bytes_shared, 3 * HUGE);
        vm.convert(0, 3 * HUGE, Private).unwrap();
        assert_eq!(free(), 4);
    }
}

#[test]
fn an_empty_pool_is_an_error_and_no_signal() {
    let test = name_of(an_empty_pool_is_an_error_and_no_signal);
    let Some(pool) = Pool::with_free(test, POOL, 2) else {
        return;
    };
    let Some((_machine, vm)) = vm(test) else {
        return;
    };
    let block = Block::new(&vm, &config(Private, 4)).unwrap();
    block.bind(0, 4 * HUGE, 0).unwrap().keep();
    let error = vm.convert(HUGE / 2, 2 * HUGE, Shared).unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM);
    assert!(matches!(error.cause(), Cause::PoolEmpty(_)), "{error:?}");
    assert!(error.to_string().contains(POOL), "{error}");
    assert_eq!(free(), 2);
    vm.convert(HUGE / 2, HUGE, Shared).unwrap();
    write(&block, HUGE, 1);
    // What is there already is enough for its neighbours.
    vm.convert(0, 2 * HUGE, Shared).unwrap();
    vm.convert(2 * HUGE, PAGE, Shared).unwrap_err();
    drop(block);
    assert_eq!(free(), 2);

    let error = Block::new(&vm, &config(Shared, 3)).unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM);
    assert!(matches!(error.cause(), Cause::PoolEmpty(_)), "{error:?}");
    assert!(error.to_string().contains(POOL), "{error}");
    assert_eq!(free(), 2, "a block that failed keeps huge pages");
    pool.set_free(3);
    let block = Block::new(&vm, &config(Shared, 3)).unwrap();
    assert_eq!(free(), 0);
    block.bind(0, 3 * HUGE, 0).unwrap().keep();
    vm.convert(0, 3 * HUGE, Private).unwrap();
    assert_eq!(free(), 3);
    block.preallocate(2).unwrap();
    assert_eq!(free(), 3, "what is private was filled in the shared plane");
    pool.set_free(2);
    let error = block.reset().unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM);
    assert_eq!(free(), 2);
    pool.set_free(3);
    block.reset().unwrap();
    assert_eq!(free(), 0);
    vm.detach().unwrap();
    assert_eq!(free(), 3);
}

#[test]
fn a_page_of_a_gib_comes_and_goes_too() {
    let test = name_of(a_page_of_a_gib_comes_and_goes_too);
    let Some(_pool) = Pool::with_free(test, GIB_POOL, 1) else {
        return;
    };
    let Some((_machine, vm)) = vm(test) else {
        return;
    };
    let free = || number(GIB_POOL, "free_hugepages");
    let config = BlockConfig {
        hugetlb: Some(GIB),
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", 2 * GIB, Private)
    };
    let block = Block::new(&vm, &config).unwrap();
    assert_eq!(block.host() as u64 % GIB, 0);
    block.bind(0, 2 * GIB, 0).unwrap().keep();
    vm.convert(PAGE, PAGE, Shared).unwrap();
    vm.convert(GIB - PAGE, PAGE, Shared).unwrap();
    assert_eq!(free(), 0);
    write(&block, GIB - PAGE, 42);
    let error = vm.convert(GIB - PAGE, 2 * PAGE, Shared).unwrap_err();
    assert_eq!(error.errno(), libc::ENOMEM);
    assert!(matches!(error.cause(), Cause::PoolEmpty(_)), "{error:?}");
    assert!(error.to_string().contains(GIB_POOL), "{error}");
    vm.convert(0, 2 * PAGE, Private).unwrap();
    assert_eq!(read(&block, GIB - PAGE), 42);
    vm.convert(0, GIB, Private).unwrap();
    assert_eq!(free(), 1);
}

#[test]
fn huge_pages_come_by_a_policy() {
    const NODE_0: &str = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB";
    let test = name_of(huge_pages_come_by_a_policy);
    let Some(pool) = Pool::with_free(test, NODE_0, 2) else {
        return;
    };
    let Some((_machine, vm)) = vm(test) else {
        return;
    };
    let free = || number(NODE_0, "free_hugepages");
    let config = BlockConfig {
        policy: NumaPolicy::new(PolicyMode::Bind, &[1]),
        reserve: false,
        ..config(Private, 2)
    };
    let block = Block::new(&vm, &config).unwrap();
    block.bind(0, 2 * HUGE, 0).unwrap().keep();
    vm.convert(PAGE, HUGE, Shared).unwrap();
    assert_eq!(free(), 0);
    write(&block, HUGE, 1);
    vm.convert(0, 2 * HUGE, Private).unwrap();
    assert_eq!(free(), 2);

    // What other nodes have is not for it.
    const NODE_1: &str = "/sys/devices/system/node/node1/hugepages/hugepages-2048kB";
    drop(pool);
    if !std::path::Path::new(NODE_1).exists() {
        return;
    }
    let other = Pool::with_free(test, NODE_1, 2);
    if other.is_some() && free() == 0 {
        let error = vm.convert(PAGE, HUGE, Shared).unwrap_err();
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
        assert!(error.to_string().contains("policy=bind over NUMA nodes 0"));
    }
}
