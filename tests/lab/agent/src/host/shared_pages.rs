// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest_memfd of QEMU's, mapped by us as well: what its shared pages hold, and where the kernel maps them.
//!
//! Everything goes through /proc/self/mem, which fails where a page is private; a plain access would be a signal.

use crate::failure::{Attempt, Failure};
use crate::host::memory::{backing, duplicate_of};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;
/// Documentation/admin-guide/mm/pagemap.rst: the page is in memory.
const PRESENT: u64 = 1 << 63;

/// The mapping. Offsets are the file's.
pub struct SharedPages {
    address: *mut libc::c_void,
    bytes: u64,
    memory: File,
    pages: File,
}

// SAFETY: the mapping belongs to the process, and all access to it goes through files.
unsafe impl Send for SharedPages {}
// SAFETY: as above; reads and writes at positions need no exclusive access.
unsafe impl Sync for SharedPages {}

impl SharedPages {
    /// Of the guest_memfd that QEMU maps with that many bytes, at an address of the kernel's choice.
    pub fn of(pid: u32, bytes: u64) -> Result<Self, Failure> {
        Self::map(pid, bytes, false)
    }

    /// As `of`, at the address at which QEMU has it.
    pub fn where_qemu_has_them(pid: u32, bytes: u64) -> Result<Self, Failure> {
        Self::map(pid, bytes, true)
    }

    fn map(pid: u32, bytes: u64, same_address: bool) -> Result<Self, Failure> {
        let mapping = backing(pid, bytes)?;
        if !mapping.is_guest_memfd() {
            return Err(Failure::new(format!(
                "RAM is expected in a guest_memfd and is in {}",
                mapping.path
            )));
        }
        let file = duplicate_of(pid, mapping.inode)?;
        let (address, flags) = match same_address {
            true => (mapping.addresses.start, libc::MAP_FIXED_NOREPLACE),
            false => (0, 0),
        };
        // SAFETY: a new mapping that replaces none; nobody else knows it.
        let address = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | flags,
                file.as_raw_fd(),
                mapping.offset as i64,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).attempt(|| "mapping QEMU's guest_memfd".into());
        }
        let open = |path: &str| File::open(path).attempt(|| format!("opening {path}"));
        Ok(Self {
            address,
            bytes,
            memory: open("/proc/self/mem")?,
            pages: open("/proc/self/pagemap")?,
        })
    }

    /// Where an offset is in this process.
    pub fn address(&self, offset: u64) -> u64 {
        self.address as u64 + offset
    }

    /// Bytes that the file has, which only the page cache knows.
    pub fn allocated(&self) -> Result<u64, Failure> {
        let mut pages = vec![0u8; (self.bytes / PAGE) as usize];
        // SAFETY: a mapping of that many bytes and a byte for each of its pages.
        let result =
            unsafe { libc::mincore(self.address, self.bytes as usize, pages.as_mut_ptr()) };
        match result {
            0 => Ok(pages.iter().filter(|page| **page & 1 == 1).count() as u64 * PAGE),
            _ => Err(io::Error::last_os_error()).attempt(|| "mincore of a guest_memfd".into()),
        }
    }

    /// Fails where a page is private.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_exact_at(buffer, self.address(offset))
    }

    /// Has the kernel map the page here, which allocates it if need be.
    pub fn touch(&self, offset: u64) -> io::Result<()> {
        self.read(&mut [0; 8], offset)
    }

    /// How the kernel refuses to show a page, or None if it does not.
    pub fn refusal(&self, offset: u64) -> Option<String> {
        self.touch(offset).err().map(|error| error.to_string())
    }

    /// Whether the page is mapped here. A conversion to private unmaps it before anything else.
    pub fn is_mapped(&self, offset: u64) -> Result<bool, Failure> {
        let mut entry = [0; 8];
        self.pages
            .read_exact_at(&mut entry, self.address(offset) / PAGE * 8)
            .attempt(|| "reading /proc/self/pagemap".into())?;
        Ok(u64::from_le_bytes(entry) & PRESENT != 0)
    }
}

impl Drop for SharedPages {
    fn drop(&mut self) {
        // SAFETY: this very mapping, of which no reference is given out.
        unsafe { libc::munmap(self.address, self.bytes as usize) };
    }
}
