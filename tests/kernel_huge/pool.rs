// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pool at each step: what is reserved, taken, and given back.

use crate::sys::{Ring, Vm};
use crate::{
    convert, convert_all, create, huge, huge_pages, name_of, Converted, HUGE, HUGETLB, MMAP, NR,
    ORDER, PRIVATE, SHARED, SW_PROTECTED,
};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io};

const FOLDER: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// There is one pool, so one test at a time.
static TURN: Mutex<()> = Mutex::new(());

/// The pool of 2 MiB pages, which is as before when this is dropped.
pub struct Pool {
    before: u64,
    overcommit: u64,
    _turn: MutexGuard<'static, ()>,
}

/// What the pool says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub free: u64,
    pub reserved: u64,
}

pub const fn counts(free: u64, reserved: u64) -> Counts {
    Counts { free, reserved }
}

impl Pool {
    pub fn take() -> io::Result<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let pool = Self {
            before: try_read("nr_hugepages")?,
            overcommit: try_read("nr_overcommit_hugepages")?,
            _turn: turn,
        };
        // Whether it can be changed.
        try_write("nr_hugepages", pool.before)?;
        Ok(pool)
    }

    /// Makes it have this many free pages.
    pub fn fill(&self, free: u64) {
        let used = read("nr_hugepages") - read("free_hugepages");
        try_write("nr_hugepages", used + free).unwrap();
        assert_eq!(self.counts(), counts(free, 0));
    }

    pub fn counts(&self) -> Counts {
        counts(read("free_hugepages"), read("resv_hugepages"))
    }

    pub fn expect(&self, free: u64, reserved: u64, step: &str) {
        assert_eq!(self.counts(), counts(free, reserved), "{step}");
    }

    /// Waits for what follows by itself.
    pub fn expect_soon(&self, free: u64, reserved: u64, step: &str) {
        let begun = Instant::now();
        while self.counts() != counts(free, reserved) && begun.elapsed() < Duration::from_secs(10) {
            std::thread::yield_now();
        }
        println!("{step}: after {:?}", begun.elapsed());
        self.expect(free, reserved, step);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // A failed test may be unwinding.
        let _ = try_write("nr_overcommit_hugepages", self.overcommit);
        let _ = try_write("nr_hugepages", self.before);
    }
}

fn read(name: &str) -> u64 {
    try_read(name).unwrap()
}

fn try_read(name: &str) -> io::Result<u64> {
    let text = fs::read_to_string(format!("{FOLDER}/{name}"))?;
    Ok(text.trim().parse().unwrap())
}

fn try_write(name: &str, value: u64) -> io::Result<()> {
    fs::write(format!("{FOLDER}/{name}"), value.to_string())
}

/// A counter of /proc/vmstat.
pub fn vmstat(name: &str) -> i64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap().parse().unwrap()
}

#[test]
fn all_of_a_file_is_reserved_when_it_is_made() {
    let test = name_of(all_of_a_file_is_reserved_when_it_is_made);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(4);
    let file = huge(&vm, 3);
    pool.expect(4, 3, "made");
    assert_eq!(
        create(&vm, 2 * HUGE, HUGETLB, ORDER).err(),
        Some(libc::ENOMEM)
    );
    let one = huge(&vm, 1);
    pool.expect(4, 4, "another");
    assert_eq!(create(&vm, HUGE, HUGETLB, ORDER).err(), Some(libc::ENOMEM));
    drop(one);
    drop(file);
    pool.expect(4, 0, "closed");

    // Surplus pages are for others.
    try_write("nr_overcommit_hugepages", 8).unwrap();
    assert_eq!(
        create(&vm, 5 * HUGE, HUGETLB, ORDER).err(),
        Some(libc::ENOMEM)
    );
    assert_eq!(read("surplus_hugepages"), 0);
}

#[test]
fn pages_come_from_the_reservation_and_go_back_to_it() {
    let test = name_of(pages_come_from_the_reservation_and_go_back_to_it);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(4);
    let file = huge(&vm, 3);
    let hugetlb = vmstat("nr_hugetlb");
    file.allocate(0, NR).unwrap();
    pool.expect(3, 2, "one allocated");
    file.allocate(0, 3 * NR).unwrap();
    pool.expect(1, 0, "all allocated");
    assert_eq!(vmstat("nr_hugetlb"), hugetlb + 3 * NR as i64);
    file.punch(NR, NR).unwrap();
    pool.expect(2, 1, "one punched");
    file.punch(NR, NR).unwrap();
    pool.expect(2, 1, "punched again");
    file.punch(0, 3 * NR).unwrap();
    pool.expect(4, 3, "all punched");
    assert_eq!(vmstat("nr_hugetlb"), hugetlb);
    drop(file);
    pool.expect(4, 0, "closed");
}

#[test]
fn the_first_touch_of_a_shared_page_takes_a_huge_page() {
    let test = name_of(the_first_touch_of_a_shared_page_takes_a_huge_page);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(4);
    let file = huge(&vm, 2);
    let map = file.map(2 * NR);
    let cached = vmstat("nr_file_pages");
    convert_all(&file, &[(3, 1), (NR + 5, 2)], SHARED);
    pool.expect(4, 2, "nothing touched");
    assert_eq!(map.read(3), 0);
    pool.expect(3, 1, "one touched");
    // In pieces, it is in the page cache as others are.
    assert!(vmstat("nr_file_pages") - cached >= NR as i64 - 64);
    map.write(NR + 6, 1);
    assert_eq!(map.read(NR + 5), 0);
    pool.expect(2, 0, "both touched");
    assert_eq!(map.count_present(), 3);
    drop(map);
    drop(file);
    pool.expect(4, 0, "closed in pieces");
    assert!((vmstat("nr_file_pages") - cached).abs() < 64);
}

#[test]
fn a_punched_page_comes_back_zeroed_and_as_private_as_it_was() {
    let test = name_of(a_punched_page_comes_back_zeroed_and_as_private_as_it_was);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    let map = file.map(2 * NR);
    convert_all(&file, &[(0, 2 * NR)], SHARED);
    (0..2 * NR).for_each(|page| map.write(page, 7));
    pool.expect(0, 0, "all written");
    file.punch(0, NR).unwrap();
    pool.expect(1, 1, "half punched");
    assert_eq!(map.count_present(), NR);
    assert!((0..NR).all(|page| map.read(page) == 0));
    assert!((NR..2 * NR).all(|page| map.read(page) == 7));
    convert_all(&file, &[(0, NR)], PRIVATE);
    file.punch(0, NR).unwrap();
    assert_eq!(convert(&file, 0, NR, PRIVATE), Converted::Yes);
    convert_all(&file, &[(0, NR)], SHARED);
    assert_eq!(map.read(NR - 1), 0);
}

#[test]
fn a_page_in_use_by_others_can_not_be_punched() {
    let test = name_of(a_page_in_use_by_others_can_not_be_punched);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(3);
    let file = huge(&vm, 3);
    let map = file.map(3 * NR);
    convert_all(&file, &[(NR + 9, 1)], SHARED);
    file.allocate(0, 3 * NR).unwrap();
    map.write(NR + 9, 0x99);
    let ring = Ring::new().unwrap();
    ring.register(&[map.iovec(NR + 9)]).unwrap();
    assert_eq!(file.punch(NR, NR), Err(libc::EAGAIN));
    assert_eq!(map.read(NR + 9), 0x99);
    // One by one: what came before it is done.
    assert_eq!(file.punch(0, 3 * NR), Err(libc::EAGAIN));
    pool.expect(1, 1, "the first punched");
    ring.unregister().unwrap();
    file.punch(0, 3 * NR).unwrap();
    pool.expect(3, 3, "all punched");
}

/// Nothing of it is used for anything else while a device may write there.
#[test]
fn a_closed_file_gives_back_a_pinned_page_when_the_pin_goes() {
    let test = name_of(a_closed_file_gives_back_a_pinned_page_when_the_pin_goes);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(4);
    let ring = Ring::new().unwrap();
    {
        let file = huge(&vm, 3);
        let map = file.map(3 * NR);
        convert_all(&file, &[(NR, 8)], SHARED);
        file.allocate(0, 3 * NR).unwrap();
        map.write(NR + 2, 1);
        ring.register(&[map.iovec(NR + 2)]).unwrap();
    }
    pool.expect(3, 0, "closed with a pin");
    {
        let file = huge(&vm, 3);
        file.allocate(0, 3 * NR).unwrap();
        pool.expect(0, 0, "the others used again");
    }
    ring.unregister().unwrap();
    pool.expect_soon(4, 0, "unpinned");
    let file = huge(&vm, 4);
    file.allocate(0, 4 * NR).unwrap();
    let map = file.map(4 * NR);
    convert_all(&file, &[(0, 4 * NR)], SHARED);
    assert!((0..4 * NR).all(|page| map.read(page) == 0));
}

#[test]
fn a_killed_owner_returns_its_pages_at_once() {
    let test = name_of(a_killed_owner_returns_its_pages_at_once);
    let Some((_vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(4);
    let status = status_of(|| {
        let vm = Vm::new(SW_PROTECTED).unwrap();
        let file = create(&vm, 4 * HUGE, MMAP | HUGETLB, ORDER).unwrap();
        let map = file.map(4 * NR);
        // One in pieces, two whole, one only reserved.
        convert_all(&file, &[(5, 1)], SHARED);
        file.allocate(0, 3 * NR).unwrap();
        map.write(5, 1);
        pool.expect(1, 1, "before the end");
        // SAFETY: ends this process.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    });
    assert!(libc::WIFSIGNALED(status), "wait status {status:#x}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGKILL);
    pool.expect(4, 0, "killed");
}

/// Runs `job` in a child process, and waits for how that ended.
fn status_of(job: impl FnOnce()) -> i32 {
    // SAFETY: the child only runs `job` and leaves.
    match unsafe { libc::fork() } {
        0 => {
            job();
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(0) }
        }
        -1 => panic!("fork: {}", io::Error::last_os_error()),
        pid => {
            let mut status = 0;
            // SAFETY: a child of ours that nobody else waits for.
            assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
            status
        }
    }
}
