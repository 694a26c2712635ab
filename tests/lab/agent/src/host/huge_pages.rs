// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's pools of huge pages.

use crate::failure::{Attempt, Failure};
use std::fs::{self, File};
use std::io;
use std::os::fd::FromRawFd;

/// Pages of one size; as many as there were when it was opened are there again when it is dropped.
pub struct Pool {
    directory: String,
    page_bytes: u64,
    before: u64,
}

impl Pool {
    /// The pool of pages of `page_bytes`.
    pub fn of(page_bytes: u64) -> Result<Self, Failure> {
        let directory = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_bytes >> 10);
        let mut pool = Self {
            directory,
            page_bytes,
            before: 0,
        };
        pool.before = pool.total()?;
        Ok(pool)
    }

    /// Pages that there are, whoever has them.
    pub fn total(&self) -> Result<u64, Failure> {
        self.read("nr_hugepages")
    }

    /// Pages that nobody has, promised ones included.
    pub fn free(&self) -> Result<u64, Failure> {
        self.read("free_hugepages")
    }

    /// Pages that are promised to somebody who has not touched them.
    pub fn reserved(&self) -> Result<u64, Failure> {
        self.read("resv_hugepages")
    }

    /// Makes the pool have that many pages.
    pub fn resize(&self, pages: u64) -> Result<(), Failure> {
        let path = format!("{}/nr_hugepages", self.directory);
        fs::write(&path, pages.to_string()).attempt(|| format!("writing {pages} to {path}"))?;
        match self.total()? {
            total if total == pages => Ok(()),
            total => Err(Failure::new(format!(
                "the kernel has {total} pages of {:#x} bytes where {pages} were asked for",
                self.page_bytes
            ))),
        }
    }

    /// Takes free pages away from everybody else.
    pub fn take(&self, pages: u64) -> Result<Taken, Failure> {
        let what = || format!("taking {pages} huge pages of {:#x} bytes", self.page_bytes);
        let size = self.page_bytes.trailing_zeros() << libc::MFD_HUGE_SHIFT;
        // SAFETY: a NUL-terminated name and flags.
        let fd = unsafe { libc::memfd_create(c"taken".as_ptr(), libc::MFD_HUGETLB | size) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).attempt(what);
        }
        // SAFETY: a descriptor that was just opened and that nobody else has.
        let file = unsafe { File::from_raw_fd(fd) };
        let bytes = (pages * self.page_bytes) as i64;
        // SAFETY: numbers only, on a descriptor that is open.
        match pages == 0 || unsafe { libc::fallocate(fd, 0, 0, bytes) } == 0 {
            true => Ok(Taken(file)),
            false => Err(io::Error::last_os_error()).attempt(what),
        }
    }

    fn read(&self, name: &str) -> Result<u64, Failure> {
        let path = format!("{}/{name}", self.directory);
        fs::read_to_string(&path)
            .attempt(|| format!("reading {path}"))?
            .trim()
            .parse()
            .attempt(|| format!("{path} holds no number"))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = self.resize(self.before);
    }
}

/// Huge pages that are gone until this is dropped.
pub struct Taken(#[allow(dead_code)] File);
