// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ways to hold a page so that the kernel does not let it become private: as an io_uring buffer, in a pipe, for a device.

use crate::failure::{Attempt, Failure};
use crate::host::shared_pages::SharedPages;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

const PAGE: u64 = 4096;
/// io_uring_register's operations (linux/io_uring.h).
const REGISTER_BUFFERS: libc::c_uint = 0;
const UNREGISTER_BUFFERS: libc::c_uint = 1;
/// sizeof(struct io_uring_params).
const PARAMETERS_BYTES: usize = 120;

/// An io_uring. It can have buffers registered, whose pages it pins.
pub struct Ring(File);

impl Ring {
    pub fn new() -> Result<Self, Failure> {
        let mut parameters = [0u64; PARAMETERS_BYTES / 8];
        // SAFETY: the kernel reads and writes as many bytes as the structure has; zeros ask for nothing special.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).attempt(|| "making an io_uring".into());
        }
        // SAFETY: a descriptor that was just opened and that nobody else has.
        Ok(Self(unsafe { File::from_raw_fd(fd as RawFd) }))
    }

    pub fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Pins the page at this offset, as the ring's only buffer.
    pub fn register(&self, pages: &SharedPages, offset: u64) -> io::Result<()> {
        let buffer = vector(pages, offset);
        self.call(REGISTER_BUFFERS, &raw const buffer, 1)
    }

    /// Lets go of it.
    pub fn unregister(&self) -> io::Result<()> {
        self.call(UNREGISTER_BUFFERS, std::ptr::null(), 0)
    }

    fn call(
        &self,
        operation: libc::c_uint,
        what: *const libc::iovec,
        count: u32,
    ) -> io::Result<()> {
        // SAFETY: the vectors outlive the call; the kernel pins what they name by itself.
        match unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.descriptor(),
                operation,
                what,
                count,
            )
        } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn vector(pages: &SharedPages, offset: u64) -> libc::iovec {
    libc::iovec {
        iov_base: pages.address(offset) as *mut libc::c_void,
        iov_len: PAGE as usize,
    }
}

/// A page in a pipe: a reference and no pin, which the kernel can't tell whose it is.
pub struct Spliced(File);

impl Spliced {
    pub fn new(pages: &SharedPages, offset: u64) -> Result<Self, Failure> {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error()).attempt(|| "making a pipe".into());
        }
        // SAFETY: descriptors that were just opened and that nobody else has.
        let (read, write) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
        let page = vector(pages, offset);
        // SAFETY: the vector outlives the call.
        let moved = unsafe { libc::vmsplice(write.as_raw_fd(), &raw const page, 1, 0) };
        match moved {
            moved if moved == PAGE as isize => Ok(Self(read)),
            _ => Err(io::Error::last_os_error()).attempt(|| "vmsplice of a page".into()),
        }
    }

    /// Reads it out, which lets go of it; what it held.
    pub fn read(mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; PAGE as usize];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
