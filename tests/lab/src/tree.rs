// SPDX-License-Identifier: MIT OR Apache-2.0
//! The project's own tree: where things are in it, and where runs leave their results.

use anyhow::{bail, Result};
use std::path::{Path, PathBuf};

pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The tree that cargo runs the lab from, or the one around the current folder.
    pub fn find() -> Result<Tree> {
        let start = std::env::var_os("CARGO_MANIFEST_DIR")
            .map(PathBuf::from)
            .map_or_else(std::env::current_dir, Ok)?;
        for folder in start.ancestors() {
            if folder.join("tests/lab/kernel.config").is_file() {
                return Ok(Tree {
                    root: folder.canonicalize()?,
                });
            }
        }
        bail!("not inside the project's tree; run it as `cargo lab` from there")
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn lab(&self, path: &str) -> PathBuf {
        self.root.join("tests/lab").join(path)
    }

    pub fn kernel_fragment(&self) -> PathBuf {
        self.lab("kernel.config")
    }

    pub fn kernel_series(&self) -> PathBuf {
        self.lab("kernel-patches")
    }

    pub fn series(&self) -> PathBuf {
        self.root
            .join("qemu-patches")
            .join(crate::sources::QEMU_SERIES)
    }

    /// Reports, console logs, images: of the last run.
    pub fn results(&self) -> PathBuf {
        self.root.join("target/lab")
    }
}
