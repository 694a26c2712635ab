// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block's shared bytes in this process's address space.

use super::{CallError, CallResult};
use crate::units::{Offset, Span};
use memmap2::{MmapOptions, MmapRaw};
use std::os::fd::{AsRawFd, BorrowedFd};

/// A shared mapping of a whole file.
///
/// Guest and devices change the bytes behind it at any time, so it is never shown as a Rust
/// reference, only as an address. Dropped, it is unmapped. Where huge pages can help, the kernel
/// aligns it to them by itself (shmem_get_unmapped_area).
#[derive(Debug)]
pub struct Mapping {
    raw: MmapRaw,
}

impl Mapping {
    /// Maps `size` bytes of `file`. ENOMEM when the address space has no room for them.
    pub(super) fn new(file: BorrowedFd, size: u64) -> CallResult<Self> {
        let failed = |errno| CallError {
            call: "mmap",
            errno,
        };
        let length = usize::try_from(size).map_err(|_| failed(libc::ENOMEM))?;
        let raw = MmapOptions::new()
            .len(length)
            .no_reserve_swap()
            .map_raw(file.as_raw_fd())
            .map_err(|error| failed(error.raw_os_error().unwrap_or(libc::ENOMEM)))?;
        Ok(Self { raw })
    }

    /// Address of offset 0.
    pub fn host(&self) -> *mut u8 {
        self.raw.as_mut_ptr()
    }

    /// Address of the first byte of `span`, as the kernel wants it.
    pub(super) fn address(&self, span: Span<Offset>) -> u64 {
        assert!(
            span.end() <= self.raw.len() as u64,
            "{span} is outside the mapping"
        );
        self.raw.as_ptr() as u64 + span.first()
    }
}

pub(super) fn last_errno() -> i32 {
    std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}
