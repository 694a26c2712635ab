// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a kernel does that makes guest_memfd of the hugetlb pool's huge pages, row by row: the rules that the library is
//! written to, asked of the kernel alone. Nothing of the library is used, so that a failure here is the kernel's.
//!
//! Pages of 2 MiB. Needs root: each test fills the pool anew and leaves it as it was.

#[path = "../common/mod.rs"]
mod common;
mod creation;
mod errors;
mod forms;
mod gigantic;
mod guest;
mod pool;
#[allow(dead_code)]
#[path = "../kernel_in_place/sys.rs"]
mod sys;

use common::skipped;
use pool::Pool;
use std::fmt::Display;
use std::os::fd::FromRawFd;
use sys::{ioctl, Attributes2, Gmem, Vm, KVM_CREATE_GUEST_MEMFD};

const PAGE: u64 = 4096;
/// Base pages in a huge page, and log2 of it.
const NR: u64 = 512;
const ORDER: u8 = 9;
const HUGE: u64 = NR * PAGE;

const PRIVATE: u64 = 1 << 3;
const SHARED: u64 = 0;

/// Flags of KVM_CREATE_GUEST_MEMFD.
const MMAP: u64 = 1;
const INIT_SHARED: u64 = 1 << 1;
const HUGETLB: u64 = 1 << 2;

/// VM types.
const DEFAULT: u64 = 0;
const SW_PROTECTED: u64 = 1;

/// Nothing that the kernel would write to `error_offset`.
const UNTOUCHED: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// `struct kvm_create_guest_memfd`, as it is where there are huge pages.
#[repr(C)]
#[derive(Default)]
struct Create {
    size: u64,
    flags: u64,
    page_order: u8,
    reserve8: u8,
    reserve16: u16,
    reserve32: u32,
    reserved: [u64; 5],
}

fn create(vm: &Vm, size: u64, flags: u64, page_order: u8) -> Result<Gmem, i32> {
    let mut request = Create {
        size,
        flags,
        page_order,
        ..Default::default()
    };
    let fd = ioctl(vm.fd(), KVM_CREATE_GUEST_MEMFD, &mut request)?;
    // SAFETY: the kernel just gave this number to us.
    Ok(Gmem(unsafe { FromRawFd::from_raw_fd(fd) }))
}

/// A file of `count` huge pages that can be mapped. All of it is private.
fn huge(vm: &Vm, count: u64) -> Gmem {
    create(vm, count * HUGE, MMAP | HUGETLB, ORDER).unwrap()
}

/// How a conversion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Converted {
    Yes,
    /// This errno, and `error_offset` as it was.
    Refused(i32),
    /// This errno, and the base page of the byte offset that the kernel wrote.
    Failed(i32, u64),
}

/// Asks once for base pages `[first, first + count)`.
fn convert(gmem: &Gmem, first: u64, count: u64, attributes: u64) -> Converted {
    let mut request = Attributes2 {
        offset: first * PAGE,
        size: count * PAGE,
        attributes,
        error_offset: UNTOUCHED,
        ..Default::default()
    };
    match (gmem.set_attributes(&mut request), request.error_offset) {
        (Ok(()), UNTOUCHED) => Converted::Yes,
        (Err(errno), UNTOUCHED) => Converted::Refused(errno),
        (Err(errno), offset) => Converted::Failed(errno, offset / PAGE),
        (Ok(()), offset) => panic!("0, and error_offset {offset:#x} all the same"),
    }
}

fn convert_all(gmem: &Gmem, ranges: &[(u64, u64)], attributes: u64) {
    for &(first, count) in ranges {
        let converted = convert(gmem, first, count, attributes);
        assert_eq!(converted, Converted::Yes, "{count} pages from {first}");
    }
}

/// A VM and an empty pool to fill, or a printed reason.
fn huge_pages(test: &str) -> Option<(Vm, Pool)> {
    let vm = match Vm::new(SW_PROTECTED) {
        Ok(vm) => vm,
        Err(error) => return skip(test, format_args!("no SW_PROTECTED VM: {error}")),
    };
    let small = vm.gmem(PAGE, 0).unwrap();
    if convert(&small, 0, 1, PRIVATE) == Converted::Refused(libc::ENOTTY) {
        return skip(test, "this kernel does not convert in place");
    }
    let pool = match Pool::take() {
        Ok(pool) => pool,
        Err(error) => return skip(test, format_args!("no pool of huge pages: {error}")),
    };
    pool.fill(1);
    match create(&vm, HUGE, HUGETLB, ORDER) {
        Ok(_) => Some((vm, pool)),
        Err(libc::EINVAL) => skip(test, "this kernel has no huge pages in guest_memfd"),
        Err(errno) => panic!("a file of one huge page: errno {errno}"),
    }
}

fn skip<T>(test: &str, reason: impl Display) -> Option<T> {
    skipped(test, reason);
    None
}

/// The name that libtest gives a test.
fn name_of<T>(_: T) -> &'static str {
    let path = std::any::type_name::<T>();
    path.split_once("::").map_or(path, |(_, name)| name)
}
