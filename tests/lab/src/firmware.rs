// SPDX-License-Identifier: MIT OR Apache-2.0
//! Firmware and busybox from Debian's packages: both are ready to run and worth no compiler time.

use crate::cache::Key;
use crate::sources::{self, Sources};
use crate::ui;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

pub struct Firmware {
    /// Everything, as an installed QEMU wants it.
    pub share: PathBuf,
    pub busybox: PathBuf,
    pub key: String,
}

/// What the machines of the lab load; an installed QEMU gets the rest too.
pub const IN_LAB: &[&str] = &[
    "bios.bin",
    "bios-256k.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "pvh.bin",
    "vgabios-stdvga.bin",
];

/// Package, folder in it, and the endings of what is taken.
const PACKAGES: &[(&str, &str, &[&str])] = &[
    ("seabios", "usr/share/seabios", &[".bin"]),
    (
        "qemu-system-data",
        "usr/share/qemu",
        &["kvmvapic.bin", "_dma.bin", "pvh.bin", "qboot.rom"],
    ),
    ("ipxe-qemu", "usr/share/qemu", &[".rom"]),
];
const BUSYBOX: &str = "busybox-static";

pub fn prepare(sources: &Sources) -> Result<Firmware> {
    let mut key = Key::new("firmware").text("recipe", "1");
    let mut packages = Vec::new();
    let names = PACKAGES.iter().map(|(name, ..)| *name);
    for name in names.chain([BUSYBOX]) {
        let (file, sha256) = sources.package(name)?;
        key = key.text(name, &sha256);
        packages.push(file);
    }
    let key = key.finish();
    let product = sources.cache.product("firmware", &key, |folder| {
        let step = ui::step("firmware", "unpacking");
        let share = folder.join("share");
        std::fs::create_dir_all(&share)?;
        let unpacked = folder.join("unpacked");
        for package in &packages {
            sources::unpack_package(sources.logs, package, &unpacked)?;
        }
        for (name, place, endings) in PACKAGES {
            take(&unpacked.join(place), endings, &share)
                .with_context(|| format!("package {name} is not what it used to be"))?;
        }
        let busybox = ["usr/bin/busybox", "bin/busybox"]
            .iter()
            .map(|place| unpacked.join(place))
            .find(|place| place.is_file())
            .context("package busybox-static has no busybox where it used to be")?;
        std::fs::copy(busybox, folder.join("busybox"))?;
        for name in IN_LAB {
            std::fs::metadata(share.join(name))
                .with_context(|| format!("none of the firmware packages has {name}"))?;
        }
        std::fs::remove_dir_all(&unpacked)?;
        step.done("firmware unpacked");
        Ok(())
    })?;
    Ok(Firmware {
        share: product.join("share"),
        busybox: product.join("busybox"),
        key,
    })
}

fn take(from: &Path, endings: &[&str], to: &Path) -> Result<()> {
    let entries =
        std::fs::read_dir(from).with_context(|| format!("can't read {}", from.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_file() && endings.iter().any(|ending| name.ends_with(ending)) {
            std::fs::copy(&path, to.join(&*name))?;
        }
    }
    Ok(())
}
