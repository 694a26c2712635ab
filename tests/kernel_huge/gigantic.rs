// SPDX-License-Identifier: MIT OR Apache-2.0
//! The same with a page of 1 GiB, of which the machine has to have one free.

use crate::guest::{slot, Guest};
use crate::{convert, convert_all, create, huge_pages, name_of, skip, Converted};
use crate::{HUGETLB, MMAP, PAGE, PRIVATE, SHARED};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

const ORDER: u8 = 18;
const NR: u64 = 1 << ORDER;
const GPA: u64 = 4 << 30;

/// The pool of such pages: free, reserved.
fn counts() -> (u64, u64) {
    let read = |name| {
        let file = format!("/sys/kernel/mm/hugepages/hugepages-1048576kB/{name}");
        fs::read_to_string(file).map_or(0, |text| text.trim().parse().unwrap())
    };
    (read("free_hugepages"), read("resv_hugepages"))
}

#[test]
fn a_page_of_1_gib_is_split_and_put_together() {
    let test = name_of(a_page_of_1_gib_is_split_and_put_together);
    let Some((vm, _pool)) = huge_pages(test) else {
        return;
    };
    let (free, reserved) = counts();
    if free == reserved {
        return skip(test, "no free page of 1 GiB").unwrap_or_default();
    }
    let file = create(&vm, NR * PAGE, MMAP | HUGETLB, ORDER).unwrap();
    assert_eq!(counts(), (free, reserved + 1));
    assert_eq!(file.0.metadata().unwrap().blksize(), NR * PAGE);
    assert_eq!(file.punch(0, 512), Err(libc::EINVAL));
    let map = file.map(NR);
    slot(&vm, 0, GPA, NR, &file, 0, map.page(0) as u64).unwrap();
    let guest = Guest::new(&vm);
    let timed = |what: &str, job: &mut dyn FnMut()| {
        let begun = Instant::now();
        job();
        println!("{what}: {:?}", begun.elapsed());
    };
    timed("first touch", &mut || guest.fault(GPA, 1).unwrap());
    assert_eq!(counts(), (free - 1, reserved));
    assert_eq!(guest.statistic("pages_1g"), 1);

    for page in [0, 77_777, NR - 1] {
        timed("split", &mut || convert_all(&file, &[(page, 1)], SHARED));
        assert_eq!(guest.statistic("pages_1g"), 0);
        guest.fault(GPA + (page ^ 1) * PAGE, 1).unwrap();
        assert_eq!(guest.statistic("pages_4k"), 1);
        assert_eq!(map.read(page), 0);
        map.write(page, 7);
        timed("merge", &mut || convert_all(&file, &[(page, 1)], PRIVATE));
        guest.fault(GPA, NR).unwrap();
        assert_eq!(guest.statistic("pages_1g"), 1);
    }
    convert_all(&file, &[(77_777, 1)], SHARED);
    assert_eq!(map.read(77_777), 7);
    let (from, to) = crate::sys::pipe();
    // SAFETY: one element, of our own mapping.
    let spliced = unsafe { libc::vmsplice(to.as_raw_fd(), &map.iovec(77_777), 1, 0) };
    assert_eq!(spliced, 4096);
    let busy = Converted::Failed(libc::EAGAIN, 77_777);
    assert_eq!(convert(&file, 0, NR, PRIVATE), busy);
    assert_eq!(file.punch(0, NR), Err(libc::EAGAIN));
    drop((from, to));
    file.punch(0, NR).unwrap();
    assert_eq!(counts(), (free, reserved + 1));
    assert_eq!(map.read(77_777), 0);
    drop((guest, map));
    let mut file = Some(file);
    timed("close in pieces", &mut || drop(file.take()));
    assert_eq!(counts(), (free, reserved));
}
