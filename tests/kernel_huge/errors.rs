// SPDX-License-Identifier: MIT OR Apache-2.0
//! No memory for the pieces, and memory that fails.

use crate::guest::{mapped, slot, Guest};
use crate::pool::vmstat;
use crate::sys::Map;
use crate::{
    convert, convert_all, huge, huge_pages, name_of, skip, Converted, NR, PRIVATE, SHARED,
};
use std::os::unix::fs::FileExt;
use std::{fs, io};

/// Failing slab allocations below one function of the kernel, in this thread; all of this thread's where the kernel can't
/// tell. Opening a file would be one, so the switch is open already.
struct Failing {
    switch: fs::File,
}

const FAILSLAB: &str = "/sys/kernel/debug/failslab";

impl Failing {
    /// All but the first `spared` bytes' worth of `function`'s.
    fn below(function: &str, spared: u64) -> io::Result<Self> {
        let symbols = fs::read_to_string("/proc/kallsyms")?;
        let mut addresses = symbols.lines().filter_map(|line| {
            let (address, rest) = line.split_once(' ')?;
            Some((u64::from_str_radix(address, 16).ok()?, rest.get(2..)?))
        });
        let Some((start, _)) = addresses.find(|(_, name)| *name == function) else {
            return Err(io::Error::other(format!("no {function} in the kernel")));
        };
        // What follows, from which a bound for the function's end can be told.
        let end = addresses
            .map(|(address, _)| address)
            .filter(|address| *address > start)
            .min()
            .unwrap_or(start + 4096);
        let switch = fs::File::options()
            .write(true)
            .open("/proc/thread-self/make-it-fail")?;
        let this = Self { switch };
        for (name, value) in [
            ("ignore-gfp-wait", "N".to_owned()),
            ("require-start", format!("{start:#x}")),
            ("require-end", format!("{end:#x}")),
            ("stacktrace-depth", "24".into()),
            ("task-filter", "Y".into()),
            ("verbose", "0".into()),
            ("interval", "1".into()),
            ("times", "-1".into()),
            ("space", spared.to_string()),
            ("probability", "100".into()),
        ] {
            let file = format!("{FAILSLAB}/{name}");
            let of_stack = ["require-start", "require-end", "stacktrace-depth"].contains(&name);
            if of_stack && !fs::exists(&file)? {
                continue;
            }
            fs::write(&file, value)
                .map_err(|error| io::Error::other(format!("{file}: {error}")))?;
        }
        this.switch.write_all_at(b"1", 0)?;
        Ok(this)
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        let _ = self.switch.write_all_at(b"0", 0);
        for (name, value) in [
            ("probability", "0"),
            ("space", "0"),
            ("task-filter", "N"),
            ("require-start", "0"),
            ("require-end", "0xffffffffffffffff"),
            ("ignore-gfp-wait", "Y"),
        ] {
            let _ = fs::write(format!("{FAILSLAB}/{name}"), value);
        }
    }
}

#[test]
fn a_huge_page_that_can_not_be_split_stays_as_it_was() {
    let test = name_of(a_huge_page_that_can_not_be_split_stays_as_it_was);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(3);
    let file = huge(&vm, 3);
    let map = file.map(3 * NR);
    let guest = Guest::new(&vm);
    slot(&vm, 0, 1 << 30, 3 * NR, &file, 0, map.page(0) as u64).unwrap();
    convert_all(&file, &[(0, 3 * NR)], SHARED);
    (0..3 * NR).for_each(|page| map.write(page, page as u8 | 1));
    convert_all(&file, &[(0, 3 * NR)], PRIVATE);
    let cached = vmstat("nr_file_pages");
    let mut failed = 0;
    // With ever more memory, until it is enough for the first huge page, and for the second.
    for spared in (0..200).map(|nodes| nodes * 576) {
        let failing = match Failing::below("hugetlb_pieces_split", spared) {
            Ok(failing) => failing,
            Err(error) => return skip(test, error).unwrap_or_default(),
        };
        let converted = convert(&file, 3, 3 * NR - 6, SHARED);
        drop(failing);
        let first = match converted {
            Converted::Yes => break,
            // Where it stopped: in a huge page that was not split.
            Converted::Failed(libc::ENOMEM, first) => first,
            other => panic!("{other:?}"),
        };
        assert!([3, NR, 2 * NR].contains(&first), "{first}");
        failed += 1;
        // What came before is shared, the rest as before.
        guest.fault(1 << 30, 3 * NR).unwrap();
        let whole = 3 - first / NR;
        assert_eq!(guest.mapped(), mapped(whole, (3 - whole) * NR));
        if first > 3 {
            assert_eq!(map.read(first - 1), (first - 1) as u8 | 1);
        } else {
            assert!((vmstat("nr_file_pages") - cached).abs() < 64);
        }
        convert_all(&file, &[(0, 3 * NR)], PRIVATE);
    }
    println!("failed {failed} times");
    assert!(failed > 2, "{failed} failures");
    convert_all(&file, &[(0, 3 * NR)], SHARED);
    assert!((0..3 * NR).all(|page| map.read(page) == page as u8 | 1));
    pool.expect(0, 0, "all in use");
}

/// A fault that can't have the pieces leaves the pool as it was.
#[test]
fn a_first_touch_without_memory_takes_nothing() {
    let test = name_of(a_first_touch_without_memory_takes_nothing);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    convert_all(&file, &[(3, 1)], SHARED);
    for spared in [0, 576, 1152] {
        let failing = match Failing::below("hugetlb_pieces_split", spared) {
            Ok(failing) => failing,
            Err(error) => return skip(test, error).unwrap_or_default(),
        };
        let allocated = file.allocate(0, NR);
        drop(failing);
        assert_eq!(allocated, Err(libc::ENOMEM));
        pool.expect(2, 2, "failed");
    }
    file.allocate(0, NR).unwrap();
    pool.expect(1, 1, "allocated");
}

/// The frame behind a page that this process has mapped.
fn frame(map: &Map, page: u64) -> u64 {
    let pagemap = fs::File::open("/proc/self/pagemap").unwrap();
    let mut entry = [0; 8];
    map.read(page);
    pagemap
        .read_exact_at(&mut entry, map.page(page) as u64 / 4096 * 8)
        .unwrap();
    u64::from_ne_bytes(entry) & ((1 << 55) - 1)
}

/// As hardware would report it. The huge page is lost for this machine with that: what is done about an error in a page
/// cache that nobody wrote for it can't be undone.
fn poison(frame: u64) -> io::Result<()> {
    fs::write("/sys/kernel/debug/hwpoison/corrupt-pfn", frame.to_string())
}

#[test]
fn a_memory_error_in_a_piece_takes_that_piece() {
    let test = name_of(a_memory_error_in_a_piece_takes_that_piece);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    let map = file.map(2 * NR);
    let guest = Guest::new(&vm);
    slot(&vm, 0, 1 << 30, 2 * NR, &file, 0, map.page(0) as u64).unwrap();
    convert_all(&file, &[(0, 8)], SHARED);
    let bad = frame(&map, 5);
    convert_all(&file, &[(5, 1)], PRIVATE);
    guest.fault(1 << 30, NR).unwrap();
    // What is done is told by the kernel's log; the answer is that the page could not be freed.
    let answer = poison(bad);
    println!("told of page 5: {answer:?}");
    let gpa = (1 << 30) + 5 * 4096;
    assert_eq!(guest.fault(gpa, 1), Err(libc::EHWPOISON));
    guest.fault(1 << 30, 5).unwrap();
    guest.fault(gpa + 4096, NR - 6).unwrap();
    // With the bad one, nothing turns private that was not; without it all of it, and stays in pieces.
    let busy = Converted::Failed(libc::EAGAIN, 5);
    assert_eq!(convert(&file, 0, 8, PRIVATE), busy);
    convert_all(&file, &[(0, 5), (6, 2)], PRIVATE);
    assert_eq!(guest.fault(gpa, 1), Err(libc::EHWPOISON));
    guest.fault(gpa + 4096, 1).unwrap();
    assert_eq!(guest.mapped().huge, 0);
    drop((guest, map, file));
    pool.expect(1, 0, "closed");
}

#[test]
fn a_huge_page_with_a_memory_error_can_be_replaced_and_is_never_used_again() {
    let test = name_of(a_huge_page_with_a_memory_error_can_be_replaced_and_is_never_used_again);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    let map = file.map(2 * NR);
    convert_all(&file, &[(0, 8)], SHARED);
    map.write(4, 4);
    println!("told of page 5: {:?}", poison(frame(&map, 5)));
    // One that is left is still there.
    assert_eq!(map.read(4), 4);
    file.punch(0, NR).unwrap();
    pool.expect(1, 1, "the bad one is gone");
    file.allocate(NR, NR).unwrap();
    assert_eq!(file.allocate(0, NR), Err(libc::ENOSPC));
    pool.fill(1);
    file.allocate(0, NR).unwrap();
    assert_eq!(map.read(4), 0);
    assert_eq!(map.read(5), 0);
    pool.expect(0, 0, "replaced");
    drop((map, file));
    pool.expect(2, 0, "closed");
}

#[test]
fn a_memory_error_in_a_whole_huge_page_takes_all_of_it() {
    let test = name_of(a_memory_error_in_a_whole_huge_page_takes_all_of_it);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    let map = file.map(2 * NR);
    let guest = Guest::new(&vm);
    slot(&vm, 0, 1 << 30, 2 * NR, &file, 0, map.page(0) as u64).unwrap();
    convert_all(&file, &[(0, 8)], SHARED);
    let bad = frame(&map, 5);
    convert_all(&file, &[(0, 8)], PRIVATE);
    guest.fault(1 << 30, 2 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(2, 0));
    let answer = poison(bad);
    println!("told of page 5: {answer:?}");
    assert_eq!(guest.mapped(), mapped(1, 0));
    assert_eq!(guest.fault(1 << 30, 1), Err(libc::EHWPOISON));
    guest.fault((1 << 30) + NR * 4096, NR).unwrap();
    // It can't be taken apart either.
    assert_eq!(
        convert(&file, NR - 1, 2, SHARED),
        Converted::Failed(libc::EHWPOISON, NR - 1)
    );
    drop((guest, map, file));
    pool.expect(1, 0, "closed");
}
