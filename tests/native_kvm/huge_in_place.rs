// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest_memfd of huge pages whose pages convert in place: one with a shared page in it is split.

use crate::common::skipped;
use crate::guest::Guest;
use crate::kvm::Machine;
use crate::name_of;
use crate::pool::{free, Pool, POOL};
use gmem::{Attribute, Backing, Block, BlockConfig};
use Attribute::{Private, Shared};

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
const SIZE: u64 = 3 * HUGE;
/// Where the guest sees the end of the second huge page and the beginning of the third: its code is in
/// the first one, and it can't see far.
const SEEN: u64 = 0x8000;
const OFFSET: u64 = 2 * HUGE - SEEN / 2;
/// The first byte of the third.
const THIRD: u64 = SEEN + SEEN / 2;

/// None where the kernel has no huge pages in guest_memfds.
fn machine(test: &str) -> Option<Machine> {
    let machine = Machine::in_place(test)?;
    let probe = machine.vm.probe();
    if probe.huge_page_sizes & HUGE == 0 {
        skipped(test, format_args!("{probe}"));
        return None;
    }
    Some(machine)
}

/// All private but for the first huge page.
fn guest(machine: Machine) -> Guest {
    let config = BlockConfig {
        hugetlb: Some(HUGE),
        ..BlockConfig::confidential("ram", SIZE, Shared)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    assert_eq!(block.backing(), Backing::InPlace);
    let rest = (1 << 30, HUGE, OFFSET - HUGE);
    let last = (2 << 30, OFFSET + SEEN, SIZE - OFFSET - SEEN);
    let parts = [(0, 0, SEEN), (SEEN, OFFSET, SEEN), rest, last];
    let guest = Guest::shown(machine, block, &parts);
    for (gpa, _, size) in &parts[1..] {
        guest.machine.vm.convert(*gpa, *size, Private).unwrap();
    }
    guest
}

/// Of the block, whole and split.
fn huge_pages(block: &Block) -> (u64, u64) {
    let stats = block.stats();
    (stats.huge_pages_whole, stats.huge_pages_split)
}

#[test]
fn huge_pages_are_found_with_an_empty_pool_and_none_is_kept() {
    let test = name_of(huge_pages_are_found_with_an_empty_pool_and_none_is_kept);
    let Some(pool) = Pool::with_free(test, POOL, 1) else {
        return;
    };
    let Some(with_one) = machine(test) else {
        return;
    };
    assert_eq!(free(), 1);
    pool.set_free(0);
    let without = machine(test).expect("it had them a moment ago");
    assert_eq!(with_one.vm.probe(), without.vm.probe());
}

#[test]
fn an_image_across_huge_pages_leaves_them_whole() {
    let test = name_of(an_image_across_huge_pages_leaves_them_whole);
    let Some(_pool) = Pool::with_free(test, POOL, SIZE / HUGE) else {
        return;
    };
    let Some(machine) = machine(test) else {
        return;
    };
    let guest = guest(machine);
    assert_eq!(huge_pages(&guest.block), (2, 1));
    guest.stores(SEEN, 0x1111);
    let image: Vec<u8> = (0..3 * PAGE).map(|byte| (byte >> 4) as u8 | 1).collect();
    let at = THIRD - 0x800;
    guest.block.place(at - SEEN + OFFSET, &image).unwrap();
    for offset in [0, 0x7fe, 0x800, image.len() - 2] {
        let word = u16::from_le_bytes([image[offset], image[offset + 1]]);
        assert_eq!(guest.loads(at + offset as u64), word, "at {offset:#x}");
    }
    assert_eq!(guest.loads(SEEN), 0x1111);
    assert_eq!(guest.block.run_at(HUGE).unwrap(), (Private, SIZE));
    assert_eq!(huge_pages(&guest.block), (2, 1));
    assert_eq!(guest.block.stats().bytes_quarantined, 0);
}

#[test]
fn a_lost_page_takes_its_huge_page_along_and_no_other() {
    let test = name_of(a_lost_page_takes_its_huge_page_along_and_no_other);
    let Some(_pool) = Pool::with_free(test, POOL, SIZE / HUGE) else {
        return;
    };
    let Some(machine) = machine(test) else {
        return;
    };
    let guest = guest(machine);
    for page in [SEEN, SEEN + PAGE, THIRD, THIRD + PAGE] {
        guest.stores(page, 0x1111);
    }
    let vm = &guest.machine.vm;
    vm.poison(SEEN + PAGE, 1).unwrap();
    assert_eq!(guest.loads(SEEN), 0x1111);
    vm.convert(SEEN + PAGE, PAGE, Shared).unwrap_err();
    vm.convert(THIRD + PAGE, PAGE, Shared).unwrap();
    assert_eq!(huge_pages(&guest.block), (1, 2));
    assert_eq!(guest.loads(THIRD), 0x1111, "the other is there");
    guest.block.reset().unwrap();
    assert_eq!(guest.block.stats().bytes_poisoned, 0);
    assert_eq!(guest.block.run_at(0).unwrap(), (Shared, SIZE));
    // A reset empties huge pages that have a private part. The guest's code is in one that has none.
    for page in [SEEN, SEEN + PAGE, THIRD, THIRD + PAGE] {
        assert_eq!(guest.loads(page), 0);
    }
    vm.convert(SEEN, SEEN, Private).unwrap();
    guest.stores(SEEN, 0x3333);
    assert_eq!(guest.loads(SEEN), 0x3333);
    // All of the pool is the guest's still.
    assert_eq!(free(), 0);
}

#[test]
fn a_discard_takes_whole_huge_pages_and_zeroes_what_is_shared_of_others() {
    let test = name_of(a_discard_takes_whole_huge_pages_and_zeroes_what_is_shared_of_others);
    const PAGES: u64 = 4;
    // The guest sees the end of the third of four huge pages and the beginning of the fourth.
    const FOURTH: u64 = 3 * HUGE;
    const AT: u64 = SEEN + SEEN / 2;
    let Some(_pool) = Pool::with_free(test, POOL, PAGES) else {
        return;
    };
    let Some(machine) = machine(test) else {
        return;
    };
    let config = BlockConfig {
        hugetlb: Some(HUGE),
        ..BlockConfig::confidential("ram", PAGES * HUGE, Shared)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    let rest = (1 << 30, 2 * HUGE, HUGE - SEEN / 2);
    let parts = [(0, 0, SEEN), (SEEN, FOURTH - SEEN / 2, SEEN), rest];
    let guest = Guest::shown(machine, block, &parts);
    let (vm, block) = (&guest.machine.vm, &guest.block);
    for private in [AT - PAGE, AT] {
        vm.convert(private, PAGE, Private).unwrap();
    }
    // In the range or not, of the second and the fourth, which do not go as a whole, and of the third, which does.
    let in_sight = [AT - PAGE, AT, AT + PAGE, AT + 2 * PAGE];
    let out_of_sight = [HUGE, HUGE + PAGE, 2 * HUGE - PAGE, 2 * HUGE];
    for gpa in in_sight {
        guest.stores(gpa, 0x1111);
    }
    for offset in out_of_sight {
        guest.host_writes(offset, &[0x11, 0x11]);
    }
    let all = block.stats();
    block.discard(HUGE + PAGE, 2 * HUGE + PAGE).unwrap();
    let left = out_of_sight.map(|offset| guest.host_reads(offset));
    assert_eq!(left, [0x1111, 0, 0, 0]);
    let left = in_sight.map(|gpa| guest.loads(gpa));
    assert_eq!(
        left,
        [0, 0x1111, 0, 0x1111],
        "the second is private and stays"
    );
    assert_eq!(guest.host_reads(FOURTH + PAGE), 0);
    let stats = block.stats();
    assert_eq!(stats.bytes_private, 2 * PAGE);
    assert_eq!(huge_pages(block), (0, PAGES));
    assert_eq!(stats.huge_page_splits, all.huge_page_splits);
    for gpa in in_sight {
        guest.stores(gpa, 0x2222);
    }
    assert_eq!(in_sight.map(|gpa| guest.loads(gpa)), [0x2222; 4]);

    // One that is private as a whole is one page before and after.
    vm.convert(rest.0, rest.2, Private).unwrap();
    vm.convert(AT - SEEN / 2, SEEN / 2, Private).unwrap();
    assert_eq!(huge_pages(block), (1, PAGES - 1));
    guest.stores(AT - PAGE, 0x3333);
    block.discard(2 * HUGE, HUGE).unwrap();
    assert_eq!(guest.loads(AT - PAGE), 0);
    assert_eq!(guest.loads(AT), 0x2222);
    assert_eq!(huge_pages(block), (1, PAGES - 1));
    guest.stores(AT - PAGE, 0x3333);
    assert_eq!(guest.loads(AT - PAGE), 0x3333);
    // What was given back is the block's to take again, and nobody else's.
    assert_eq!(free(), 0);
}
