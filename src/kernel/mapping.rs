// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block's shared bytes in this process's address space.

use super::{CallError, CallResult};
use crate::units::{Offset, Span, PAGE_SIZE};
use libc::c_int;
use memmap2::{MmapOptions, MmapRaw};
use std::os::fd::{AsRawFd, BorrowedFd};

/// A shared mapping of a whole file.
///
/// Guest and devices change the bytes behind it at any time, so it is never shown as a Rust
/// reference, only as an address. Dropped, it is unmapped. Where huge pages of a memfd can help, the
/// kernel aligns it to them by itself (shmem_get_unmapped_area).
#[derive(Debug)]
pub struct Mapping {
    /// More than the file where the kernel doesn't align by itself: a reservation at both ends.
    raw: MmapRaw,
    /// From the beginning of `raw` to that of the file.
    skipped: usize,
    length: usize,
}

impl Mapping {
    /// Maps `size` bytes of `file` at a multiple of `alignment`. ENOMEM when the address space has no
    /// room for them.
    pub(super) fn new(file: BorrowedFd, size: u64, alignment: u64) -> CallResult<Self> {
        let failed = |errno| CallError {
            call: "mmap",
            errno,
        };
        let room = size.checked_add(alignment - PAGE_SIZE);
        let room = room.and_then(|room| usize::try_from(room).ok());
        let room = room.ok_or(failed(libc::ENOMEM))?;
        let raw = MmapOptions::new()
            .len(room)
            .no_reserve_swap()
            .map_raw(file.as_raw_fd())
            .map_err(|error| failed(error.raw_os_error().unwrap_or(libc::ENOMEM)))?;
        let skipped = raw.as_ptr().align_offset(alignment as usize);
        let mapping = Self {
            raw,
            skipped,
            length: size as usize,
        };
        if room != mapping.length {
            // Nobody finds the file beside its place.
            mapping.reserve(mapping.raw.as_mut_ptr(), room)?;
            mapping.map_over(file)?;
        }
        Ok(mapping)
    }

    /// Puts a reservation in the file's place; the file stays where this fails.
    pub(super) fn hide(&self) -> CallResult<()> {
        self.reserve(self.host(), self.length)
    }

    fn reserve(&self, host: *mut u8, length: usize) -> CallResult<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        self.replace((host, length), libc::PROT_NONE, flags, -1)
    }

    /// Puts a file of the same size in the place of what is there.
    pub(super) fn map_over(&self, file: BorrowedFd) -> CallResult<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        self.replace((self.host(), self.length), access, flags, file.as_raw_fd())
    }

    fn replace(
        &self,
        (host, length): (*mut u8, usize),
        access: c_int,
        flags: c_int,
        file: c_int,
    ) -> CallResult<()> {
        // SAFETY: the range is in this mapping's own, which lives on as whatever is mapped there: no
        // reference into it exists, and dropping it unmaps the range.
        let mapped = unsafe {
            libc::mmap(
                host.cast(),
                length,
                access,
                flags | libc::MAP_FIXED,
                file,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(CallError {
                call: "mmap(MAP_FIXED)",
                errno: last_errno(),
            });
        }
        Ok(())
    }

    /// Address of offset 0.
    pub fn host(&self) -> *mut u8 {
        self.raw.as_mut_ptr().wrapping_add(self.skipped)
    }

    /// Copies `data` to `offset`. The caller knows that the bytes there are shared, have memory, and
    /// stay so meanwhile: else this ends in SIGBUS.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let end = offset.checked_add(data.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.length as u64),
            "{:#x} bytes at offset {offset:#x} are outside the mapping",
            data.len()
        );
        // SAFETY: the range is the mapping's own, to which no reference exists; `data` is one of
        // Rust's, so it lies elsewhere.
        unsafe {
            let to = self.host().add(offset as usize);
            std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len());
        }
    }

    /// Its length in bytes.
    pub(super) fn size(&self) -> usize {
        self.length
    }

    /// Address of the first byte of `span`, as the kernel wants it.
    pub(super) fn address(&self, span: Span<Offset>) -> u64 {
        assert!(
            span.end() <= self.length as u64,
            "{span} is outside the mapping"
        );
        self.host() as u64 + span.first()
    }
}

pub(super) fn last_errno() -> i32 {
    std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}
