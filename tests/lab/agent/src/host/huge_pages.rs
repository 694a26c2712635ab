// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's pools of huge pages.

use crate::failure::{Attempt, Failure};
use std::fs;

/// Pages of one size; as many as there were when it was taken are there again when it is dropped.
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
        pool.before = pool.read("nr_hugepages")?;
        Ok(pool)
    }

    /// Bytes of one page.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Pages that there are, whoever has them.
    pub fn total(&self) -> Result<u64, Failure> {
        self.read("nr_hugepages")
    }

    /// Pages that nobody has, promised ones included.
    pub fn free(&self) -> Result<u64, Failure> {
        self.read("free_hugepages")
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
