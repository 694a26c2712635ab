// SPDX-License-Identifier: MIT OR Apache-2.0
//! What can be made, and asked for by offset and length.

use crate::sys::Vm;
use crate::{
    convert, create, huge, huge_pages, name_of, Converted, DEFAULT, HUGE, HUGETLB, INIT_SHARED,
    MMAP, NR, ORDER, PAGE, PRIVATE, SHARED,
};
use std::os::unix::fs::MetadataExt;

const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;

#[test]
fn only_a_sensible_file_can_be_made() {
    let Some((vm, pool)) = huge_pages(name_of(only_a_sensible_file_can_be_made)) else {
        return;
    };
    pool.fill(2);
    let refused = |flags, order, size| {
        let made = create(&vm, size, flags, order);
        assert_eq!(
            made.err(),
            Some(libc::EINVAL),
            "flags {flags} order {order} size {size:#x}"
        );
    };
    refused(0, ORDER, HUGE);
    refused(MMAP | INIT_SHARED, ORDER, HUGE);
    refused(HUGETLB, 0, HUGE);
    for order in [1, ORDER - 1, ORDER + 1, 30, 63, 64, 255] {
        refused(HUGETLB, order, 1 << 40);
    }
    refused(HUGETLB | INIT_SHARED, ORDER, HUGE);
    refused(MMAP | HUGETLB | INIT_SHARED, ORDER, HUGE);
    for size in [0, PAGE, HUGE - PAGE, HUGE + PAGE] {
        refused(HUGETLB, ORDER, size);
    }
    for flags in [HUGETLB, MMAP | HUGETLB] {
        drop(create(&vm, 2 * HUGE, flags, ORDER).unwrap());
    }
    pool.expect(2, 0, "all closed");
}

#[test]
fn a_vm_without_private_memory_has_no_huge_pages() {
    let test = name_of(a_vm_without_private_memory_has_no_huge_pages);
    let Some((vm, _pool)) = huge_pages(test) else {
        return;
    };
    assert_eq!(vm.extension(KVM_CAP_GUEST_MEMFD_FLAGS), 7);
    let ordinary = Vm::new(DEFAULT).unwrap();
    assert_eq!(ordinary.extension(KVM_CAP_GUEST_MEMFD_FLAGS), 3);
    let made = create(&ordinary, HUGE, HUGETLB, ORDER);
    assert_eq!(made.err(), Some(libc::EINVAL));
}

#[test]
fn the_file_says_what_it_is_made_of() {
    let Some((vm, _pool)) = huge_pages(name_of(the_file_says_what_it_is_made_of)) else {
        return;
    };
    let file = huge(&vm, 1);
    assert_eq!(file.0.metadata().unwrap().blksize(), HUGE);
    let small = vm.gmem(HUGE, MMAP).unwrap();
    assert_eq!(small.0.metadata().unwrap().blksize(), PAGE);
}

#[test]
fn memory_is_allocated_and_punched_by_whole_huge_pages() {
    let test = name_of(memory_is_allocated_and_punched_by_whole_huge_pages);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    for (first, count) in [(1, NR), (0, 1), (0, NR + 1), (NR / 2, NR), (NR - 1, 1)] {
        assert_eq!(file.allocate(first, count), Err(libc::EINVAL));
        assert_eq!(file.punch(first, count), Err(libc::EINVAL));
    }
    assert_eq!(file.allocate(NR, 2 * NR), Err(libc::EINVAL));
    pool.expect(2, 2, "nothing allocated");
    file.allocate(NR, NR).unwrap();
    // Beyond the end there is nothing to punch.
    file.punch(NR, 8 * NR).unwrap();
    pool.expect(2, 2, "punched");
}

#[test]
fn a_slot_needs_no_huge_alignment_and_a_conversion_none_either() {
    let test = name_of(a_slot_needs_no_huge_alignment_and_a_conversion_none_either);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(2);
    let file = huge(&vm, 2);
    crate::guest::slot(&vm, 0, 0x10_0000, 3, &file, 5, 0).unwrap();
    assert_eq!(convert(&file, 5, 1, SHARED), Converted::Yes);
    assert_eq!(convert(&file, NR - 1, 2, SHARED), Converted::Yes);
    assert_eq!(convert(&file, 0, 2 * NR, PRIVATE), Converted::Yes);
    let past = convert(&file, NR, NR + 1, SHARED);
    assert_eq!(past, Converted::Refused(libc::EINVAL));
}
