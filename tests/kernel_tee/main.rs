// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the lab's kernel answers who launches an SNP or a TDX guest without such silicon, row by row: the order of the
//! commands, each errno, the first pages, a guest's requests and its implicit conversions. Nothing of the library is used.
//!
//! Each module is a table. Needs root, and a kernel with `kvm.lab_tee`; says so where there is none. Programs of one test at a
//! time: the parameters are the kernel's.

mod calls;
#[path = "../common/mod.rs"]
mod common;
mod guest;
mod lab;
mod offers;
mod snp;
#[allow(dead_code)]
#[path = "../kernel_in_place/sys.rs"]
mod sys;
mod tdx;
mod view;

const PAGE: u64 = 4096;

/// KVM_MEMORY_ATTRIBUTE_PRIVATE
const PRIVATE: u64 = 1 << 3;

/// Flag of KVM_CREATE_GUEST_MEMFD.
const MMAP: u64 = 1;

/// VM types.
const SW_PROTECTED: u64 = 1;
const SNP: u64 = 4;
const TDX: u64 = 5;

/// An address that is in nobody's memory, for the kernel to find bad.
const NOWHERE: u64 = 0x6000_0000_0000;

/// The name of a test, for its reason not to run.
fn name_of<T>(_: T) -> &'static str {
    let name = std::any::type_name::<T>();
    name.split_once("::").map_or(name, |(_, rest)| rest)
}
