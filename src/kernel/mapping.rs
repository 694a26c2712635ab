// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block's shared bytes in this process's address space.

use super::{CallError, CallResult};
use crate::units::{Offset, Span, PAGE_SIZE};
use libc::c_int;
use log::error;
use memmap2::{MmapOptions, MmapRaw};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
// The kernel in memory says so with its books locked, where no schedule may change threads.
use std::sync::atomic::{AtomicBool, Ordering};

/// A shared mapping of a whole file.
///
/// Guest and devices change the bytes behind it at any time, so it is never shown as a Rust
/// reference, only as an address. Dropped, it is unmapped. Where huge pages of a memfd can help, the
/// kernel aligns it to them by itself (shmem_get_unmapped_area).
#[derive(Debug)]
pub struct Mapping {
    /// More than the file where the kernel doesn't align by itself: a reservation at both ends.
    raw: ManuallyDrop<MmapRaw>,
    /// From the beginning of `raw` to that of the file.
    skipped: usize,
    length: usize,
    /// Some addresses may be somebody else's: for good, nothing is mapped or unmapped there.
    lost: AtomicBool,
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
            raw: ManuallyDrop::new(raw),
            skipped,
            length: size as usize,
            lost: AtomicBool::new(false),
        };
        if room != mapping.length {
            // Nobody finds the file beside its place.
            mapping.reserve(mapping.raw.as_mut_ptr(), room)?;
            mapping.map_over(file)?;
        }
        Ok(mapping)
    }

    /// Puts a reservation in the file's place. Where this fails, one of both is there.
    pub(super) fn hide(&self) -> CallResult<()> {
        self.reserve(self.host(), self.length)
    }

    fn reserve(&self, host: *mut u8, length: usize) -> CallResult<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        self.replace((host, length), libc::PROT_NONE, flags, -1)
    }

    /// Puts a file of the same size in the place of what is there. Where this fails, that is there, or
    /// a reservation.
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
        const CALL: &str = "mmap(MAP_FIXED)";
        if self.lost.load(Ordering::Acquire) {
            let errno = libc::EADDRNOTAVAIL;
            return Err(CallError { call: CALL, errno });
        }
        // SAFETY: the range is in this mapping's own, which lives on as whatever is mapped there: no
        // reference into it exists, and dropping it unmaps the range. Nobody else's mapping is there:
        // what an earlier call has left without one was taken back, or is lost.
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
            let errno = last_errno();
            self.take_back(host, length);
            return Err(CallError { call: CALL, errno });
        }
        Ok(())
    }

    /// After a call that failed, perhaps when it had unmapped what was there
    /// (vms_abort_munmap_vmas): then the next mmap(2) of any thread gets these addresses. Reserves
    /// them, unless somebody was faster.
    fn take_back(&self, host: *mut u8, length: usize) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let only_free = flags | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: this replaces nothing.
        let reserved =
            unsafe { libc::mmap(host.cast(), length, libc::PROT_NONE, only_free, -1, 0) };
        if reserved == host.cast() {
            return;
        }
        // Something is there: what was, if it is there from end to end. Others would have to fill all of
        // it at this very moment.
        // SAFETY: this changes no byte, of whomever.
        let whole = unsafe { libc::msync(host.cast(), length, libc::MS_ASYNC) } == 0;
        if !whole {
            self.lost.store(true, Ordering::Release);
            error!(
                "the addresses {host:?}, {length:#x} bytes, are lost to another thread of the process \
                 while they were mapped anew: this memory can't be used any more, and the VM not \
                 rebuilt"
            );
        }
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

impl Drop for Mapping {
    fn drop(&mut self) {
        if !*self.lost.get_mut() {
            // SAFETY: nothing uses it after this, which happens once.
            unsafe { ManuallyDrop::drop(&mut self.raw) };
        }
    }
}

pub(super) fn last_errno() -> i32 {
    std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::linux::Linux;
    use crate::kernel::Kernel;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    const SIZE: u64 = 4 * PAGE_SIZE;

    fn map_page(at: *mut u8, how: c_int) -> *mut u8 {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | how;
        // SAFETY: the tests' own addresses, or none that anybody has.
        unsafe { libc::mmap(at.cast(), PAGE_SIZE as usize, access, flags, -1, 0) }.cast()
    }

    /// A kernel that unmaps first, as Linux does for a file whose own mmap refuses, leaves a gap.
    #[test]
    fn addresses_stay_reserved_when_nothing_can_be_mapped_there() {
        let file = Linux.create_memfd("mapped", SIZE).unwrap();
        let mapping = Mapping::new(file.as_fd(), SIZE, PAGE_SIZE).unwrap();
        let unmappable = UnixDatagram::unbound().unwrap();
        let error = mapping.map_over(unmappable.as_fd()).unwrap_err();
        assert_eq!(error.errno, libc::ENODEV);
        for page in 0..4 {
            let at = mapping.host().wrapping_add(page * PAGE_SIZE as usize);
            let got = map_page(at, libc::MAP_FIXED_NOREPLACE);
            assert_eq!(got.cast(), libc::MAP_FAILED, "page {page} is anybody's");
        }
        mapping.map_over(file.as_fd()).unwrap();
        mapping.write(0, &[7; PAGE_SIZE as usize]);
    }

    #[test]
    fn addresses_that_somebody_else_has_now_are_left_alone() {
        let file = Linux.create_memfd("mapped", SIZE).unwrap();
        let mapping = Mapping::new(file.as_fd(), SIZE, PAGE_SIZE).unwrap();
        // A call has failed; one page is another's, one is nobody's.
        let theirs = map_page(mapping.host(), libc::MAP_FIXED);
        let gap = mapping.host().wrapping_add(2 * PAGE_SIZE as usize);
        // SAFETY: the mapping's own page, to which no reference exists; the other is this test's.
        unsafe {
            libc::munmap(gap.cast(), PAGE_SIZE as usize);
            theirs.write_volatile(7);
        }
        mapping.take_back(mapping.host(), SIZE as usize);
        for result in [mapping.hide(), mapping.map_over(file.as_fd())] {
            assert_eq!(result.unwrap_err().errno, libc::EADDRNOTAVAIL);
        }
        drop(mapping);
        // SAFETY: as above.
        assert_eq!(unsafe { theirs.read_volatile() }, 7);
    }
}
