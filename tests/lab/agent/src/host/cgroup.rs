// SPDX-License-Identifier: MIT OR Apache-2.0
//! A control group that limits the memory of the processes in it.

use super::pages;
use crate::failure::{Attempt, Failure};
use std::fs;
use std::path::PathBuf;

const ROOT: &str = "/sys/fs/cgroup";

/// A group, gone when it is dropped and nobody is in it any more.
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// One that may have that many bytes charged to it.
    pub fn new(name: &str, bytes: u64) -> Result<Self, Failure> {
        write(
            PathBuf::from(ROOT).join("cgroup.subtree_control"),
            "+memory",
        )?;
        let folder = PathBuf::from(ROOT).join(name);
        fs::create_dir(&folder).attempt(|| format!("making {}", folder.display()))?;
        let group = Self(folder);
        write(group.0.join("memory.max"), &bytes.to_string())?;
        Ok(group)
    }

    /// What a process is charged for from now on counts here; what it was charged for before does not.
    pub fn take_in(&self, process: u32) -> Result<(), Failure> {
        write(self.0.join("cgroup.procs"), &process.to_string())
    }

    /// Bytes that are charged to it.
    pub fn charged(&self) -> Result<u64, Failure> {
        let text = self.read("memory.current")?;
        text.trim()
            .parse()
            .attempt(|| format!("memory.current is no number: {text}"))
    }

    /// How many of its processes the kernel killed for want of memory.
    pub fn killed(&self) -> Result<u64, Failure> {
        pages::counter(&self.read("memory.events")?, "oom_kill")
    }

    fn read(&self, name: &str) -> Result<String, Failure> {
        let path = self.0.join(name);
        fs::read_to_string(&path).attempt(|| format!("reading {}", path.display()))
    }
}

fn write(path: PathBuf, text: &str) -> Result<(), Failure> {
    fs::write(&path, text).attempt(|| format!("writing {text} to {}", path.display()))
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
