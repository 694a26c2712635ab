// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whole or in pieces: what a conversion does to a huge page, and what it leaves when it fails.

use crate::guest::{mapped, slot, Guest};
use crate::sys::{end_at_sigbus, in_child, pipe, Map, Ring, NO_SUCH_PAGE};
use crate::{convert, convert_all, huge, huge_pages, name_of, Converted, NR, PRIVATE, SHARED};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const BUSY: fn(u64) -> Converted = |page| Converted::Failed(libc::EAGAIN, page);

/// A byte that tells pages apart.
fn mark(page: u64) -> u8 {
    (page ^ (page >> 8)) as u8 | 1
}

/// Whether the host gets SIGBUS there, as at private pages.
fn refuses(map: &Map, page: u64) -> bool {
    let child = in_child(|| {
        end_at_sigbus();
        map.read(page);
        0
    });
    child.result() == NO_SUCH_PAGE
}

#[test]
fn bytes_stay_through_pieces_and_whole() {
    let Some((vm, pool)) = huge_pages(name_of(bytes_stay_through_pieces_and_whole)) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    let map = file.map(2 * NR);
    convert_all(&file, &[(0, 2 * NR)], SHARED);
    (0..2 * NR).for_each(|page| map.write(page, mark(page)));
    for round in 0..3 {
        convert_all(&file, &[(0, 2 * NR)], PRIVATE);
        assert_eq!(map.count_present(), 0);
        for page in [0, 1, NR - 1, NR, 2 * NR - 1] {
            convert_all(&file, &[(page, 1)], SHARED);
            assert_eq!(map.read(page), mark(page), "round {round}");
            assert!(refuses(&map, page ^ 2));
            convert_all(&file, &[(page, 1)], PRIVATE);
        }
        convert_all(&file, &[(0, 2 * NR)], SHARED);
        assert!((0..2 * NR).all(|page| map.read(page) == mark(page)));
    }
    pool.expect(0, 0, "all in use");
}

#[test]
fn huge_pages_before_the_one_that_failed_are_converted() {
    let test = name_of(huge_pages_before_the_one_that_failed_are_converted);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(3);
    let file = huge(&vm, 3);
    let map = file.map(3 * NR);
    let guest = Guest::new(&vm);
    slot(&vm, 0, 1 << 30, 3 * NR, &file, 0, map.page(0) as u64).unwrap();
    convert_all(&file, &[(0, 3 * NR)], SHARED);
    (0..3 * NR).for_each(|page| map.write(page, mark(page)));
    let ring = Ring::new().unwrap();
    let pins = [NR + 30, NR + 20].map(|page| map.iovec(page));
    ring.register(&pins).unwrap();

    // The first busy page, in the second.
    assert_eq!(convert(&file, 0, 3 * NR, PRIVATE), BUSY(NR + 20));
    assert!(refuses(&map, NR - 1));
    for page in [NR, NR + 20, 2 * NR - 1, 2 * NR, 3 * NR - 1] {
        assert_eq!(map.read(page), mark(page));
    }
    guest.fault(1 << 30, 3 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(1, 2 * NR));

    // Within one huge page it is all or nothing.
    assert_eq!(convert(&file, NR, NR, PRIVATE), BUSY(NR + 20));
    assert_eq!(convert(&file, NR + 25, NR, PRIVATE), BUSY(NR + 30));
    assert_eq!(map.read(NR + 26), mark(NR + 26));
    // Others of it can be converted, and the next huge page.
    convert_all(
        &file,
        &[(NR, 20), (NR + 21, 9), (NR + 31, NR - 31), (2 * NR, NR)],
        PRIVATE,
    );
    assert!(!refuses(&map, NR + 20) && refuses(&map, NR + 21));
    assert_eq!(convert(&file, NR, 2 * NR, PRIVATE), BUSY(NR + 20));

    ring.unregister().unwrap();
    convert_all(&file, &[(NR, 2 * NR)], PRIVATE);
    guest.fault(1 << 30, 3 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(3, 0));
    convert_all(&file, &[(0, 3 * NR)], SHARED);
    assert!((0..3 * NR).all(|page| map.read(page) == mark(page)));
}

#[test]
fn a_plain_reference_is_in_the_way_too() {
    let Some((vm, pool)) = huge_pages(name_of(a_plain_reference_is_in_the_way_too)) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    let map = file.map(2 * NR);
    convert_all(&file, &[(NR + 3, 2)], SHARED);
    map.write(NR + 4, 0x44);
    let (_from, to) = pipe();
    let vector = map.iovec(NR + 4);
    // SAFETY: one element, of our own mapping.
    let spliced = unsafe { libc::vmsplice(to.as_raw_fd(), &vector, 1, 0) };
    assert_eq!(spliced, 4096);
    // Offsets in the request that are private already are none that it fails at.
    assert_eq!(convert(&file, 0, 2 * NR, PRIVATE), BUSY(NR + 4));
    assert_eq!(map.read(NR + 4), 0x44);
    drop((_from, to));
    convert_all(&file, &[(0, 2 * NR)], PRIVATE);
}

#[test]
fn a_range_that_is_as_asked_changes_nothing() {
    let Some((vm, pool)) = huge_pages(name_of(a_range_that_is_as_asked_changes_nothing)) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    let map = file.map(2 * NR);
    let guest = Guest::new(&vm);
    slot(&vm, 0, 1 << 30, 2 * NR, &file, 0, map.page(0) as u64).unwrap();
    guest.fault(1 << 30, 2 * NR).unwrap();
    convert_all(&file, &[(0, 2 * NR), (17, 1)], PRIVATE);
    assert_eq!(guest.mapped(), mapped(2, 0));
    convert_all(&file, &[(0, NR)], SHARED);
    map.write(9, 9);
    let ring = Ring::new().unwrap();
    ring.register(&[map.iovec(9)]).unwrap();
    convert_all(&file, &[(0, NR), (9, 1)], SHARED);
    // More of it, while some is pinned.
    convert_all(&file, &[(20, 1)], PRIVATE);
    convert_all(&file, &[(0, NR)], SHARED);
    assert_eq!(map.count_present(), 1);
    // A ring that is only closed keeps its pins for some milliseconds.
    ring.unregister().unwrap();
}

#[test]
fn a_forked_process_loses_its_mapping_as_well() {
    let Some((vm, pool)) = huge_pages(name_of(a_forked_process_loses_its_mapping_as_well)) else {
        return;
    };
    pool.fill(1);
    let file = huge(&vm, 1);
    let map = file.map(NR);
    convert_all(&file, &[(0, NR)], SHARED);
    map.write(5, 5);
    let (from, to) = pipe();
    let (back_from, back_to) = pipe();
    let mut byte = [0u8];
    let child = in_child(|| {
        let mut byte = [map.read(5)];
        // SAFETY: one byte each.
        unsafe {
            libc::write(back_to.as_raw_fd(), byte.as_ptr().cast(), 1);
            libc::read(from.as_raw_fd(), byte.as_mut_ptr().cast(), 1);
        }
        end_at_sigbus();
        map.read(5)
    });
    // SAFETY: one byte.
    unsafe { libc::read(back_from.as_raw_fd(), byte.as_mut_ptr().cast(), 1) };
    assert_eq!(byte, [5]);
    convert_all(&file, &[(0, NR)], PRIVATE);
    // SAFETY: one byte.
    unsafe { libc::write(to.as_raw_fd(), byte.as_ptr().cast(), 1) };
    assert_eq!(child.result(), NO_SUCH_PAGE);
}

#[test]
fn locked_memory_is_not_in_the_way() {
    let Some((vm, pool)) = huge_pages(name_of(locked_memory_is_not_in_the_way)) else {
        return;
    };
    pool.fill(1);
    let file = huge(&vm, 1);
    let map = file.map(NR);
    convert_all(&file, &[(8, 8)], SHARED);
    // SAFETY: in the mapping.
    let locked = unsafe { libc::mlock(map.page(8).cast(), 8 * 4096) };
    assert_eq!(locked, 0);
    assert_eq!(map.count_present(), 8);
    convert_all(&file, &[(8, 8)], PRIVATE);
    assert_eq!(map.count_present(), 0);
    convert_all(&file, &[(0, NR)], SHARED);
    map.write(9, 9);
    // Pages on their way out of that state have a reference.
    drop((map, file));
    pool.expect(1, 0, "closed");
}

/// Host and guest fault in what is just being taken apart and put together.
#[test]
fn faults_and_conversions_at_the_same_time() {
    let Some((vm, pool)) = huge_pages(name_of(faults_and_conversions_at_the_same_time)) else {
        return;
    };
    pool.fill(4);
    let file = huge(&vm, 4);
    let map = file.map(4 * NR);
    let guest = Guest::new(&vm);
    slot(&vm, 0, 1 << 30, 4 * NR, &file, 0, map.page(0) as u64).unwrap();
    let stop = AtomicBool::new(false);
    let (mut rounds, mut again) = (0u64, 0u64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Pages turn shared and private meanwhile: either answer is right.
                let _ = guest.fault(1 << 30, 4 * NR);
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for huge_page in 0..4 {
                    // Not the accesses of the CPU, which would end in SIGBUS.
                    let _ = map.madvise(huge_page * NR, 3, libc::MADV_POPULATE_WRITE);
                }
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = file.punch(3 * NR, NR);
                let _ = file.allocate(3 * NR, NR);
            }
        });
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(4) {
            for attributes in [SHARED, PRIVATE] {
                for (first, count) in [(0, 1), (NR - 1, 2), (2, 3 * NR), (0, 4 * NR)] {
                    loop {
                        match convert(&file, first, count, attributes) {
                            Converted::Yes => break,
                            Converted::Failed(libc::EAGAIN, page) => {
                                assert!((first..first + count).contains(&page));
                                again += 1;
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                }
            }
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{rounds} rounds of 8 conversions, {again} repeated");
    convert_all(&file, &[(0, 4 * NR)], PRIVATE);
    guest.fault(1 << 30, 4 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(4, 0));
    pool.expect(0, 0, "all in use");
    slot(&vm, 0, 1 << 30, 0, &file, 0, 0).unwrap();
    drop((map, file));
    pool.expect(4, 0, "closed");
}
