// SPDX-License-Identifier: MIT OR Apache-2.0
//! The records of QEMU's clock around hypercalls (tests/lab/bench, patch 2), in a file that QEMU and we have mapped.

use crate::failure::{Attempt, Failure};
use memmap2::MmapMut;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// Records that fit; the longest case makes about 10,000.
const RECORDS: usize = 1 << 15;
const HEADER_WORDS: usize = 4;
const RECORD_WORDS: usize = 4;
const LOST: usize = 1;
/// What QEMU looks at to find the file.
pub const VARIABLE: &str = "QEMU_KVM_EXIT_TIMES";

/// One hypercall: when it left the guest and when the guest went on, CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exit {
    pub exit_ns: u64,
    pub reentry_ns: u64,
    pub address: u64,
    pub pages: u64,
    pub vcpu: usize,
}

impl Exit {
    pub fn nanoseconds(&self) -> u64 {
        self.reentry_ns - self.exit_ns
    }
}

/// The file and our mapping of it.
pub struct Times {
    path: PathBuf,
    map: MmapMut,
}

impl Times {
    pub fn create(path: &Path) -> Result<Self, Failure> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .attempt(|| format!("creating {}", path.display()))?;
        let words = HEADER_WORDS + RECORDS * RECORD_WORDS;
        file.set_len(words as u64 * 8)
            .attempt(|| format!("giving {} its size", path.display()))?;
        // SAFETY: QEMU writes to it as well, but only while a request runs, and we look before and after.
        let map =
            unsafe { MmapMut::map_mut(&file) }.attempt(|| format!("mapping {}", path.display()))?;
        Ok(Self {
            path: path.to_path_buf(),
            map,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Forgets what was recorded.
    pub fn reset(&mut self) {
        self.map[..HEADER_WORDS * 8].fill(0);
    }

    /// Everything recorded since the last reset, in the order of re-entry.
    pub fn take(&self) -> Result<Vec<Exit>, Failure> {
        if self.word(LOST) != 0 {
            return Err(Failure::new(format!(
                "{} exits found no room in {}",
                self.word(LOST),
                self.path.display()
            )));
        }
        let count = self.word(0) as usize;
        Ok((0..count).map(|index| self.record(index)).collect())
    }

    fn record(&self, index: usize) -> Exit {
        let at = HEADER_WORDS + index * RECORD_WORDS;
        let last = self.word(at + 3);
        Exit {
            exit_ns: self.word(at),
            reentry_ns: self.word(at + 1),
            address: self.word(at + 2),
            pages: last & 0xffff_ffff_ffff,
            vcpu: (last >> 48) as usize,
        }
    }

    fn word(&self, index: usize) -> u64 {
        let bytes: [u8; 8] = self.map[index * 8..][..8]
            .try_into()
            .expect("eight bytes are eight bytes");
        u64::from_ne_bytes(bytes)
    }
}
