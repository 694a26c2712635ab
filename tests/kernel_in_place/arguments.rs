// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a request may say. A refused one is not written to.

use crate::sys::{in_child, ioctl_number, Attributes2, Gmem, Ring, Vm, KVM_SET_MEMORY_ATTRIBUTES2};
use crate::{
    busy, convert, in_place, name_of, skip, Converted, DEFAULT, INIT_SHARED, MMAP, PAGE, PRIVATE,
    SHARED, UNTOUCHED,
};
use std::fs;

const PAGES: u64 = 16;

fn fine() -> Attributes2 {
    Attributes2 {
        offset: 0,
        size: PAGE,
        attributes: PRIVATE,
        error_offset: UNTOUCHED,
        ..Default::default()
    }
}

fn refused(gmem: &Gmem, what: &str, request: Attributes2) {
    let mut passed = request;
    let result = gmem.set_attributes(&mut passed);
    assert_eq!(result, Err(libc::EINVAL), "{what}");
    assert_eq!(passed, request, "{what}");
}

#[test]
fn what_is_not_defined_is_refused() {
    let Some(vm) = in_place(name_of(what_is_not_defined_is_refused)) else {
        return;
    };
    let (gmem, _map) = vm.mapped(PAGES, INIT_SHARED);
    let end = PAGES * PAGE;
    let edit = |what, edit: &dyn Fn(&mut Attributes2)| {
        let mut request = fine();
        edit(&mut request);
        refused(&gmem, what, request);
    };
    for bit in 0..64 {
        edit("a flag", &|r| r.flags = 1 << bit);
        if 1 << bit != PRIVATE {
            edit("another attribute", &|r| r.attributes = 1 << bit);
            edit("one more attribute", &|r| r.attributes = PRIVATE | 1 << bit);
        }
    }
    for word in 0..11 {
        edit("a reserved word", &|r| r.reserved[word] = 1);
        edit("a reserved word", &|r| r.reserved[word] = 1 << 63);
    }
    edit("no size", &|r| r.size = 0);
    edit("half a page", &|r| r.size = PAGE / 2);
    edit("a page and a byte", &|r| r.size = PAGE + 1);
    edit("an offset inside a page", &|r| r.offset = 1);
    edit("wraps around", &|r| {
        (r.offset, r.size) = (PAGE, !(PAGE - 1))
    });
    edit("wraps around to 0", &|r| {
        (r.offset, r.size) = (!(PAGE - 1), PAGE)
    });
    edit("begins at the end", &|r| r.offset = end);
    edit("ends behind the end", &|r| r.offset = end - PAGE / 2);
    edit("one page too long", &|r| r.size = end + PAGE);
    edit("far behind the end", &|r| r.offset = 1 << 62);

    // And nothing of it has happened.
    assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
}

#[test]
fn a_vm_without_private_memory_is_refused() {
    if in_place(name_of(a_vm_without_private_memory_is_refused)).is_none() {
        return;
    }
    let vm = Vm::new(DEFAULT).unwrap();
    let (gmem, _map) = vm.mapped(PAGES, INIT_SHARED);
    for attributes in [SHARED, PRIVATE] {
        let request = Attributes2 {
            attributes,
            ..fine()
        };
        refused(&gmem, "the VM's type", request);
    }
}

#[test]
fn bad_pointers_are_found() {
    let Some(vm) = in_place(name_of(bad_pointers_are_found)) else {
        return;
    };
    let gmem = vm.gmem(PAGE, 0).unwrap();
    for pointer in [0, 8, u64::MAX - 7] {
        let result = ioctl_number(gmem.fd(), KVM_SET_MEMORY_ATTRIBUTES2, pointer);
        assert_eq!(result, Err(libc::EFAULT), "{pointer:#x}");
    }
}

/// The caller then knows only that the request failed: EFAULT hides the other errno.
#[test]
fn an_error_offset_that_cannot_be_written_is_a_bad_pointer() {
    let test = name_of(an_error_offset_that_cannot_be_written_is_a_bad_pointer);
    let Some(vm) = in_place(test) else {
        return;
    };
    let ring = match Ring::new() {
        Ok(ring) => ring,
        Err(error) => return skip(test, format_args!("io_uring: {error}")).unwrap_or(()),
    };
    let (gmem, map) = vm.mapped(1, INIT_SHARED);
    ring.register(&[map.iovec(0)]).unwrap();
    let request = fine();
    let page = vm.mapped(1, INIT_SHARED).1;
    // SAFETY: a page of ours, written before it is made read-only.
    unsafe {
        page.page(0).cast::<Attributes2>().write(request);
        assert_eq!(
            libc::mprotect(page.page(0).cast(), PAGE as usize, libc::PROT_READ),
            0
        );
    }
    let result = ioctl_number(gmem.fd(), KVM_SET_MEMORY_ATTRIBUTES2, page.page(0) as u64);
    assert_eq!(result, Err(libc::EFAULT));
    // What succeeds has nothing to write.
    ring.unregister().unwrap();
    let result = ioctl_number(gmem.fd(), KVM_SET_MEMORY_ATTRIBUTES2, page.page(0) as u64);
    assert_eq!(result, Ok(0));
}

/// Not even references matter: what is so already is left alone.
#[test]
fn what_is_so_already_succeeds_at_once() {
    let test = name_of(what_is_so_already_succeeds_at_once);
    let Some(vm) = in_place(test) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    (0..PAGES).for_each(|page| map.write(page, 1));
    let ring = Ring::new().ok();
    if let Some(ring) = &ring {
        let all: Vec<_> = (0..PAGES).map(|page| map.iovec(page)).collect();
        ring.register(&all).unwrap();
    }
    assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
    assert_eq!(convert(&gmem, 3, 5, SHARED), Converted::Yes);
    assert_eq!(map.count_present(), PAGES);
    if ring.is_some() {
        assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), busy(0));
    }

    let gmem = vm.gmem(PAGES * PAGE, MMAP).unwrap();
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), Converted::Yes);
    assert_eq!(convert(&gmem, PAGES - 1, 1, PRIVATE), Converted::Yes);
}

#[test]
fn a_file_without_mapping_converts_too() {
    let Some(vm) = in_place(name_of(a_file_without_mapping_converts_too)) else {
        return;
    };
    let gmem = vm.gmem(PAGES * PAGE, 0).unwrap();
    for attributes in [SHARED, PRIVATE, PRIVATE] {
        assert_eq!(convert(&gmem, 0, PAGES, attributes), Converted::Yes);
    }
    gmem.allocate(0, PAGES).unwrap();
    for attributes in [SHARED, PRIVATE] {
        assert_eq!(convert(&gmem, 2, 7, attributes), Converted::Yes);
    }
}

/// KVM's other requests are bound to the process that made the VM, and this one isn't.
#[test]
fn any_holder_of_the_file_converts() {
    let Some(vm) = in_place(name_of(any_holder_of_the_file_converts)) else {
        return;
    };
    let gmem = vm.gmem(PAGE, 0).unwrap();
    let child = in_child(|| match convert(&gmem, 0, 1, SHARED) {
        Converted::Yes => 0,
        _ => 1,
    });
    assert_eq!(child.result(), 0);
    // The file keeps the VM alive.
    drop(vm);
    assert_eq!(convert(&gmem, 0, 1, PRIVATE), Converted::Yes);
}

/// Each allocation of a conversion fails in turn, and what was shared before is so still.
#[test]
fn no_memory_is_said_with_the_offset_of_the_request() {
    let test = name_of(no_memory_is_said_with_the_offset_of_the_request);
    let Some(vm) = in_place(test) else {
        return;
    };
    for (file, value) in [("ignore-gfp-wait", "N"), ("verbose", "0")] {
        let path = format!("/sys/kernel/debug/failslab/{file}");
        if let Err(error) = fs::write(&path, value) {
            return skip(test, format_args!("{path}: {error}")).unwrap_or(());
        }
    }
    let fail_nth = |number: u32| fs::write("/proc/thread-self/fail-nth", number.to_string());
    let mut refusals = 0;
    let (gmem, map) = vm.mapped(4 * PAGES, INIT_SHARED);
    for first in (1..4 * PAGES).step_by(2) {
        for attributes in [PRIVATE, SHARED, PRIVATE] {
            for number in 1.. {
                fail_nth(number).unwrap();
                let result = convert(&gmem, first, 1, attributes);
                let left = fs::read_to_string("/proc/thread-self/fail-nth");
                fail_nth(0).unwrap();
                match result {
                    Converted::Yes => break,
                    _ => assert_eq!(result, Converted::Failed(libc::ENOMEM, first * PAGE)),
                }
                assert_eq!(left.unwrap().trim(), "0");
                refusals += 1;
                if attributes == PRIVATE {
                    map.write(first, 1);
                }
            }
        }
    }
    let _ = fs::write("/sys/kernel/debug/failslab/ignore-gfp-wait", "Y");
    assert!(refusals > 0, "no allocation failed");
    println!("{refusals} conversions without memory");
}
