// SPDX-License-Identifier: MIT OR Apache-2.0
//! In pages of what sizes KVM maps a guest's memory now: its own statistics, which are there as files.

use crate::failure::{Attempt, Failure};
use std::fs;
use std::path::PathBuf;

const STATISTICS: &str = "/sys/kernel/debug/kvm";

/// Numbers of mappings. Firmware and whatever else the guest uses is in them: compare two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MappedSizes {
    pub small: i64,
    pub of_2m: i64,
    pub of_1g: i64,
}

impl MappedSizes {
    /// Of the one VM of a process.
    pub fn of(pid: u32) -> Result<Self, Failure> {
        let prefix = format!("{pid}-");
        let directory = fs::read_dir(STATISTICS)
            .attempt(|| format!("reading {STATISTICS}"))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                let name = path.file_name().and_then(|name| name.to_str());
                name.is_some_and(|name| name.starts_with(&prefix))
            })
            .attempt(|| format!("{STATISTICS} has no VM of process {pid}"))?;
        let read = |name| number(directory.join(name));
        Ok(Self {
            small: read("pages_4k")?,
            of_2m: read("pages_2m")?,
            of_1g: read("pages_1g")?,
        })
    }

    /// What came and went since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            small: self.small - before.small,
            of_2m: self.of_2m - before.of_2m,
            of_1g: self.of_1g - before.of_1g,
        }
    }
}

fn number(path: PathBuf) -> Result<i64, Failure> {
    fs::read_to_string(&path)
        .attempt(|| format!("reading {}", path.display()))?
        .trim()
        .parse()
        .attempt(|| format!("{} holds no number", path.display()))
}
