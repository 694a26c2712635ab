// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's pools of huge pages, for one test at a time.

use crate::common::skipped;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
pub const GIB_POOL: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB";

/// A file of a pool, 0 if it isn't there.
pub fn number(pool: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("{pool}/{name}")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// So many huge pages beyond those that somebody has, for one test at a time.
pub struct Pool {
    path: &'static str,
    before: u64,
    _turn: MutexGuard<'static, ()>,
}

impl Pool {
    pub fn with_free(test: &str, path: &'static str, pages: u64) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let pool = Self {
            path,
            before: number(path, "nr_hugepages"),
            _turn: turn,
        };
        pool.set_free(pages);
        if number(path, "free_hugepages") == pages {
            return Some(pool);
        }
        skipped(
            test,
            format_args!("{path} can't have {pages} free huge pages"),
        );
        None
    }

    pub fn set_free(&self, pages: u64) {
        let taken = number(self.path, "nr_hugepages") - number(self.path, "free_hugepages");
        let all = (taken + pages).to_string();
        let _ = fs::write(format!("{}/nr_hugepages", self.path), all);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(
            format!("{}/nr_hugepages", self.path),
            self.before.to_string(),
        );
    }
}

/// Free ones in the pool of 2 MiB pages.
pub fn free() -> u64 {
    number(POOL, "free_hugepages")
}
