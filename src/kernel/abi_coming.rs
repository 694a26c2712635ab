// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers and structures that no released header has: conversion in place (v13 of its series,
//! expected in Linux 7.4) and huge pages in a guest_memfd (public work trees).
//!
//! No number of a capability is among them, since none is settled: what a kernel has is found by
//! trying (`probe.rs`).

#![allow(missing_docs)]

use libc::c_ulong;

/// On the guest_memfd itself, where KVM_SET_MEMORY_ATTRIBUTES is on the VM.
pub const KVM_SET_MEMORY_ATTRIBUTES2: c_ulong = 0xc080_aed2;

/// `struct kvm_memory_attributes2`. The kernel writes `error_offset`, and only if the conversion
/// itself fails.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KvmMemoryAttributes2 {
    pub offset: u64,
    pub size: u64,
    pub attributes: u64,
    pub flags: u64,
    pub error_offset: u64,
    pub reserved: [u64; 11],
}

/// Three series claim this flag of KVM_CREATE_GUEST_MEMFD: huge pages, writing by write(2), and
/// memory out of the kernel's direct map.
pub const GUEST_MEMFD_FLAG_CONTESTED: u64 = 1 << 2;

const _: () = assert!(size_of::<KvmMemoryAttributes2>() == 128);
