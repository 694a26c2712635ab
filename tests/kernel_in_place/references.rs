// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who uses a page when it is to become private. Mappings are taken away; references are respected.

use crate::sys::{end_at_sigbus, in_child, pipe, Gmem, Map, Ring, NO_SUCH_PAGE};
use crate::{
    busy, convert, convert_soon, in_place, name_of, skip, Converted, INIT_SHARED, PAGE, PRIVATE,
    SHARED,
};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGES: u64 = 16;

fn ring(test: &str) -> Option<Ring> {
    match Ring::new() {
        Ok(ring) => Some(ring),
        Err(error) => skip(test, format_args!("io_uring: {error}")),
    }
}

/// Each page with a byte of its own.
fn fill(map: &Map) {
    (0..PAGES).for_each(|page| map.write(page, mark(page)));
}

fn mark(page: u64) -> u8 {
    0xa0 + page as u8
}

fn all_marked(map: &Map) -> bool {
    (0..PAGES).all(|page| map.read(page) == mark(page))
}

/// 0 if a child can read the page.
fn touched_by_child(map: &Map, page: u64) -> u8 {
    in_child(|| {
        end_at_sigbus();
        map.read(page);
        0
    })
    .result()
}

#[test]
fn mappings_of_this_process_go() {
    let Some(vm) = in_place(name_of(mappings_of_this_process_go)) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    let second = gmem.map(PAGES);
    fill(&map);
    assert!(all_marked(&second));
    assert_eq!(convert(&gmem, 4, 4, PRIVATE), Converted::Yes);
    for map in [&map, &second] {
        assert_eq!(map.count_present(), PAGES - 4);
        assert!((4..8).all(|page| !map.present(page)));
    }
    // A locked one goes too.
    // SAFETY: in the mapping.
    assert_eq!(unsafe { libc::mlock(map.page(9).cast(), PAGE as usize) }, 0);
    assert_eq!(convert(&gmem, 9, 1, PRIVATE), Converted::Yes);
    assert!(!map.present(9));
}

#[test]
fn mappings_of_other_processes_go() {
    let Some(vm) = in_place(name_of(mappings_of_other_processes_go)) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    fill(&map);
    let (ready, ready_end) = pipe();
    let (go, go_end) = pipe();
    let byte = |fd: i32, write: bool| {
        let mut byte = 0u8;
        // SAFETY: one byte.
        match write {
            true => unsafe { libc::write(fd, (&raw const byte).cast(), 1) },
            false => unsafe { libc::read(fd, (&raw mut byte).cast(), 1) },
        }
    };
    let child = in_child(|| {
        end_at_sigbus();
        if map.read(5) != mark(5) {
            return 1;
        }
        byte(ready_end.as_raw_fd(), true);
        byte(go.as_raw_fd(), false);
        // Not converted, so still there.
        if map.read(4) != mark(4) {
            return 2;
        }
        map.read(5);
        3
    });
    byte(ready.as_raw_fd(), false);
    assert_eq!(convert(&gmem, 5, 1, PRIVATE), Converted::Yes);
    byte(go_end.as_raw_fd(), true);
    assert_eq!(child.result(), NO_SUCH_PAGE);
    assert_eq!(convert(&gmem, 5, 1, SHARED), Converted::Yes);
    assert_eq!(touched_by_child(&map, 5), 0);
}

#[test]
fn the_first_pinned_page_is_named_and_nothing_changes() {
    let test = name_of(the_first_pinned_page_is_named_and_nothing_changes);
    let (Some(vm), Some(ring)) = (in_place(test), ring(test)) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    fill(&map);
    ring.register(&[map.iovec(6), map.iovec(3)]).unwrap();

    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), busy(3 * PAGE));
    assert_eq!(convert(&gmem, 3, 1, PRIVATE), busy(3 * PAGE));
    assert_eq!(convert(&gmem, 4, PAGES - 4, PRIVATE), busy(6 * PAGE));
    assert_eq!(map.count_present(), 0, "unmapped all the same");
    assert!(all_marked(&map), "all are shared still");

    // Neighbours are none of a pin's business.
    for page in (0..PAGES).filter(|page| ![3, 6].contains(page)) {
        assert_eq!(convert(&gmem, page, 1, PRIVATE), Converted::Yes);
    }
    // Partly private already: the same request is right as often as one likes.
    for _ in 0..3 {
        assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), busy(3 * PAGE));
    }
    assert_eq!(map.read(3), mark(3));
    assert_eq!(touched_by_child(&map, 4), NO_SUCH_PAGE);

    ring.unregister().unwrap();
    convert_soon(&gmem, 0, PAGES, PRIVATE);
    // Back, and the bytes are those of before: this VM type leaves them alone.
    assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
    assert!(all_marked(&map));
}

/// The last of many pages, so that the walk is in its last batch of folios.
#[test]
fn the_last_pinned_page_is_found() {
    let test = name_of(the_last_pinned_page_is_found);
    let (Some(vm), Some(ring)) = (in_place(test), ring(test)) else {
        return;
    };
    let pages = 1000;
    let (gmem, map) = vm.mapped(pages, INIT_SHARED);
    (0..pages).for_each(|page| map.write(page, 1));
    ring.register(&[map.iovec(pages - 1)]).unwrap();
    assert_eq!(convert(&gmem, 0, pages, PRIVATE), busy((pages - 1) * PAGE));
    ring.unregister().unwrap();
    convert_soon(&gmem, 0, pages, PRIVATE);
}

#[test]
fn a_ring_that_is_closed_lets_go_a_little_later() {
    let test = name_of(a_ring_that_is_closed_lets_go_a_little_later);
    let (Some(vm), Some(ring)) = (in_place(test), ring(test)) else {
        return;
    };
    let (gmem, map) = vm.mapped(1, INIT_SHARED);
    ring.register(&[map.iovec(0)]).unwrap();
    assert_eq!(convert(&gmem, 0, 1, PRIVATE), busy(0));
    drop(ring);
    convert_soon(&gmem, 0, 1, PRIVATE);
}

/// A plain reference, not a pin.
#[test]
fn a_page_in_a_pipe_is_in_use() {
    let Some(vm) = in_place(name_of(a_page_in_a_pipe_is_in_use)) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    fill(&map);
    let (from, to) = pipe();
    let vector = map.iovec(8);
    // SAFETY: a page of ours.
    let spliced = unsafe { libc::vmsplice(to.as_raw_fd(), &vector, 1, 0) };
    assert_eq!(spliced, PAGE as isize);
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), busy(8 * PAGE));
    let mut bytes = [0u8; PAGE as usize];
    // SAFETY: a buffer of that size.
    let read = unsafe { libc::read(from.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
    assert_eq!((read, bytes[0]), (PAGE as isize, mark(8)));
    convert_soon(&gmem, 0, PAGES, PRIVATE);
}

/// Which is why EAGAIN must be retried before it is believed.
#[test]
fn a_thread_that_reads_is_in_the_way_for_a_moment_only() {
    let test = name_of(a_thread_that_reads_is_in_the_way_for_a_moment_only);
    let Some(vm) = in_place(test) else {
        return;
    };
    let (gmem, map) = vm.mapped(1, INIT_SHARED);
    let stop = AtomicBool::new(false);
    let mut retries = 0u32;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Through the kernel, which says EFAULT where a read would be SIGBUS.
                let _ = map.madvise(0, 1, libc::MADV_POPULATE_READ);
            }
        });
        for _ in 0..1000 {
            loop {
                match convert(&gmem, 0, 1, PRIVATE) {
                    Converted::Yes => break,
                    other => assert_eq!(other, busy(0)),
                }
                retries += 1;
            }
            assert_eq!(convert(&gmem, 0, 1, SHARED), Converted::Yes);
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{retries} retries in 1000 conversions");
}

/// While pages are faulted in, pinned and released: never private and pinned at once, which the pin shows by its bytes
/// and the kernel by a request that succeeds.
#[test]
fn pinning_and_converting_at_once_leave_one_of_them() {
    let test = name_of(pinning_and_converting_at_once_leave_one_of_them);
    let (Some(vm), Some(ring)) = (in_place(test), ring(test)) else {
        return;
    };
    let (gmem, map) = vm.mapped(1, INIT_SHARED);
    let pinned = AtomicBool::new(false);
    let stop = AtomicBool::new(false);
    let (mut converted, mut refused) = (0u32, 0u32);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                if ring.register(&[map.iovec(0)]).is_ok() {
                    pinned.store(true, Ordering::SeqCst);
                    std::thread::yield_now();
                    pinned.store(false, Ordering::SeqCst);
                    ring.unregister().unwrap();
                }
            }
        });
        for round in 0..1000 {
            // Half of the time from within the other's turn.
            while round % 2 == 0 && !pinned.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            match convert(&gmem, 0, 1, PRIVATE) {
                Converted::Yes => {
                    assert!(!pinned.load(Ordering::SeqCst), "pinned and private");
                    converted += 1;
                }
                other => {
                    assert_eq!(other, busy(0));
                    refused += 1;
                }
            }
            assert_eq!(convert(&gmem, 0, 1, SHARED), Converted::Yes);
        }
        stop.store(true, Ordering::SeqCst);
    });
    println!("{converted} converted, {refused} refused");
}

/// Whoever punches under a pin loses sight of it.
#[test]
fn a_hole_hides_a_pin() {
    let test = name_of(a_hole_hides_a_pin);
    let (Some(vm), Some(ring)) = (in_place(test), ring(test)) else {
        return;
    };
    let (gmem, map): (Gmem, Map) = vm.mapped(2, INIT_SHARED);
    map.write(1, 7);
    ring.register(&[map.iovec(1)]).unwrap();
    assert_eq!(convert(&gmem, 0, 2, PRIVATE), busy(PAGE));
    gmem.punch(1, 1).unwrap();
    assert_eq!(map.read(1), 0);
    convert_soon(&gmem, 0, 2, PRIVATE);
}

/// Converting twice over, faulting in, punching and pinning, each without regard for the others: all that is asked is
/// an answer that is in the table, and a file that is whole in the end.
#[test]
fn many_users_at_once_end_well() {
    const PAGES: u64 = 64;
    let test = name_of(many_users_at_once_end_well);
    let (Some(vm), Some(ring)) = (in_place(test), ring(test)) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for seed in [3u64, 5] {
            let (gmem, stop) = (&gmem, &stop);
            scope.spawn(move || {
                let mut state = seed;
                while !stop.load(Ordering::Relaxed) {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let first = (state >> 33) % PAGES;
                    let count = (1 + (state >> 40) % 16).min(PAGES - first);
                    let attributes = if state >> 63 == 0 { PRIVATE } else { SHARED };
                    match convert(gmem, first, count, attributes) {
                        Converted::Yes => {}
                        Converted::Failed(libc::EAGAIN, offset) => {
                            assert_eq!(attributes, PRIVATE);
                            assert!((first..first + count).contains(&(offset / PAGE)));
                        }
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = map.madvise(0, PAGES, libc::MADV_POPULATE_WRITE);
            }
        });
        for round in 0..1500 {
            let page = round * 7 % PAGES;
            if round % 3 == 0 {
                gmem.punch(page, 1).unwrap();
            }
            if ring.register(&[map.iovec(page)]).is_ok() {
                ring.unregister().unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
    fill(&map);
    convert_soon(&gmem, 0, PAGES, PRIVATE);
}
