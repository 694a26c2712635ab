// SPDX-License-Identifier: MIT OR Apache-2.0
//! Many runs of private pages in one file. A maple tree that takes its own bookkeeping for a child when it is freed
//! panics here; the kernel frees it some time after the call, so that the next test may be the one that never ends.

use crate::{convert, in_place, name_of, Converted, INIT_SHARED, MMAP, PAGE, PRIVATE, SHARED};

/// Far more than 6,500 pages, where closing panics, and 65,536, where converting everything does.
const PAGES: u64 = 131_072;

/// Lets the kernel free what it postponed. Not a guarantee; most of the time it has.
fn let_the_kernel_free() {
    const GLOBAL: i32 = 1;
    for _ in 0..3 {
        // SAFETY: only numbers are passed.
        let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
        assert!(result == 0 || crate::sys::errno() == libc::ENOSYS);
    }
}

/// Every second page, by one request each.
fn alternate(gmem: &crate::sys::Gmem, pages: u64, attributes: u64) {
    for page in (0..pages).step_by(2) {
        assert_eq!(convert(gmem, page, 1, attributes), Converted::Yes);
    }
}

#[test]
fn files_with_many_runs_can_be_closed() {
    let Some(vm) = in_place(name_of(files_with_many_runs_can_be_closed)) else {
        return;
    };
    for pages in [6_500, 20_000, PAGES] {
        for (flags, attributes) in [(INIT_SHARED, PRIVATE), (0, SHARED)] {
            let gmem = vm.gmem(pages * PAGE, flags).unwrap();
            alternate(&gmem, pages, attributes);
            drop(gmem);
            let_the_kernel_free();
        }
    }
}

#[test]
fn many_runs_become_one() {
    let Some(vm) = in_place(name_of(many_runs_become_one)) else {
        return;
    };
    for attributes in [SHARED, PRIVATE] {
        let gmem = vm.gmem(PAGES * PAGE, MMAP | INIT_SHARED).unwrap();
        alternate(&gmem, PAGES, PRIVATE);
        assert_eq!(convert(&gmem, 0, PAGES, attributes), Converted::Yes);
        let_the_kernel_free();
        // Once more over what is left.
        alternate(&gmem, PAGES, attributes ^ PRIVATE);
        assert_eq!(
            convert(&gmem, 0, PAGES, attributes ^ PRIVATE),
            Converted::Yes
        );
        drop(gmem);
        let_the_kernel_free();
    }
}

/// Runs grow, meet, and come apart at any place: as a list of pages says.
#[test]
fn runs_meet_and_come_apart() {
    const PAGES: u64 = 600;
    let Some(vm) = in_place(name_of(runs_meet_and_come_apart)) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    let mut private = vec![false; PAGES as usize];
    // xorshift, always the same.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut below = |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    };
    for round in 0..3000 {
        let first = below(PAGES);
        // Mostly short ones, which leave many runs.
        let limit = if round % 8 == 0 { 200 } else { 4 };
        let count = (1 + below(limit)).min(PAGES - first);
        let attributes = if below(2) == 0 { PRIVATE } else { SHARED };
        assert_eq!(convert(&gmem, first, count, attributes), Converted::Yes);
        private[first as usize..(first + count) as usize].fill(attributes == PRIVATE);
        if round % 100 == 0 {
            for page in 0..PAGES {
                let readable = map.madvise(page, 1, libc::MADV_POPULATE_READ).is_ok();
                assert_eq!(readable, !private[page as usize], "{page} in round {round}");
            }
        }
    }
}
