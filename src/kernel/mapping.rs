// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block's shared bytes in this process's address space.

use super::{CallError, CallResult};
use crate::units::{Offset, Span};
use memmap2::{MmapOptions, MmapRaw};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// Guest memory profits from huge pages only where host and guest addresses agree modulo 2 MiB.
const ALIGNMENT: usize = 2 << 20;

/// A shared mapping of a whole file, between inaccessible guard pages.
///
/// Guest and devices change the bytes behind it at any time, so it is never shown as a Rust
/// reference, only as an address. Dropped, it is unmapped.
#[derive(Debug)]
pub struct Mapping {
    /// Owns the address range, guards and all, and unmaps it.
    _reservation: MmapRaw,
    host: NonNull<u8>,
    size: u64,
}

// SAFETY: the mapping is an address range; nothing in here dereferences it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` bytes of `file`. ENOMEM when the address space has no room for them.
    pub(super) fn new(file: BorrowedFd, size: u64) -> CallResult<Self> {
        let failed = |errno| CallError {
            call: "mmap",
            errno,
        };
        let too_large = || failed(libc::ENOMEM);
        let length = usize::try_from(size).map_err(|_| too_large())?;
        let reserved = length.checked_add(2 * ALIGNMENT).ok_or_else(too_large)?;
        let reservation: MmapRaw = MmapOptions::new()
            .len(reserved)
            .no_reserve_swap()
            .map_anon()
            .map_err(|error| failed(error.raw_os_error().unwrap_or(libc::ENOMEM)))?
            .into();
        // SAFETY: the range is the reservation's own, nobody has its address yet.
        let rc =
            unsafe { libc::mprotect(reservation.as_mut_ptr().cast(), reserved, libc::PROT_NONE) };
        if rc != 0 {
            return Err(failed(last_errno()));
        }
        let base = reservation.as_mut_ptr() as usize;
        // At least one page below stays inaccessible; so does what is left above.
        let aligned = (base + 4096).next_multiple_of(ALIGNMENT);
        // SAFETY: [aligned, aligned + length) lies within the reservation, whose pages nobody else
        // uses, so MAP_FIXED replaces nothing but them.
        let host = unsafe {
            libc::mmap(
                aligned as *mut libc::c_void,
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            )
        };
        if host == libc::MAP_FAILED {
            return Err(failed(last_errno()));
        }
        let host = NonNull::new(host.cast()).expect("mmap never returns page 0 here");
        Ok(Self {
            _reservation: reservation,
            host,
            size,
        })
    }

    /// Address of offset 0.
    pub fn host(&self) -> *mut u8 {
        self.host.as_ptr()
    }

    /// Address of the first byte of `span`, as the kernel wants it.
    pub(super) fn address(&self, span: Span<Offset>) -> u64 {
        assert!(span.end() <= self.size, "{span} is outside the mapping");
        self.host.as_ptr() as u64 + span.first()
    }
}

pub(super) fn last_errno() -> i32 {
    std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}
