// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo lab qemu`: the patched QEMU outside the lab.

use crate::firmware;
use crate::prepare::Ground;
use crate::qemu::Recipe;
use crate::sources::Sources;
use crate::{host, ui};
use anyhow::{bail, Context, Result};
use std::path::Path;

/// QEMU finds its firmware relative to itself, so the prefix may be moved afterwards.
pub fn run(ground: &Ground, prefix: &Path) -> Result<()> {
    // Said before minutes of building, not after.
    let (programs, share) = (prefix.join("bin"), prefix.join("share/qemu"));
    for folder in [&programs, &share] {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("can't create {}", folder.display()))?;
    }
    let _cache = ground.cache.lock()?;
    host::prepare(&ground.logs)?;
    let sources = Sources::new(&ground.cache, &ground.logs);
    let source = sources.qemu(ground.choices.qemu_src.as_deref())?;
    let firmware = firmware::prepare(&sources)?;
    let qemu = Recipe::new(&ground.cache, &ground.logs, &ground.tree, &source)?.build()?;
    if !qemu.patched {
        bail!("this tree has no QEMU series, so there is nothing to install that Debian does not have");
    }
    let binary = programs.join("qemu-system-x86_64");
    // A running QEMU keeps its old file; writing into it would fail with "text file busy".
    let part = programs.join("qemu-system-x86_64.part");
    std::fs::copy(&qemu.binary, &part)
        .and_then(|_| std::fs::rename(&part, &binary))
        .with_context(|| format!("can't write {}", binary.display()))?;
    for entry in std::fs::read_dir(&firmware.share)? {
        let entry = entry?;
        let place = share.join(entry.file_name());
        std::fs::copy(entry.path(), &place)
            .with_context(|| format!("can't write {}", place.display()))?;
    }
    ui::line(&format!("installed {}", binary.display()));
    Ok(())
}
