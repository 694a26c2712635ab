// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a kernel with in-place conversion does, row by row: the rules that the library is written to, asked of the
//! kernel alone. Nothing of the library is used, so that a failure here is the kernel's.
//!
//! Each module is a table: how to find out, arguments, references, private pages seen from the host, from the guest,
//! and devices. Needs nothing but the kernel at run time, and root for some rows.

mod arguments;
mod clock;
#[path = "../common/mod.rs"]
mod common;
mod devices;
mod direct_map;
mod guest;
mod host;
mod maple;
mod probing;
mod references;
mod runs;
mod sys;

use common::skipped;
use std::fmt::Display;
use sys::{Attributes2, Gmem, Vm};

const PAGE: u64 = 4096;

/// KVM_MEMORY_ATTRIBUTE_PRIVATE
const PRIVATE: u64 = 1 << 3;
const SHARED: u64 = 0;

/// Flags of KVM_CREATE_GUEST_MEMFD.
const MMAP: u64 = 1;
const INIT_SHARED: u64 = 1 << 1;

/// VM types.
const DEFAULT: u64 = 0;
const SW_PROTECTED: u64 = 1;

/// Nothing that the kernel would write to `error_offset`.
const UNTOUCHED: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// How a conversion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Converted {
    Yes,
    /// This errno, and `error_offset` as it was.
    Refused(i32),
    /// This errno, and the byte offset that the kernel wrote.
    Failed(i32, u64),
}

/// Some busy page, whose offset this is.
const fn busy(offset: u64) -> Converted {
    Converted::Failed(libc::EAGAIN, offset)
}

/// Asks for pages `[first, first + count)` once.
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
        (Err(errno), offset) => Converted::Failed(errno, offset),
        (Ok(()), offset) => panic!("0, and error_offset {offset:#x} all the same"),
    }
}

/// Asks until no reference is in the way, which for one that is on its way out takes a moment.
fn convert_soon(gmem: &Gmem, first: u64, count: u64, attributes: u64) {
    let begun = std::time::Instant::now();
    loop {
        match convert(gmem, first, count, attributes) {
            Converted::Yes => return,
            Converted::Failed(libc::EAGAIN, _) if begun.elapsed().as_secs() < 10 => {
                std::thread::yield_now();
            }
            other => panic!("{other:?} after {:?}", begun.elapsed()),
        }
    }
}

/// A VM with private memory on a kernel that converts in place, or a printed reason.
fn in_place(test: &str) -> Option<Vm> {
    let vm = confidential(test)?;
    match probe(&vm) {
        Converted::Yes => Some(vm),
        Converted::Refused(libc::ENOTTY) => skip(test, "this kernel does not convert in place"),
        other => panic!("a conversion that changes nothing: {other:?}"),
    }
}

/// A VM with private memory on a kernel that does not.
fn split(test: &str) -> Option<Vm> {
    let vm = confidential(test)?;
    match probe(&vm) {
        Converted::Yes => skip(test, "this kernel converts in place"),
        Converted::Refused(libc::ENOTTY) => Some(vm),
        other => panic!("a conversion that changes nothing: {other:?}"),
    }
}

/// Converts a private page of a file of its own to private.
fn probe(vm: &Vm) -> Converted {
    convert(&vm.gmem(PAGE, 0).unwrap(), 0, 1, PRIVATE)
}

fn confidential(test: &str) -> Option<Vm> {
    match Vm::new(SW_PROTECTED) {
        Ok(vm) => Some(vm),
        Err(error) => skip(test, format_args!("no SW_PROTECTED VM: {error}")),
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
