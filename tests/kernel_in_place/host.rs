// SPDX-License-Identifier: MIT OR Apache-2.0
//! Private pages as the host sees them, and what attributes belong to: offsets, whether there is a page or not.

use crate::sys::{end_at_sigbus, errno, in_child, Map, Ring, NO_SUCH_PAGE};
use crate::{convert, in_place, name_of, Converted, INIT_SHARED, MMAP, PAGE, PRIVATE, SHARED};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

const PAGES: u64 = 8;

/// What happens to a process that touches the page: 0, or how it was ended.
fn touch(map: &Map, page: u64, write: bool) -> u8 {
    in_child(|| {
        end_at_sigbus();
        match write {
            true => map.write(page, 1),
            false => drop(map.read(page)),
        }
        0
    })
    .result()
}

fn shared(map: &Map, page: u64) -> bool {
    match touch(map, page, false) {
        0 => true,
        NO_SUCH_PAGE => false,
        other => panic!("page {page}: {other}"),
    }
}

#[test]
fn files_begin_as_they_were_made() {
    let Some(vm) = in_place(name_of(files_begin_as_they_were_made)) else {
        return;
    };
    for (flags, begins_shared) in [(0, false), (INIT_SHARED, true)] {
        let (_gmem, map) = vm.mapped(PAGES, flags);
        for page in [0, PAGES - 1] {
            assert_eq!(shared(&map, page), begins_shared, "{flags}");
        }
    }
}

#[test]
fn a_private_page_is_no_page_to_the_host() {
    let test = name_of(a_private_page_is_no_page_to_the_host);
    let Some(vm) = in_place(test) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    (0..PAGES).for_each(|page| map.write(page, 1));
    assert_eq!(convert(&gmem, 2, 1, PRIVATE), Converted::Yes);

    assert_eq!(touch(&map, 2, false), NO_SUCH_PAGE);
    assert_eq!(touch(&map, 2, true), NO_SUCH_PAGE);
    let page = map.page(2);

    let zero = File::open("/dev/zero").unwrap();
    // SAFETY: the kernel finds that it can't write there.
    let read = unsafe {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&zero);
        libc::read(fd, page.cast(), PAGE as usize)
    };
    assert_eq!((read, errno()), (-1, libc::EFAULT));

    let memory = File::open("/proc/self/mem").unwrap();
    let error = memory.read_at(&mut [0; 8], page as u64).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));

    for (first, count) in [(2, 1), (0, PAGES)] {
        let populated = map.madvise(first, count, libc::MADV_POPULATE_WRITE);
        assert_eq!(populated, Err(libc::EFAULT));
    }
    // SAFETY: in the mapping.
    let locked = unsafe { libc::mlock(page.cast(), PAGE as usize) };
    assert_eq!((locked, errno()), (-1, libc::ENOMEM));
    if let Ok(ring) = Ring::new() {
        assert_eq!(ring.register(&[map.iovec(2)]), Err(libc::EFAULT));
    }
    // Populating is a wish.
    let populated = gmem.map_with(PAGES, libc::MAP_POPULATE);
    assert!(!populated.present(2));

    assert_eq!(gmem.allocate(0, PAGES), Ok(()));
}

#[test]
fn reading_and_writing_the_file_stay_impossible() {
    let test = name_of(reading_and_writing_the_file_stay_impossible);
    let Some(vm) = in_place(test) else {
        return;
    };
    let (mut gmem, _map) = vm.mapped(PAGES, INIT_SHARED);
    assert!(gmem.0.read_at(&mut [0; 8], 0).is_err());
    assert!(gmem.0.write(&[0; 8]).is_err());
}

#[test]
fn each_page_is_tracked_by_itself() {
    let Some(vm) = in_place(name_of(each_page_is_tracked_by_itself)) else {
        return;
    };
    let (gmem, map) = vm.mapped(4, INIT_SHARED);
    for page in 0..4 {
        assert_eq!(convert(&gmem, page, 1, PRIVATE), Converted::Yes);
        for other in 0..4 {
            assert_eq!(shared(&map, other), other != page);
        }
        assert_eq!(convert(&gmem, page, 1, SHARED), Converted::Yes);
    }
}

#[test]
fn pages_that_are_not_there_convert_too() {
    let test = name_of(pages_that_are_not_there_convert_too);
    let Some(vm) = in_place(test) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, 0);
    assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
    // Some are there.
    for page in [1, 5] {
        map.write(page, 9);
    }
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), Converted::Yes);
    assert!((0..PAGES).all(|page| !shared(&map, page)));
    assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
    let bytes: Vec<u8> = (0..PAGES).map(|page| map.read(page)).collect();
    assert_eq!(bytes, [0, 9, 0, 0, 0, 9, 0, 0]);
}

#[test]
fn a_hole_keeps_the_attribute() {
    let Some(vm) = in_place(name_of(a_hole_keeps_the_attribute)) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    (0..PAGES).for_each(|page| map.write(page, 7));
    assert_eq!(convert(&gmem, 0, 4, PRIVATE), Converted::Yes);
    gmem.punch(2, 4).unwrap();
    for page in 0..PAGES {
        assert_eq!(shared(&map, page), page >= 4);
    }
    assert_eq!(convert(&gmem, 0, 4, SHARED), Converted::Yes);
    let bytes: Vec<u8> = (0..PAGES).map(|page| map.read(page)).collect();
    assert_eq!(bytes, [7, 7, 0, 0, 0, 0, 7, 7]);
}

#[test]
fn an_mmapable_file_that_begins_private_is_mapped_but_empty() {
    let test = name_of(an_mmapable_file_that_begins_private_is_mapped_but_empty);
    let Some(vm) = in_place(test) else {
        return;
    };
    let gmem = vm.gmem(PAGE, MMAP).unwrap();
    let map = gmem.map(1);
    gmem.allocate(0, 1).unwrap();
    assert!(!shared(&map, 0));
    assert_eq!(convert(&gmem, 0, 1, SHARED), Converted::Yes);
    assert_eq!(map.read(0), 0);
}
